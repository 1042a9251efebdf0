"""uvicorn's HTTP protocol with a limit on how long a client may take to send a request's headers.

uvicorn waits for headers for ever, so a few hundred clients that send a byte a minute could hold all its
connections open (the attack called slow loris). Bodies have their own limit, in security.read_body.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_gptoss.server.http.errors import ApiError, openai_error


def protocol_class(header_timeout: float) -> type[H11Protocol]:
    """The protocol class for uvicorn's `http` setting; seconds for the headers of each request."""

    class BoundedH11Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Reading a request: its headers are there. Idle: bytes of the next one begin a new wait.
            if self.conn.their_state is h11.IDLE:
                if self._deadline is None and not self.transport.is_closing():
                    self._arm()
            else:
                self._disarm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answer what is not HTTP in the shape of every other error."""
            body = json.dumps(openai_error(ApiError(400, msg, code="invalid_http"))).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _arm(self) -> None:
            self._deadline = self.loop.call_later(header_timeout, self._too_slow)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            self._deadline = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return BoundedH11Protocol
