"""The outermost middleware: request ids, the access log, and exceptions that nobody handled."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import queue
import re
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from starlette.datastructures import Headers, MutableHeaders

from ktrt.serve.context import RequestFacts, current
from ktrt.serve.errors import ApiError, as_api_error, error_response

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
# One line of JSON per request.
access_logger = logging.getLogger("ktrt.serve.requests")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# nginx's code for a client that left; no client sees it.
LEFT = 499
# Lines that wait for the log's thread; more are dropped, because a reader that is too slow must
# not stop the event loop.
_LINES = 10_000


class ClientLeftError(Exception):
    """The client has gone: nobody reads a response."""


class Access:
    """Gives a request an id, logs it, and turns what nobody handled into a response.

    The line holds neither headers nor body nor query: keys and conversations stay out of logs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = _facts(scope)
        sent = _Sent(send, facts.id)
        token = current.set(facts)
        try:
            await self._answer(scope, receive, sent)
        finally:
            current.reset(token)
            if access_logger.isEnabledFor(logging.INFO):
                access_logger.info("%s", _line(scope, facts, sent))

    async def _answer(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        try:
            await self._app(scope, receive, sent)
            return
        except ClientLeftError:
            sent.status = LEFT
            return
        except asyncio.CancelledError:
            # The server ends and the time to finish is over.
            error = ApiError(503, "the server is shutting down", kind="server_error")
        except Exception as failure:
            error = as_api_error(failure)
            if error.status == 500:
                logger.exception("Request %s %s failed", sent.id, scope["path"])
        if not sent.started:
            response = error_response(error, scope["path"], sent.id)
            await response(scope, receive, sent)
        # A response that was begun ends incomplete: the connection is closed.


class _Sent:
    """Notes what is sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.id = send, request_id
        self.started = False
        self.status, self.bytes = 0, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            MutableHeaders(scope=message).setdefault("X-Request-Id", self.id)
        else:
            self.bytes += len(message.get("body", b""))
        await self._send(message)


def _facts(scope: Scope) -> RequestFacts:
    given = Headers(scope=scope).get("x-request-id", "")
    client = scope["client"][0] if scope.get("client") else ""
    facts = RequestFacts(client=client)
    if _ID.fullmatch(given):
        facts.id = given
    scope.setdefault("state", {})["request_id"] = facts.id
    return facts


def _line(scope: Scope, facts: RequestFacts, sent: _Sent) -> str:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": facts.id,
        "client": facts.client,
        "method": scope["method"],
        "path": scope["path"][:256],
        "status": sent.status,
        "seconds": round(time.perf_counter() - facts.started, 4),
        "bytes": sent.bytes,
        **facts.more,
    }
    return json.dumps(line)


@contextmanager
def access_log(stream: TextIO | None = None) -> Iterator[None]:
    """Writes the access log on ``stream`` (None: standard output) within the block, in a thread of
    the log."""
    writer = _Writer(stream or sys.stdout)
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_LINES)
    handler = _Dropping(lines)
    listener = logging.handlers.QueueListener(lines, writer)
    access_logger.addHandler(handler)
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False
    listener.start()
    try:
        yield
    finally:
        access_logger.removeHandler(handler)
        listener.stop()


class _Writer(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A pipe that nobody reads any more: nobody misses the line."""


class _Dropping(logging.handlers.QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return
