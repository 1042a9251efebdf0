"""Python on other machines, by ssh. Nothing is asked there: keys and known hosts must be set up.

The secret goes through standard input, so that no list of processes shows it. When this process ends, ssh's
end closes that input, and what runs over there ends with it; `kill` also ends what does not listen any more.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from ipaddress import ip_address

from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.starter import SAFE_PATH, Handle, LocalStarter, Starter
from mlx_gptoss.errors import HostError, RequestError

CONNECT = 10  # seconds for ssh to reach a host
BEGIN = 20.0  # seconds until a process has begun over there, connecting included
KILL = 10.0  # seconds for the way to a process that has to be ended
OPTIONS = {
    "BatchMode": "yes",  # never a question
    "ConnectTimeout": str(CONNECT),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}
LISTEN = 2.0  # seconds for a process to notice that its input has ended
# $0 is this machine's interpreter: the same place there, or that of the mlx-gptoss command. A shell that is
# not a login shell does not know the places where pip, pipx, uv and Homebrew put it. An interpreter whose
# path is long or has a space stands in the command's second line, behind '''exec'.
_FIND = r"""PATH="$PATH:$HOME/.local/bin:/opt/homebrew/bin:/usr/local/bin"
has() {
  [ -x "$1" ] || return
  "$1" -P -c 'import sys, importlib.util as u; sys.exit(u.find_spec("mlx_gptoss") is None)' 2> /dev/null
}
python=$0
if ! has "$python"; then
  command=$(command -v mlx-gptoss)
  python=$(sed -n '1s/^#! *//p' "$command" 2>/dev/null)
  if [ "$python" = /bin/sh ]; then
    python=$(sed -n "2{s/^'''exec' *//;s/ *\"\$0\".*//;s/^[\"']//;s/[\"']\$//;p;}" "$command")
  fi
  has "$python" || { echo "no mlx-gptoss is installed there (neither by $0 nor on the PATH)" >&2; exit 127; }
fi
set -- "$python" "$@"
"""
_BEGUN = "begun"


def ssh_command(host: str, remote: str) -> list[str]:
    """Ssh with what it runs: a line for the user's shell over there."""
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-T", *options, "--", host, remote]


def remote_line(arguments: Sequence[str], environment: Mapping[str, str], python: str) -> str:
    """The line that tells the process's id, and becomes `python ARGUMENTS`."""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    script = f'{_FIND}{exports}echo "{_BEGUN} $$"\nexec "$@"'
    return "exec /bin/sh -c " + shlex.join([script, python, *arguments])


def printable(text: str) -> str:
    """What another machine said, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class HostProcess:
    """`python ARGUMENTS` on a host, begun: a Handle. It ends when its standard input does, if it reads it.

    told: is handed each line of standard output, on another thread. What it writes to standard error goes to
    this one's, under the host's name. Raises HostError when the host cannot be reached or has no such Python.
    """

    def __init__(
        self,
        host: Host,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        told: Callable[[str], None] = lambda line: None,
        python: str = sys.executable,
    ) -> None:
        self._name, self._told = host.name, told
        self.last = ""  # line of standard error
        self._begun = threading.Event()
        self._pid: int | None = None
        self._here = is_here(host)
        arguments = [SAFE_PATH, *arguments]
        command = [python, *arguments]
        if not self._here:
            command = ssh_command(host.name, remote_line(arguments, environment, python))
        pipe = subprocess.PIPE
        try:
            # A session of its own: Ctrl-C is for this process, which ends the others.
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
                env=os.environ | environment if self._here else None,
            )
        except OSError as error:
            raise HostError(f"{host.name}: {command[0]} cannot be run: {error.strerror}") from None
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._forward)]
        for thread in self._threads:
            thread.start()
        if not self._here and (not self._begun.wait(BEGIN) or self._pid is None):
            self._process.kill()
            raise HostError(f"{host.name}: {self._why(self._process.wait())}")

    def write(self, data: bytes) -> None:
        """Give it standard input. Nothing is raised when it has ended, which `poll` tells."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        status = self._process.wait(timeout)
        for thread in self._threads:  # what it said last
            thread.join(1.0)
        return status

    def end(self) -> None:
        """Let it end, with its standard input; what does not listen is killed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(LISTEN)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        if self._here:
            return
        # A process that is stopped, or stuck in a driver, does not notice that its input has ended.
        end = f"ps -ww -o command= -p {self._pid} | grep -q mlx_gptoss && kill -9 {self._pid}"
        command = ssh_command(self._name, f"exec /bin/sh -c {shlex.quote(end)}")
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KILL, check=False)

    def _why(self, status: int) -> str:
        """Why it did not begin."""
        self._threads[1].join(1.0)
        match status:
            case 255:
                return f"{self.last or 'ssh failed'}; check that `ssh {self._name} true` asks nothing"
            case 127:
                return f"{self.last or 'no Python'}; install this version of gptoss-mlx there"
        return f"{self.last or f'ssh did not get there within {BEGIN:g} s'} (ssh ended with {status})"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            word, _, number = line.partition(" ")
            if self._here or self._pid is not None:
                self._told(line)
            elif word == _BEGUN and number.isdecimal():
                self._pid = int(number)
                self._begun.set()
        self._begun.set()

    def _forward(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            text = raw.decode(errors="replace").strip()
            self.last = printable(text) or self.last
            if self._here or self._pid is not None:
                print(f"[{self._name}] {self.last}", file=sys.stderr, flush=True)


class SshStarter:
    """Starts ranks on a host by ssh."""

    def __init__(self, host: Host, environment: Mapping[str, str]) -> None:
        self._host, self._environment = host, environment

    def start(self, rank: int, arguments: Sequence[str], secret: bytes) -> Handle:
        """As Starter."""
        process = HostProcess(self._host, arguments, self._environment)
        process.write(secret.hex().encode() + b"\n")
        return process


def starter_of(host: Host, environment: Mapping[str, str]) -> Starter:
    """What starts ranks on a host: here, or by ssh. environment: variables that they are given."""
    return LocalStarter(environment) if is_here(host) else SshStarter(host, environment)


@cache
def is_here(host: Host) -> bool:
    """Whether a host is this machine, by its name or by an address."""
    name = host.name.rpartition("@")[2].lower()
    if host.is_local or name.removesuffix(".local") == socket.gethostname().lower().removesuffix(".local"):
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        if ip_address(str(address[0]).partition("%")[0]).is_unspecified:
            return False  # it can be bound everywhere, and names no machine
        with socket.socket(family, kind) as probe:
            probe.bind(address)  # works for addresses of this machine alone
    except OSError:
        return False
    return True


def require_here(hosts: Sequence[Host]) -> None:
    """Raises RequestError when the first host is not this machine."""
    if not is_here(hosts[0]):
        raise RequestError(
            f"hosts: {hosts[0].name} is not this machine: rank 0 is where the command runs; put this one "
            "first, as localhost",
            "hosts",
        )
