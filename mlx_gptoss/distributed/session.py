"""One life of a group: connections to all ranks, watched. With the first loss it is over, for all at once.

Whoever waits for a rank is woken with a HostError. Nothing here starts anything: group.py does, again if need
be.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from queue import SimpleQueue
from typing import Any

from mlx_gptoss.distributed.channel import Buffer, Channel, ProtocolError
from mlx_gptoss.errors import HostError

logger = logging.getLogger("mlx_gptoss.distributed")

# Seconds between two signs of life, each way.
BEAT = 0.5
# A step comes with its number, how many rows it has, and the seconds that the ranks before have spent on it.
STEP = struct.Struct("<IIf")


def versions() -> dict[str, str]:
    """What must be the same on all machines."""
    return {name: version(name) for name in ("gptoss-mlx", "mlx")}


@dataclass
class Member:
    """A rank as rank 0 knows it. facts: what it last told of itself, by name."""

    rank: int
    host: str
    channel: Channel
    facts: dict[str, Any] = field(default_factory=dict)
    replies: SimpleQueue[tuple[list[Any], list[bytearray]] | None] = field(default_factory=SimpleQueue)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


@dataclass(frozen=True)
class Returned:
    """A step as it comes back: its rows, what all other ranks spent on it, and when it came."""

    step: int
    rows: int
    spent: float
    data: memoryview
    at: float


class Session:
    """The members, from rank 1 on. last: the one that sends hidden states back.

    silence, step: seconds without a sign of life, and on one piece of work, after which a rank is lost. told:
    asked about every record that is no reply, on the thread that heard it.
    """

    def __init__(
        self,
        members: list[Member],
        silence: float,
        step: float,
        retry_after: float,
        told: Callable[[Member, list[Any]], None] = lambda member, record: None,
        last: Member | None = None,
    ) -> None:
        self.members = members
        self.last = last or members[-1]
        self.onward: list[Channel] = []  # hidden states: to rank 1, or to all
        self.back: Channel | None = None  # from the last rank
        self.loss: HostError | None = None
        self.over = threading.Event()
        self.waited = 0.0  # seconds that rank 0 has waited for hidden states
        self._silence, self._step = silence, step
        self._retry_after, self._told = retry_after, told
        self._returned: SimpleQueue[Returned | None] = SimpleQueue()
        self._lock = threading.Lock()
        for member in members:
            member.channel.heard = time.monotonic()
            threading.Thread(target=self._listen, args=(member,), name=str(member), daemon=True).start()
        for job in (self._beat, self._watch):
            threading.Thread(target=job, name=f"group {job.__name__}", daemon=True).start()

    @property
    def sent(self) -> int:
        """Bytes that rank 0 has sent."""
        return sum(c.sent for c in (*(m.channel for m in self.members), *self.onward))

    # --- what the engine's thread does

    def tell(self, member: Member, record: list[Any], tensors: list[Buffer] | None = None) -> None:
        """Have a rank do something. Raises HostError when the group is lost."""
        try:
            member.channel.tell(record, tensors)
        except OSError as error:
            raise self.lose(f"{member} is lost: {error}") from None

    def tell_all(self, record: list[Any]) -> None:
        """Have every other rank do something. Raises HostError when the group is lost."""
        for member in self.members:
            self.tell(member, record)

    def ask(self, member: Member, record: list[Any]) -> tuple[list[Any], list[bytearray]]:
        """A rank's answer: a record, and the tensors that come with it. Raises HostError."""
        self.tell(member, record)
        if (reply := member.replies.get()) is None:
            raise self.lost()
        return reply

    def send(self, step: int, rows: int, data: Buffer) -> None:
        """Hand a step's hidden states on. Raises HostError when the group is lost."""
        for member, channel in zip(self.members, self.onward, strict=False):
            try:
                channel.send(STEP.pack(step, rows, 0.0), data)
            except OSError as error:
                raise self.lose(f"{member} is lost: {error}") from None

    def receive(self, step: int) -> Returned:
        """What the last rank made of a step. Raises HostError."""
        started = time.monotonic()
        found = self._returned.get()
        self.waited += time.monotonic() - started
        if found is None:
            raise self.lost()
        if found.step != step:
            raise self.lose(f"{self.last} sent step {found.step} where {step} was expected")
        return found

    # --- its end

    def lost(self) -> HostError:
        """The loss, as a new exception: several threads may raise it."""
        assert self.loss is not None
        return HostError(str(self.loss), self.loss.retry_after)

    def lose(self, what: str) -> HostError:
        """Note a loss and end the session; the error for whoever found out. The first loss counts."""
        with self._lock:
            if self.loss is None:
                self.loss = HostError(what, self._retry_after)
        self.end()
        return self.lost()

    def end(self) -> None:
        """Close everything, wake everybody. Safe to call again."""
        if self.loss is None:
            self.loss = HostError("the group was closed")
        self.over.set()
        for channel in (*(m.channel for m in self.members), *self.onward, self.back):
            if channel is not None:
                channel.close()
        for member in self.members:
            member.replies.put(None)
        self._returned.put(None)

    # --- its threads

    def gather(self, back: Channel) -> None:
        """Take what the last rank sends from now on."""
        self.back = back
        if self.over.is_set():
            back.close()
        threading.Thread(target=self._collect, args=(back,), name="hidden states", daemon=True).start()

    def _collect(self, back: Channel) -> None:
        try:
            while True:
                frame = back.take()
                step, rows, spent = STEP.unpack_from(frame)
                data = memoryview(frame)[STEP.size :]
                self._returned.put(Returned(step, rows, spent, data, time.monotonic()))
        except (OSError, ProtocolError) as error:
            self._found(f"{self.last} is lost: {error}")

    def _listen(self, member: Member) -> None:
        try:
            while True:
                record = member.channel.hear()
                match record:
                    case ["beat", dict(facts)]:
                        member.facts.update(facts)
                        if (busy := float(facts.get("busy", 0))) > self._step:
                            raise ProtocolError(f"has worked on one step for {busy:.0f} s")
                    case ["failed", str(kind), str(message)]:
                        raise ProtocolError(f"failed: {kind}: {message}")
                    case ["arrays", list(described)]:
                        member.replies.put((described, [member.channel.take() for _ in described]))
                    case list():
                        self._told(member, record)
                    case _:
                        raise ProtocolError(f"sent {record!r:.80}")
        except ProtocolError as error:
            self._found(f"{member} {error}")
        except OSError as error:
            self._found(f"{member} is lost: {error}")

    def _beat(self) -> None:
        while not self.over.wait(BEAT):
            for member in self.members:
                try:
                    member.channel.tell_unless_sending(["beat"])
                except OSError as error:
                    self._found(f"{member} is lost: {error}")

    def _watch(self) -> None:
        """It sends nothing, so that no full socket can keep it."""
        while not self.over.wait(BEAT / 2):
            for member in self.members:
                if (silent := time.monotonic() - member.channel.heard) > self._silence:
                    self._found(f"{member} has given no sign of life for {silent:.1f} s")

    def _found(self, what: str) -> None:
        if not self.over.is_set():
            self.lose(what)
