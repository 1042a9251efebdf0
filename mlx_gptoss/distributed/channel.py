"""A connection between two machines of a group: frames of bounded size over TCP, after a mutual proof.

Why not `mlx.distributed` for a pipeline: a group of its ring backend lives as long as its process, so that
rank 0, which has the callers, could not start over with a new one after a loss; and whoever waits in its
`recv` polls. One hop a step needs neither collectives nor RDMA.

The proof: both sides hold a token, which never crosses. Each sends a nonce, the dialling side first, and each
an HMAC-SHA256 over both under the token; whoever cannot is closed with one line in the log. What follows is
neither encrypted nor signed: run it where nobody else can write to the wire.

A frame is its length (uint32, little-endian), its kind (uint8) and its body. Nothing is pickled: records are
JSON, tensors are raw bytes.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from mlx_gptoss.errors import HostError

logger = logging.getLogger("mlx_gptoss.distributed")

PROTOCOL = 1
MAGIC = b"GPTOSS-GROUP"
NONCE = 32
# Seconds that a whole handshake may take, and how many may be under way at once.
HANDSHAKE = 5.0
HANDSHAKES = 16
# What a frame may hold, bytes, by its kind: a record, and (a piece of) a tensor.
RECORD, TENSOR = 0, 1
LIMITS = {RECORD: 1 << 20, TENSOR: 1 << 30}

Buffer: TypeAlias = bytes | bytearray | memoryview
_HEAD = struct.Struct("<IB")
_PRELUDE = struct.Struct(f"<{len(MAGIC)}sB{NONCE}s")


class ProtocolError(Exception):
    """The other side does not keep to what this module describes; one line."""


class Channel:
    """A proven connection. One thread receives; any may send.

    sent, received: bytes so far. heard: when the last bytes came (time.monotonic).
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._sending = threading.Lock()
        self.sent = self.received = 0
        self.heard = time.monotonic()

    @property
    def peer(self) -> str:
        """The address of the machine at the other end, as this machine can dial it again."""
        address, _, *scope = self._socket.getpeername()
        # A link-local one says nothing without this machine's interface.
        return _plain(address) + (f"%{scope[1]}" if scope and scope[1] and "%" not in address else "")

    @property
    def here(self) -> str:
        """The address of this machine, as the other end reaches it."""
        return _plain(self._socket.getsockname()[0])

    def tell(self, record: Any, tensors: list[Buffer] | None = None) -> None:
        """Send a record, and the tensors that it announces. Raises OSError when the connection is gone."""
        frames = [(RECORD, [_json(record)])]
        self._send([*frames, *((TENSOR, [tensor]) for tensor in tensors or ())])

    def tell_unless_sending(self, record: Any) -> None:
        """As `tell`; nothing while something else is being sent, which is as good a sign of life."""
        if self._sending.acquire(blocking=False):
            try:
                self._write([(RECORD, [_json(record)])])
            finally:
                self._sending.release()

    def send(self, *parts: Buffer) -> None:
        """Send one tensor, whose bytes are the parts' one after the other. Raises OSError."""
        self._send([(TENSOR, list(parts))])

    def _send(self, frames: list[tuple[int, list[Any]]]) -> None:
        with self._sending:
            self._write(frames)

    def _write(self, frames: list[tuple[int, list[Any]]]) -> None:
        for kind, parts in frames:
            views = [memoryview(part).cast("B") for part in parts if len(part)]
            length = sum(len(view) for view in views)
            assert length <= LIMITS[kind], f"a frame of {length} bytes"
            head = _HEAD.pack(length, kind)
            # Small frames in one piece: the receiver wakes up once.
            small = length < 1 << 16
            pieces: list[Buffer] = [b"".join([head, *views])] if small else [head, *views]
            for piece in pieces:
                self._socket.sendall(piece)
            self.sent += len(head) + length

    def receive(self) -> tuple[int, bytearray]:
        """The next frame. Raises OSError when the connection is gone, ProtocolError for what is no frame."""
        length, kind = _HEAD.unpack(self._read(_HEAD.size))
        if length > LIMITS.get(kind, -1):
            raise ProtocolError(f"sent a frame of kind {kind} and {length:,} bytes")
        return kind, self._read(length)

    def hear(self) -> Any:
        """The next frame, a record. Raises as `receive` does."""
        kind, body = self.receive()
        if kind != RECORD:
            raise ProtocolError("sent a tensor where a record was expected")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise ProtocolError("sent a record that is not JSON") from None

    def take(self) -> bytearray:
        """The next frame, a tensor. Raises as `receive` does."""
        kind, body = self.receive()
        if kind != TENSOR:
            raise ProtocolError("sent a record where a tensor was expected")
        return body

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            got = self._socket.recv_into(view)
            if not got:
                raise ConnectionResetError("the connection was closed")
            self.heard = time.monotonic()
            self.received += got
            view = view[got:]
        return data

    def close(self) -> None:
        """End it at once, for whoever sends or receives as well. Safe to call again, from any thread."""
        with suppress(OSError):  # it may not be connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def dial(address: tuple[str, int], token: bytes, timeout: float = HANDSHAKE) -> Channel:
    """Connect to a Listener. Raises HostError when there is none, or the two do not belong together."""
    where = f"{address[0]}:{address[1]}"
    try:
        connection = socket.create_connection(address, timeout)
    except OSError as error:
        raise HostError(f"{where} cannot be reached: {error}") from None
    try:
        nonce = secrets.token_bytes(NONCE)
        connection.sendall(_PRELUDE.pack(MAGIC, PROTOCOL, nonce))
        deadline = time.monotonic() + timeout
        other = _their_nonce(connection, deadline)
        connection.sendall(_proof(token, b"dial", nonce, other))
        theirs = _exactly(connection, 32, deadline)
        if not hmac.compare_digest(theirs, _proof(token, b"listen", nonce, other)):
            raise ProtocolError("has another token")
    except (OSError, ProtocolError) as error:
        connection.close()
        raise HostError(f"{where} does not let this machine in: {error or 'it does not answer'}") from None
    return Channel(connection)


def dial_any(addresses: list[list[Any]], token: bytes) -> Channel:
    """A connection to the first of some [host, port] that lets this machine in, tried for a while: strangers
    may have all places for a moment. Raises HostError.
    """
    problem, deadline = HostError("no address was given"), time.monotonic() + 2 * HANDSHAKE
    while True:
        for host, port in addresses:
            try:
                return dial((host, port), token)
            except HostError as error:
                problem = error
        if time.monotonic() > deadline or not addresses:
            raise problem
        time.sleep(0.5)


def _their_nonce(connection: socket.socket, deadline: float) -> bytes:
    magic, version, nonce = _PRELUDE.unpack(_exactly(connection, _PRELUDE.size, deadline))
    if magic != MAGIC:
        raise ProtocolError("is not a machine of a group")
    if version != PROTOCOL:
        raise ProtocolError(f"speaks version {version} of the protocol, and this machine {PROTOCOL}")
    return bytes(nonce)


def _proof(token: bytes, side: bytes, dialling: bytes, listening: bytes) -> bytes:
    return hmac.digest(token, side + dialling + listening, "sha256")


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    """So many bytes before a moment, however slowly they come. Raises OSError."""
    data = b""
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        got = connection.recv(count - len(data))
        if not got:
            raise ConnectionResetError("the connection was closed")
        data += got
    return data


class Listener:
    """A port at which machines of the group arrive. host: an address of this machine, "" for all it has.

    token: may be replaced; who comes then must know the new one. welcome: told each proven connection, on a
    thread of its own; the connection is closed when it raises. All else is closed, and logged in one line.
    """

    def __init__(self, host: str, token: bytes, welcome: Callable[[Channel], None], port: int = 0) -> None:
        try:
            if host:
                family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                self._socket = socket.create_server(address[:2], family=family)
            else:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                self._socket = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise HostError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
        self.token, self._welcome = token, welcome
        self._places = threading.BoundedSemaphore(HANDSHAKES)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._run, name=f"port {self.port}", daemon=True).start()

    def close(self) -> None:
        """Take no more connections. Safe to call again."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # `accept` would not notice `close`
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.1)  # too many open files, which may pass
                continue
            if not self._places.acquire(blocking=False):
                logger.warning("%s is refused: too many connections are being made", address[0])
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection, _plain(address[0])), daemon=True).start()

    def _greet(self, connection: socket.socket, where: str) -> None:
        try:
            self._prove(connection)
        except (OSError, ProtocolError) as error:
            logger.warning("%s is refused: it %s", where, _said(error))
            connection.close()
            return
        finally:
            self._places.release()
        channel = Channel(connection)
        try:
            self._welcome(channel)
        except (OSError, ProtocolError, HostError) as error:
            logger.warning("%s is refused: %s", where, error)
            channel.close()

    def _prove(self, connection: socket.socket) -> None:
        deadline, nonce = time.monotonic() + HANDSHAKE, secrets.token_bytes(NONCE)
        try:
            other = _their_nonce(connection, deadline)
        except ProtocolError as error:
            if "version" in str(error):  # let it say so too
                connection.sendall(_PRELUDE.pack(MAGIC, PROTOCOL, nonce))
            raise
        connection.sendall(_PRELUDE.pack(MAGIC, PROTOCOL, nonce))
        proof = _exactly(connection, 32, deadline)
        if not hmac.compare_digest(proof, _proof(self.token, b"dial", other, nonce)):
            raise ProtocolError("has another token")
        connection.sendall(_proof(self.token, b"listen", other, nonce))


def _json(record: Any) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _plain(address: str) -> str:
    """An address without what marks an IPv4 one at a port that takes both."""
    return address.removeprefix("::ffff:")


def _said(error: Exception) -> str:
    """What a stranger did, to follow "it"."""
    if isinstance(error, TimeoutError):
        return f"did not prove itself within {HANDSHAKE:g} s"
    return str(error) if isinstance(error, ProtocolError) else "went away before it had proved itself"
