"""Connections with a bound on everything that a client can leave half done.

uvicorn waits for ever for the rest of a header, for a client that reads nothing, and for the rest
of a body that nobody wants any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import h11
from h11._writers import ChunkedWriter
from uvicorn.protocols.http.h11_impl import H11Protocol

from ktrt.serve.errors import ApiError, error_body

if TYPE_CHECKING:
    from ktrt.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

# How long a body is read and thrown away after the response. A connection closed at once is reset,
# and then clients that send before they read (httpx, most of them) never see the response.
_LINGER_SECONDS = 5.0
# CPU seconds for the reading of one request, and the bytes that are read between two looks: a body
# of 8 MB takes 0.02 s, but in chunks of a byte each 100 s, in which nothing else happens.
_READING_SECONDS, _SLICE = 0.25, 16 << 10


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with deadlines and a bound on the number of connections."""

    settings: ClassVar[ServeSettings]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Connection(h11.SERVER, self.settings.max_header_bytes)
        self._deadline: asyncio.TimerHandle | None = None
        self._phase: str | None = None
        self._unread: asyncio.TimerHandle | None = None
        # The request that is read, and the CPU seconds for it so far.
        self._read: tuple[object, float] = (None, 0.0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _send_at_once(transport)
        if self._is_too_many():
            error = ApiError(503, "too many connections", kind="server_error", retry_after=1)
            self._refuse(error)
            return
        self._watch(fresh=True)

    def _is_too_many(self) -> bool:
        """Returns whether there are more connections than may be, of all clients or of this one's
        address: one that opens them without end leaves the others some."""
        most, count = self.settings.max_connections, len(self.connections)
        most_of_client = ceil(most * self.settings.max_client_share)
        if count <= most_of_client:
            return False
        addresses = [getattr(each, "client", None) for each in self.connections]
        own = sum(each[0] == self.client[0] for each in addresses if each and self.client)
        return count > most or own > most_of_client

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self._unread is not None:
            self._unread.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE):
            before = time.thread_time()
            super().data_received(data[start : start + _SLICE])
            if self.transport.is_closing():
                return
            request, seconds = self._read
            seconds = (seconds if request is self.cycle else 0.0) + time.thread_time() - before
            self._read = self.cycle, seconds
            if seconds > _READING_SECONDS:
                self._refuse(ApiError(400, "the body comes in too many small chunks"))
                return
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.settings.write_seconds, self._not_read)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        error = ApiError(400, msg)
        if len(self.conn.trailing_data[0]) >= self.settings.max_header_bytes:
            most = self.settings.max_header_bytes
            error = ApiError(431, f"the headers have more than {most} bytes")
        self._refuse(error)

    def _watch(self, *, fresh: bool = False) -> None:
        """Sets the deadline of the connection's phase."""
        phase = self._phase_now(fresh=fresh)
        if phase == self._phase:
            return
        self._cancel()
        self._phase = phase
        if phase is not None:
            seconds = self.settings.header_seconds if phase == "header" else _LINGER_SECONDS
            self._deadline = self.loop.call_later(seconds, self._expired)

    def _phase_now(self, *, fresh: bool) -> str | None:
        if self.transport.is_closing():
            return None
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY and answered:
            return "linger"
        if self.conn.their_state is h11.IDLE:
            started = fresh or bool(self.conn.trailing_data[0])
            # A new connection stays in the phase until its first header is complete.
            return "header" if started or (self.cycle is None and self._phase) else None
        return None

    def _expired(self) -> None:
        if self._phase == "header" and self.conn.trailing_data[0]:
            seconds = self.settings.header_seconds
            self._refuse(ApiError(408, f"the headers are not complete after {seconds:g} s"))
        else:
            self.transport.abort()

    def _not_read(self) -> None:
        logger.info(
            "Closed the connection of %s: nothing was read for %g s",
            self.client[0] if self.client else "a client", self.settings.write_seconds,
        )  # fmt: skip
        self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Sends an error and closes the connection. A request under way counts as left."""
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            idle = self.cycle is None or self.cycle.response_complete
            if idle or not self.cycle.response_started:
                self.transport.write(_response(error))
            self.transport.close()
        else:
            self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._phase = None


class _Connection(h11.Connection):
    """Frames the pieces of a chunked body itself, without h11's look at what may follow what."""

    def send(self, event: Any) -> Any:
        if (
            type(event) is h11.Data
            and self.our_state is h11.SEND_BODY
            and type(self._writer) is ChunkedWriter
        ):
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        return super().send(event)


def _send_at_once(transport: asyncio.Transport) -> None:
    """Switches off Nagle's algorithm, which held a token until the client's acknowledgement: 44 ms
    for every response. asyncio does so only where the listening socket names its protocol."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _response(error: ApiError) -> bytes:
    body = json.dumps(error_body(error, "")).encode()
    lines = [f"HTTP/1.1 {error.status} Refused", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in error.headers.items()]
    lines += [f"content-length: {len(body)}", "connection: close", "", ""]
    return "\r\n".join(lines).encode() + body
