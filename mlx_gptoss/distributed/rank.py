"""A rank's process: `python -m mlx_gptoss.distributed.rank RANK PORT ADDRESS ..`, with the token on stdin.

It finds rank 0, says what this machine is, loads its layers when it is told which, and does what it is told
until the connection ends. Then nothing of it is left, whatever it was doing: a watchdog sees to that.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import mlx.core as mx

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.fingerprint import fingerprint
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.part import PartOfCheckpoint
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion, read_layers
from mlx_gptoss.device import available_memory, limit_memory, peak_rss, share_arenas
from mlx_gptoss.distributed.about import networks
from mlx_gptoss.distributed.channel import Channel, Listener, ProtocolError, dial_any
from mlx_gptoss.distributed.collective import Collective, free_port
from mlx_gptoss.distributed.session import BEAT, STEP, versions
from mlx_gptoss.distributed.stage import PartStage, Stage
from mlx_gptoss.distributed.wire import describe, from_bytes, read, to_bytes
from mlx_gptoss.errors import GptOssError, HostError
from mlx_gptoss.model.low_rank import Pair

# Exit codes: rank 0 closed or is gone; it was silent; something failed here and was told.
GONE, SILENT, FAILED = 0, 3, 4
# After so many seconds without the interpreter's lock, faulthandler's own thread ends the process.
STUCK = 60.0
# Seconds for the other ranks to join MLX's group.
JOIN = 60.0
# Records that are followed by tensors, and which of their entries describes these.
WITH_TENSORS = {"adopt_span": 2, "adopt_state": 4, "put_adapter": 4}


class Process:
    """What runs in a rank's process: the connections, and the stage that they talk to."""

    def __init__(self, rank: int, control: Channel, token: bytes) -> None:
        self.rank = rank
        self._control, self._token = control, token
        self._orders: SimpleQueue[tuple[list[Any], list[bytearray]]] = SimpleQueue()
        self._arriving: SimpleQueue[tuple[float, bytearray]] = SimpleQueue()
        self._silence = float("inf")  # until rank 0 says how long it may be silent
        self._busy_since: float | None = None
        self._alone: float | None = None  # since when this rank waits for others to join it
        self._steps = 0
        self._waited = 0.0
        self._onward: Channel | None = None
        loopback = control.here.startswith("127.")
        self._listener = Listener("127.0.0.1" if loopback else "", token, self._arrived)

    def run(self) -> None:
        """Say hello, load, and work until the end."""
        facts = {"rank": self.rank, "pid": os.getpid(), "port": self._listener.port, **self._facts()}
        facts |= {"free_port": free_port(), "networks": networks()}
        facts |= {"memory": available_memory(), "versions": versions()}
        self._control.tell(["hello", facts])
        threading.Thread(target=self._hear, name="rank 0", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            record, _ = self._orders.get()
            stage = self._load(*record)
            while True:
                record, tensors = self._orders.get()
                self._busy_since = time.monotonic()
                self._do(stage, record, tensors)
                self._busy_since = None
        except Exception as error:
            if not isinstance(error, GptOssError | ProtocolError):
                sys.excepthook(*sys.exc_info())
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Tell rank 0 what has happened here, and end."""
        with suppress(OSError):
            self._control.tell(["failed", type(error).__name__, str(error) or repr(error)])
        leave(FAILED)

    # --- loading

    def _load(self, kind: str, order: dict[str, Any]) -> Stage:
        if kind != "load":
            raise ProtocolError(f"said {kind!r} before 'load'")
        place = {name: order[name] for name in ("revision", "offline", "weights")}
        folder = resolve(order["model"], **place)
        where = range(*order["layers"])
        collective = None if order["join"] is None else Collective(order["join"])
        checkpoint = _checkpoint(Path(folder), where, order, collective)
        mark = fingerprint(checkpoint.folder, "", checkpoint.tensors)
        if mark != order["fingerprint"]:
            raise HostError(
                f"the weights of layers {where.start} to {where.stop - 1} in {checkpoint.folder} are not "
                "those of rank 0: copy or download them again"
            )
        checkpoint.unpacked = tuple(order["unpacked"])
        if order["slots"] is not None:
            checkpoint.streaming = ExpertFiles(checkpoint, order["slots"])
        limit_memory(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
        layers = read_layers(checkpoint, lambda done: self._control.tell(["loaded", done]))
        mx.clear_cache()
        if order["onward"]:
            onward = [[host or self._control.peer, port] for host, port in order["onward"]]
            self._onward = dial_any(onward, self._token)
            self._onward.tell(["from", self.rank])
        keys, values = order["kv_bits"]
        stage = (Stage if collective is None else PartStage)(
            checkpoint.part_config,
            checkpoint.dtype,
            layers,
            where,
            (keys, values),
            interleaved=checkpoint.layout.interleaved,
        )
        opened = {tensor.path for tensor in checkpoint.tensors.values()}
        facts = {**self._facts(), "opened": sum(path.stat().st_size for path in opened)}
        if collective is not None and isinstance(stage, PartStage):
            self._control.tell(["placed"])
            record, _ = self._orders.get()  # comes when all ranks have their layers, however long that takes
            if record != ["join"]:
                raise ProtocolError(f"said {record[0]!r:.80} before 'join'")
            self._alone = time.monotonic()
            facts |= collective.measure(stage)
            self._alone = None
        self._control.tell(["ready", facts])
        return stage

    # --- work

    def _do(self, stage: Stage, record: list[Any], tensors: list[bytearray]) -> None:
        name, *values = record
        if name == "forward":
            self._forward(stage, *values)
        elif name in ("fetch_span", "fetch_state"):
            data = stage.states[values[0]].data if name == "fetch_state" else None
            arrays = stage.spans[values[0]] if name == "fetch_span" else [] if data is None else [data]
            self._control.tell(["arrays", [describe(a) for a in arrays]], [to_bytes(a) for a in arrays])
        elif name == "put_adapter":
            number, scale, names, described = values
            stage.put_adapter(number, _adapter(scale, names, _arrays(tensors, described)))
        elif name == "adopt_span":
            stage.adopt_span(values[0], _arrays(tensors, values[1]))
        elif name == "adopt_state":
            made = _arrays(tensors, values[3])
            number, start, end, _ = values
            stage.adopt_state(number, start, end, made[0] if made else None)
        elif name in STAGE:
            getattr(stage, name)(*values)
        else:
            raise ProtocolError(f"said {name!r:.80}, which is not known here")

    def _forward(self, stage: Stage, step: int, shares: list[list[int]], rows: list[int] | None) -> None:
        started = time.monotonic()
        self._busy_since = None
        arrived, frame = self._arriving.get()
        self._busy_since = time.monotonic()
        self._waited += self._busy_since - started
        number, count, spent = STEP.unpack_from(frame)
        if number != step:
            raise ProtocolError(f"sent step {number} where {step} was expected")
        x = from_bytes(memoryview(frame)[STEP.size :], stage.dtype, (count, stage.config.hidden_size))
        x = stage.forward(x, shares, rows)
        if self._onward is not None:
            data = to_bytes(x)
            self._onward.send(STEP.pack(step, len(x), spent + time.monotonic() - arrived), data)
        self._steps += 1

    # --- threads

    def _hear(self) -> None:
        try:
            while True:
                match record := self._control.hear():
                    case ["beat"]:
                        pass
                    case ["silence", int() | float() as seconds]:
                        self._silence = seconds
                    case [str(name), *_]:
                        place = WITH_TENSORS.get(name)
                        count = len(record[place]) if place is not None else 0
                        self._orders.put((record, [self._control.take() for _ in range(count)]))
                    case _:
                        raise ProtocolError(f"sent {record!r:.80}")
        except OSError:
            leave(GONE)
        except ProtocolError as error:
            self._fail(error)

    def _arrived(self, channel: Channel) -> None:
        """The rank before this one."""
        if channel.hear() not in (["from", 0], ["from", self.rank - 1]):
            raise ProtocolError("is not the rank before this one")
        try:
            while True:
                frame = channel.take()
                self._arriving.put((time.monotonic(), frame))
        except (OSError, ProtocolError) as error:
            time.sleep(BEAT)  # rank 0 will have noticed as well, and knows which one it was
            self._fail(HostError(f"rank {self.rank - 1} is lost to it: {error}"))

    def _watch(self) -> None:
        while True:
            faulthandler.dump_traceback_later(STUCK, exit=True)
            if time.monotonic() - self._control.heard > self._silence:
                leave(SILENT)
            self._keep_to_time()
            try:
                self._control.tell_unless_sending(["beat", self._facts()])
            except OSError:
                leave(GONE)
            time.sleep(BEAT)

    def _keep_to_time(self) -> None:
        """Fail when the other ranks are waited for in vain: MLX waits for ever."""
        if self._alone is not None and time.monotonic() - self._alone > JOIN:
            told = f"the other ranks have not joined within {JOIN:g} s: try `mlx-gptoss hosts check`"
            self._fail(HostError(told))

    def _facts(self) -> dict[str, Any]:
        onward, busy = self._onward, self._busy_since
        return {
            "peak_rss": peak_rss(),
            "active": mx.get_active_memory(),
            "steps": self._steps,
            "waited": round(self._waited, 3),
            "busy": 0.0 if busy is None else round(time.monotonic() - busy, 1),
            "sent": self._control.sent + (0 if onward is None else onward.sent),
            "passed_on": 0 if onward is None else onward.sent,
        }


# The records that are calls of a stage as they are.
STAGE = ("make", "free", "reserve", "go_back", "snapshot", "export", "cut", "load")


def _checkpoint(
    folder: Path, where: range, order: dict[str, Any], collective: Collective | None
) -> Checkpoint:
    """Whole layers, or a part of each."""
    if collective is None:
        return Checkpoint(folder, order["dtype"], Portion(where))
    heads, channels = range(*order["heads"]), range(*order["channels"])
    return PartOfCheckpoint(folder, order["dtype"], heads, channels, collective, Portion(where))


def _arrays(tensors: list[bytearray], described: list[Any]) -> list[mx.array]:
    return [read(data, one) for data, one in zip(tensors, described, strict=True)]


def _adapter(scale: float | None, names: list[list[Any]], arrays: list[mx.array]) -> Adapter | None:
    """An adapter of its scale, [layer, name] of each part and two arrays of each; no scale: none."""
    if scale is None:
        return None
    parts: dict[int, dict[str, Pair]] = {}
    rest = deque(arrays)
    for layer, name in names:
        parts.setdefault(layer, {})[name] = Pair(rest.popleft(), rest.popleft())
    return Adapter(parts, scale)


def leave(code: int) -> NoReturn:
    """End the process at once, whatever its other threads are doing."""
    os._exit(code)


def main() -> None:
    """Join the group whose rank 0 started this process."""
    share_arenas()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's
    rank, port, *hosts = sys.argv[1:]
    token = bytes.fromhex(sys.stdin.readline())

    def parent() -> None:
        while sys.stdin.read(1):
            pass
        leave(GONE)

    threading.Thread(target=parent, name="parent", daemon=True).start()
    if "SSH_CONNECTION" in os.environ:  # where this was started from is reachable from here
        hosts.append(os.environ["SSH_CONNECTION"].split()[0])
    try:
        control = dial_any([[host, int(port)] for host in hosts], token)
    except HostError as error:
        sys.exit(f"rank {rank}: {error}")
    Process(int(rank), control, token).run()


if __name__ == "__main__":
    main()
