"""An `ssh` on the PATH that runs the command on this machine: real processes, no network, no keys.

It writes its arguments to ssh.log beside it, one JSON list a line, and knows four hosts apart: `down`
refuses the connection, `slow` never answers, `bare` has no mlx-gptoss and none of this machine's places,
`moved` has not those either, and on its PATH what the test put into a folder `bin` beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

SCRIPT = f"""\
#!{sys.executable}
import json, os, subprocess, sys, threading, time
arguments = sys.argv[1:]
with open(os.path.join(os.path.dirname(__file__), "ssh.log"), "a") as log:
    log.write(json.dumps(arguments) + "\\n")
split = arguments.index("--")
host, command = arguments[split + 1], " ".join(arguments[split + 2:])
if host == "down":
    print("ssh: connect to host down port 22: Connection refused", file=sys.stderr)
    sys.exit(255)
if host == "slow":
    time.sleep(600)
known = ("HOME", "PATH", "XDG_STATE_HOME", "LD_LIBRARY_PATH")
environment = {{name: value for name, value in os.environ.items() if name in known}}
environment["SSH_CONNECTION"] = "127.0.0.1 50000 127.0.0.1 22"
if host == "bare":
    environment["PATH"] = "/usr/bin:/bin"
if host == "moved":
    environment["PATH"] = os.path.join(os.path.dirname(__file__), "bin") + ":" + environment["PATH"]
if host in ("bare", "moved"):
    command = command.replace({sys.executable!r}, "/nowhere/python")
# As sshd does: when this end goes, the process's input closes; it is not killed.
process = subprocess.Popen(
    ["/bin/sh", "-c", command], stdin=subprocess.PIPE, env=environment, start_new_session=True
)
def pump():
    try:
        while data := os.read(0, 65536):
            process.stdin.write(data)
            process.stdin.flush()
        process.stdin.close()
    except OSError:
        pass
threading.Thread(target=pump, daemon=True).start()
sys.exit(process.wait() % 256)
"""


class FakeSsh:
    """log: what it was called with."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._log = folder / "ssh.log"
        program = folder / "ssh"
        program.write_text(SCRIPT)
        program.chmod(0o755)
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    @property
    def log(self) -> list[list[str]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]
