"""What arrives at the control port: machines of the group, and everybody else."""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from queue import SimpleQueue

import pytest

from mlx_gptoss.distributed import channel as module
from mlx_gptoss.distributed.channel import (
    HANDSHAKES,
    LIMITS,
    MAGIC,
    PROTOCOL,
    RECORD,
    TENSOR,
    Channel,
    Listener,
    ProtocolError,
    dial,
)
from mlx_gptoss.errors import HostError

TOKEN = b"t" * 32


class Port:
    """A listener, and the channels that arrived at it."""

    def __init__(self) -> None:
        self.arrived: SimpleQueue[Channel] = SimpleQueue()
        self.listener = Listener("127.0.0.1", TOKEN, self.arrived.put)
        self.address = ("127.0.0.1", self.listener.port)

    def pair(self) -> tuple[Channel, Channel]:
        """Two ends of a proven connection."""
        mine = dial(self.address, TOKEN)
        return mine, self.arrived.get(timeout=60)

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    with closing(made.listener):
        yield made


@pytest.fixture
def lines() -> Iterator[Callable[[int], list[str]]]:
    """Waits for so many lines of the log, and gives all there are."""
    written: SimpleQueue[str] = SimpleQueue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.put(record.getMessage())

    logger = logging.getLogger("mlx_gptoss.distributed")
    logger.addHandler(handler := Handler())

    def wait(count: int) -> list[str]:
        got = [written.get(timeout=60) for _ in range(count)]
        while not written.empty():
            got.append(written.get())
        return got

    yield wait
    logger.removeHandler(handler)


def closed(stranger: socket.socket) -> bool:
    """Whether the other side ends the connection, whatever it says before."""
    try:
        while stranger.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_records_and_tensors_arrive_as_they_were_sent(port: Port) -> None:
    near, far = port.pair()
    with closing(near), closing(far):
        near.tell(["make", 3, None, "é"], [b"abc", bytearray(b""), memoryview(b"d" * 100_000)])
        assert far.hear() == ["make", 3, None, "é"]
        assert [far.take(), far.take(), far.take()] == [b"abc", b"", b"d" * 100_000]
        far.send(b"1", b"", b"23")
        assert near.receive() == (TENSOR, bytearray(b"123"))
        assert near.sent == far.received and far.sent == near.received


def test_both_sides_may_send_more_than_the_sockets_hold(port: Port) -> None:
    """Senders block until the other side reads; that it also sends must not end in a deadlock."""
    near, far = port.pair()
    with closing(near), closing(far):
        senders = [threading.Thread(target=end.send, args=(bytes(30 << 20),)) for end in (near, far)]
        for sender in senders:
            sender.start()
        readers = [threading.Thread(target=end.take) for end in (near, far)]
        for reader in readers:
            reader.start()
        for thread in (*senders, *readers):
            thread.join(60)
            assert not thread.is_alive()


def test_a_sign_of_life_does_not_wait_for_what_is_being_sent(port: Port) -> None:
    near, far = port.pair()
    sending = threading.Thread(target=near.tell, args=([1], [bytes(1 << 26)]))
    sending.start()
    assert far.hear() == [1]  # the tensor is on its way, and more than the sockets hold
    near.tell_unless_sending(["beat"])
    assert len(far.take()) == 1 << 26
    sending.join(60)
    near.tell_unless_sending(["later"])
    assert far.hear() == ["later"]
    near.close()
    far.close()


def test_garbage_is_closed_with_one_line_each(port: Port, lines: Callable[[int], list[str]]) -> None:
    rng = random.Random(5)
    count = 1000
    for start in range(0, count, HANDSHAKES // 2):  # not more at once than are listened to
        batch = range(start, min(count, start + HANDSHAKES // 2))
        strangers = [port.stranger() for _ in batch]
        for stranger in strangers:
            with closing(stranger):
                stranger.sendall(rng.randbytes(rng.choice([1, 7, 44, 45, 46, 200, 5000])))
                with suppress(OSError):  # it may have been closed already
                    stranger.shutdown(socket.SHUT_WR)
                assert closed(stranger)
        assert all("is refused" in line for line in lines(len(batch)))
    assert port.arrived.empty()
    near, far = port.pair()  # and the port is still there
    near.close()
    far.close()


def test_a_port_scan_is_one_line(port: Port, lines: Callable[[int], list[str]]) -> None:
    port.stranger().close()
    assert lines(1) == ["127.0.0.1 is refused: it went away before it had proved itself"]


def test_another_token_is_refused_by_both(port: Port, lines: Callable[[int], list[str]]) -> None:
    with pytest.raises(HostError, match="does not let this machine in"):
        dial(port.address, b"u" * 32)
    assert lines(1) == ["127.0.0.1 is refused: it has another token"]
    assert port.arrived.empty()


def test_a_token_that_was_replaced_counts_no_more(port: Port) -> None:
    port.listener.token = b"n" * 32
    with pytest.raises(HostError, match="does not let this machine in"):
        dial(port.address, TOKEN)
    dial(port.address, b"n" * 32).close()


def test_a_listener_that_does_not_know_the_token_is_not_trusted() -> None:
    """It sees the dialling side's proof, and can do nothing with it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with closing(connection):
                theirs = connection.recv(4096)
                connection.sendall(MAGIC + bytes([PROTOCOL]) + bytes(32))
                proof = connection.recv(4096)
                connection.sendall(proof)  # its own proof, sent back
                assert TOKEN not in theirs + proof

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HostError, match="another token"):
            dial(impostor.getsockname(), TOKEN)
        thread.join()


def test_another_version_of_the_protocol_is_named(port: Port, lines: Callable[[int], list[str]]) -> None:
    stranger = port.stranger()
    with closing(stranger):
        stranger.sendall(MAGIC + bytes([PROTOCOL + 1]) + bytes(32))
        assert stranger.recv(len(MAGIC) + 1) == MAGIC + bytes([PROTOCOL])
    expected = f"it speaks version {PROTOCOL + 1} of the protocol, and this machine {PROTOCOL}"
    assert lines(1) == [f"127.0.0.1 is refused: {expected}"]


def test_half_open_sockets_end_and_do_not_keep_others_out(
    port: Port, lines: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HANDSHAKE", 0.2)
    silent = [port.stranger() for _ in range(HANDSHAKES)]
    assert all(map(closed, silent))
    assert len(lines(HANDSHAKES)) == HANDSHAKES
    monkeypatch.undo()
    near, far = port.pair()
    near.close()
    far.close()
    for stranger in silent:
        stranger.close()


@pytest.mark.parametrize(
    "head", [(LIMITS[RECORD] + 1, RECORD), (LIMITS[TENSOR] + 1, TENSOR), (2**32 - 1, RECORD), (1, 9)]
)
def test_oversized_and_unknown_frames_are_refused(head: tuple[int, int]) -> None:
    near, far = raw_pair()
    with closing(near), closing(far):
        near.sendall(struct.pack("<IB", *head))
        with pytest.raises(ProtocolError, match="sent a frame of kind"):
            far.receive()


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_a_record_that_is_not_json_is_refused(body: bytes) -> None:
    near, far = raw_pair()
    with closing(near), closing(far):
        near.sendall(struct.pack("<IB", len(body), RECORD) + body)
        with pytest.raises(ProtocolError, match="not JSON"):
            far.hear()


def test_a_frame_that_ends_early_is_a_lost_connection(port: Port) -> None:
    near, far = port.pair()
    with closing(near), closing(far):
        near.close()
        with pytest.raises(OSError):
            far.receive()
        with pytest.raises(OSError):
            near.tell(["beat"])


def test_closing_wakes_whoever_waits(port: Port) -> None:
    near, far = port.pair()
    with closing(far):
        ended: SimpleQueue[BaseException] = SimpleQueue()

        def wait() -> None:
            try:
                near.receive()
            except OSError as error:
                ended.put(error)

        threading.Thread(target=wait).start()
        near.close()
        assert isinstance(ended.get(timeout=60), OSError)


def test_nobody_at_the_port_is_one_line() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        address = gone.getsockname()
    with pytest.raises(HostError, match=f"{address[0]}:{address[1]} cannot be reached"):
        dial(address, TOKEN)


def raw_pair() -> tuple[socket.socket, Channel]:
    """A channel, and a plain socket at its other end."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        near = socket.create_connection(server.getsockname())
        return near, Channel(server.accept()[0])


def test_a_port_of_all_addresses_takes_both_kinds() -> None:
    arrived: SimpleQueue[Channel] = SimpleQueue()
    with closing(Listener("", TOKEN, arrived.put)) as listener:
        near = dial(("127.0.0.1", listener.port), TOKEN)
        far = arrived.get(timeout=60)
        assert far.peer == far.here == near.peer == "127.0.0.1"
        near.close()
        far.close()
