"""The other ranks of a group: started, let in, loaded, and started again when one is lost.

A session (session.py) is one life of all of them. The first one is `open`ed by whoever loads the model; when
it is lost, a thread here makes the next one in the same way, a bounded number of times. Meanwhile `session`
raises.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from mlx_gptoss.device import available_memory
from mlx_gptoss.distributed.channel import Channel, Listener, ProtocolError, dial_any
from mlx_gptoss.distributed.collective import collective_settings, ipv4_addresses, shared_addresses
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.plan import Machine
from mlx_gptoss.distributed.session import Member, Session, versions
from mlx_gptoss.distributed.ssh import is_here
from mlx_gptoss.distributed.starter import Handle, LocalStarter, Starter
from mlx_gptoss.errors import HostError

logger = logging.getLogger("mlx_gptoss.distributed")

RANK_MODULE = "mlx_gptoss.distributed.rank"
TOKEN_BYTES = 32
# What callers are told to wait for a group that starts over, seconds.
RETRY_AFTER = 10.0
# Seconds that a rank's process has to end by itself.
LEAVING = 2.0

Progress = Callable[[int], None]
StarterOf = Callable[[Host], Starter]


@dataclass(frozen=True)
class Patience:
    """How long rank 0 waits, in seconds, and how often it starts over.

    silence: for a sign of life. step: for one piece of work. start: for a process to say hello. restarts: at
    most so many within `within` seconds; after that the group stays down.
    """

    silence: float = 4.0
    step: float = 300.0
    start: float = 60.0
    restarts: int = 5
    within: float = 600.0


@dataclass
class _Arrival:
    channel: Channel
    facts: dict[str, Any]


class Group:
    """The ranks from 1 on, on `hosts` (of which the first is this machine).

    collective: for ranks that all have a part of every layer: what they add up by; without it each has layers
    of its own. starter: what starts processes on a host. orders: set once the plan is made: what each rank,
    from 1 on, is told to load. The token is made here, for each life anew.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        starter: StarterOf = lambda host: LocalStarter(),
        patience: Patience | None = None,
        collective: str | None = None,
    ) -> None:
        self.hosts = hosts
        self.collective = collective
        self.orders: list[dict[str, Any]] = []
        self.losses = 0
        self._starter = starter
        self.patience = patience or Patience()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._arrivals: SimpleQueue[_Arrival] = SimpleQueue()
        self._session: Session | None = None
        self._pending: Session | None = None  # the one that is being made, or was made last
        self._down: HostError | None = HostError("the group has not started yet")
        self._handles: dict[int, Handle] = {}
        self._members: list[Member] = []
        self._lost_at: deque[float] = deque(maxlen=self.patience.restarts + 1)
        self._closed = threading.Event()
        local = all(map(is_here, hosts))
        self._listener = Listener("127.0.0.1" if local else "", self._token, self._arrived)
        self._keeper = threading.Thread(target=self._keep, name="group", daemon=True)

    @property
    def port(self) -> int:
        """Where ranks arrive."""
        return self._listener.port

    @property
    def session(self) -> Session:
        """The life that is. Raises HostError while there is none."""
        session = self._session
        if session is None or session.loss is not None:
            if session is not None and session.loss is not None:
                raise session.lost()
            assert self._down is not None
            raise HostError(str(self._down), self._down.retry_after)
        return session

    @property
    def members(self) -> list[Member]:
        """The ranks of the last life, with what they told of themselves."""
        return list(self._members)

    # --- the first life

    def gather(self) -> list[Machine]:
        """Start every rank and wait until all have said hello; the machines, this one first.

        Machines that are one share its memory. Raises HostError.
        """
        try:
            self._members = self._start_all()
        except BaseException:
            self.close()
            raise
        free = [available_memory(), *(int(m.facts["memory"]) for m in self._members)]
        alike = [
            [is_here(h) if is_here(host) else h.name == host.name for h in self.hosts] for host in self.hosts
        ]
        return [
            Machine(host.name, room // sum(same))
            for host, room, same in zip(self.hosts, free, alike, strict=True)
        ]

    def open(self, orders: list[dict[str, Any]], progress: Progress = lambda loaded: None) -> None:
        """Have all that said hello load what they are to load; the group then keeps itself up.

        progress: told how many layers all of them together have loaded. Raises HostError.
        """
        self.orders = orders
        try:
            self._session = self._load_all(self._members, progress)
        except BaseException:
            self.close()
            raise
        self._down = None
        self._keeper.start()

    def close(self) -> None:
        """End every rank, and wait for that. Safe to call again."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._listener.close()
        if self._session is not None:
            self._session.end()
        self._down = HostError("the group was closed")
        self._end_processes()
        if self._keeper.is_alive() and self._keeper is not threading.current_thread():
            self._keeper.join(10 * LEAVING)  # it may be ending those that it was just starting
            self._end_processes()

    # --- the next ones

    def _keep(self) -> None:
        """Wait for losses, and start over."""
        session = self._session
        while session is not None and not self._closed.is_set():
            session.over.wait()
            if self._closed.is_set():
                return
            logger.warning("%s; starting again", session.loss)
            self._lose(session.lost())
            session = self._start_over()

    def _lose(self, error: HostError) -> None:
        self.losses += 1
        self._lost_at.append(time.monotonic())
        self._down, self._session = error, None
        self._end_processes()

    def _start_over(self) -> Session | None:
        """The next life; None when there shall be none."""
        while not self._closed.is_set():
            recent = [t for t in self._lost_at if time.monotonic() - t < self.patience.within]
            if len(recent) > self.patience.restarts:
                self._down = HostError(
                    f"the group was lost {len(recent)} times within {self.patience.within:g} s and stays "
                    f"down: mend the last cause ({self._down}) and load the model again"
                )
                logger.error("%s", self._down)
                return None
            try:
                self._members = self._start_all()
                made = self._load_all(self._members, lambda loaded: None)
            except HostError as error:
                logger.warning("the group does not start: %s", error)
                self._lose(HostError(str(error), RETRY_AFTER))
                self._closed.wait(1.0)
                continue
            self._session, self._down = made, None
            if self._closed.is_set():
                made.end()
                return None
            logger.warning("the group is complete again")
            return made
        return None

    # --- one start

    def _start_all(self) -> list[Member]:
        """Processes that have said hello, from rank 1 on. They have a token that no earlier life knows."""
        self._token = self._listener.token = secrets.token_bytes(TOKEN_BYTES)
        while True:
            try:
                self._arrivals.get_nowait().channel.close()  # late ones of the last life
            except Empty:
                break
        for rank, host in enumerate(self.hosts[1:], start=1):
            addresses = ["127.0.0.1"] if is_here(host) else self.hosts[0].ips
            arguments = ["-m", RANK_MODULE, str(rank), str(self.port), *addresses]
            self._handles[rank] = self._starter(host).start(rank, arguments, self._token)
        found: dict[int, Member] = {}
        deadline = time.monotonic() + self.patience.start
        try:
            while len(found) < len(self._handles):
                member = self._next_arrival(deadline, found)
                found[member.rank] = member
        except BaseException:
            for member in found.values():
                member.channel.close()
            self._end_processes()
            raise
        return [found[rank] for rank in sorted(found)]

    def _next_arrival(self, deadline: float, found: dict[int, Member]) -> Member:
        while True:
            try:
                arrival = self._arrivals.get(timeout=0.1)
            except Empty:
                missing = [r for r in self._handles if r not in found]
                for r in missing:
                    if (code := self._handles[r].poll()) is not None:
                        raise HostError(
                            f"rank {r} ({self.hosts[r].name}) ended with exit code {code} "
                            "before it had said hello"
                        ) from None
                if self._closed.is_set():
                    raise HostError("the group was closed") from None
                if time.monotonic() > deadline:
                    names = ", ".join(f"rank {r} ({self.hosts[r].name})" for r in missing)
                    raise HostError(f"{names}: no sign of life within {self.patience.start:g} s") from None
                continue
            rank = arrival.facts.get("rank")
            if not isinstance(rank, int) or rank not in self._handles or rank in found:
                logger.warning("a second rank %r is refused", rank)
                arrival.channel.close()
                continue
            member = Member(rank, self.hosts[rank].name, arrival.channel, arrival.facts)
            here, there = versions(), arrival.facts.get("versions")
            if there != here:
                arrival.channel.close()
                raise HostError(
                    f"{member} has other versions: {_shown(there)}; this machine has {_shown(here)}"
                )
            return member

    def _arrived(self, channel: Channel) -> None:
        """A proven connection: a rank's control, or the last rank's hidden states."""
        match channel.hear():
            case ["hello", dict(facts)]:
                self._arrivals.put(_Arrival(channel, facts))
            case ["from", int(rank)]:
                session = self._pending
                if session is None or rank != session.last.rank:
                    raise ProtocolError(f"rank {rank} has nothing to send here now")
                session.gather(channel)
            case record:
                raise ProtocolError(f"sent {record!r:.80} instead of saying hello")

    def _load_all(self, members: list[Member], progress: Progress) -> Session:
        """A session of members that have loaded."""
        ready: SimpleQueue[Member | None] = SimpleQueue()
        loaded: dict[int, int] = {}

        def told(member: Member, record: list[Any]) -> None:
            match record:
                case ["loaded", int(done)]:
                    loaded[member.rank] = done
                    progress(sum(loaded.values()))
                case ["placed"] if self.collective is not None:
                    ready.put(member)
                case ["ready", dict(facts)]:
                    member.facts |= facts
                    ready.put(member)
                case _:
                    raise ProtocolError(f"sent {record!r:.80}")

        together = self.collective is not None
        last = members[0 if together else -1]
        session = self._pending = Session(
            members, self.patience.silence, self.patience.step, RETRY_AFTER, told, last
        )

        def over() -> None:
            session.over.wait()
            ready.put(None)

        def all_told() -> None:
            waiting = {member.rank for member in members}
            while waiting:
                if (one := ready.get()) is None:
                    raise session.lost()
                waiting.discard(one.rank)

        threading.Thread(target=over, daemon=True).start()
        try:
            for member, order in zip(members, self.orders, strict=True):
                session.tell(member, ["silence", self.patience.silence])
                links = {"onward": self._onward(session, member), "join": self._join(members, member)}
                session.tell(member, ["load", order | links])
            if together:
                all_told()
                session.tell_all(["join"])
            all_told()
            for member in members if together else members[:1]:
                session.onward.append(dial_any(self._addresses(member), self._token))
                session.onward[-1].tell(["from", 0])
            return session
        except BaseException:
            session.end()
            self._end_processes()
            raise

    def _onward(self, session: Session, member: Member) -> list[list[Any]]:
        """Where a rank finds the next one, "" where it found rank 0; nothing where it has none."""
        if member is session.last:
            return [["", self.port], *([ip, self.port] for ip in self.hosts[0].ips)]
        return [] if self.collective else self._addresses(session.members[member.rank], member)

    def _join(self, members: list[Member], member: Member) -> dict[str, Any] | None:
        """How a rank joins the others in MLX's own group."""
        if self.collective is None:
            return None
        addresses = ipv4_addresses(
            [(self.hosts[one.rank], one.channel.peer, one.facts["networks"]) for one in members]
        )
        ports = [int(one.facts["free_port"]) for one in members]
        rdma = [self.hosts[one.rank].rdma for one in members]
        return collective_settings(self.collective, members.index(member), addresses, ports, rdma)

    def _addresses(self, member: Member, dialling: Member | None = None) -> list[list[Any]]:
        """Where a rank is found, by rank 0 or by another one."""
        found, peer = list(self.hosts[member.rank].ips), member.channel.peer
        if dialling is not None:
            found += shared_addresses(member.facts["networks"], dialling.facts["networks"])
        if dialling is None or "%" not in peer or not found:  # an interface's name is rank 0's alone
            found.insert(0, peer)
        return [[address, int(member.facts["port"])] for address in dict.fromkeys(found)]

    def _end_processes(self) -> None:
        """Wait for every process, and kill those that do not end by themselves."""
        deadline = time.monotonic() + LEAVING
        handles, self._handles = list(self._handles.values()), {}
        for member in self._members:
            member.channel.close()
        for handle in handles:
            with suppress(subprocess.TimeoutExpired):
                handle.wait(max(0.0, deadline - time.monotonic()))
                continue
            handle.kill()
            with suppress(subprocess.TimeoutExpired):
                handle.wait(LEAVING)


def _shown(found: Any) -> str:
    return ", ".join(f"{name} {v}" for name, v in found.items()) if isinstance(found, dict) else repr(found)
