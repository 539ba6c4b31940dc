"""Middlewares that bound what a request may be and do: its keys, hosts, body and time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from ktrt.serve.access import ClientLeftError
from ktrt.serve.errors import ApiError
from ktrt.serve.json_text import check_json
from ktrt.serve.settings import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ktrt.serve.settings import ServeSettings

# Open without a key: the operator's probes, and the page, which asks for the key, with its files.
_OPEN = {"/", "/health", "/ready"}
_ASSETS = "/page/assets/"
# An administrator's.
ADMIN_PATHS = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
# Bodies of the largest size that are held at once: 256 MiB with the default.
_BODIES = 32
_HOST = re.compile(r"\[[0-9a-fA-F:.]+\]|[^:\[\]]+")


class Guard:
    """Refuses requests without the key, and browsers' requests that another site's page caused."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._user = _digest(settings.api_key)
        self._admin = _digest(settings.admin_key)
        self._origins = set(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_size(scope)
            self._check_host(headers)
            self._check_origin(headers)
            self._check_key(headers, _path(scope))
        await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        """Headers that arrive in one piece pass the connection's limit."""
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        most = self._settings.max_header_bytes
        if size > most:
            raise ApiError(431, f"the headers have more than {most} bytes (KTRT_MAX_HEADER_BYTES)")

    def _check_host(self, headers: Headers) -> None:
        """A page of another site can have its name resolved to this machine (DNS rebinding); its
        requests then name that site as their host. With a key they lack the key."""
        if self._settings.api_key or not self._settings.is_loopback:
            return
        found = _HOST.match(headers.get("host", ""))
        name = found[0].lower() if found else ""
        if name and not is_loopback(name) and name not in self._settings.allowed_hosts:
            raise ApiError(
                403, f"the host {name!r} is not this server; KTRT_ALLOWED_HOSTS adds names",
                kind="permission_error",
            )  # fmt: skip

    def _check_origin(self, headers: Headers) -> None:
        """A page of any site can send a request without reading the response: that costs time, and
        loads adapters."""
        origin = headers.get("origin")
        if origin is None or self._settings.api_key or self._origins & {"*", origin}:
            return
        if urlsplit_host(origin) != headers.get("host", "").lower():
            raise ApiError(
                403, "requests of other sites' pages are off; KTRT_CORS_ORIGINS allows origins",
                kind="permission_error",
            )  # fmt: skip

    def _check_key(self, headers: Headers, path: str) -> None:
        if path in _OPEN or path.startswith(_ASSETS):
            return
        given = _digest(_bearer(headers))
        # Both are compared, and digests in constant time: time tells nothing about a key.
        user = hmac.compare_digest(given, self._user)
        admin = hmac.compare_digest(given, self._admin)
        is_admin = admin and bool(self._admin)
        if self._admin and path in ADMIN_PATHS and not is_admin:
            raise ApiError(
                403 if user and self._user else 401, "this needs the administrator's key",
                kind="permission_error" if user and self._user else "authentication_error",
                code="invalid_api_key",
            )  # fmt: skip
        if self._user and not (user or is_admin):
            raise ApiError(
                401, "a wrong key, or none: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                kind="authentication_error", code="invalid_api_key",
            )  # fmt: skip


class Body:
    """Reads a request's body, bounded in size and time, before anything else sees the request;
    ends the request when its client leaves or its time is over."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        # Bytes of the bodies of all requests under way.
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            await self._read(scope, receive, parts)
            parts[:] = [body := b"".join(parts)]
            kind = Headers(scope=scope).get("content-type", "")
            check_json(body, kind, self._settings.max_messages)
            await self._run(scope, receive, send, body)
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> None:
        """Appends a body's pieces to ``parts``. ``ApiError``: it is too large, too slow, or too
        much together with others' bodies."""
        most = self._settings.max_body_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if int(length) > most:
            raise _too_large(most)
        total = 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    parts.append(message.get("body", b""))
                    total += len(parts[-1])
                    self._held += len(parts[-1])
                    if total > most:
                        raise _too_large(most)
                    if self._held > _BODIES * most:
                        raise ApiError(
                            503, "the server holds too many large requests; try again later",
                            kind="server_error", retry_after=1,
                        )  # fmt: skip
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            raise ApiError(
                408, f"the body is not complete after {self._settings.body_seconds:g} s"
            ) from None

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Runs the application as a task, which ends when the client leaves."""
        left, complete = asyncio.Event(), False
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def noting(message: Message) -> None:
            nonlocal complete
            ends = message["type"] == "http.response.body" and not message.get("more_body")
            complete = complete or ends
            await send(message)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not complete:  # servers report a complete response's end the same way
                left.set()
                work.cancel()

        work = asyncio.ensure_future(self._app(scope, replay, noting))
        watcher = asyncio.ensure_future(watch())
        seconds = self._settings.request_seconds
        try:
            await asyncio.wait({work}, timeout=seconds)
            late = not work.done()
        finally:
            # Also where this task is cancelled: the server ends.
            watcher.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        if work.cancelled() and left.is_set():
            raise ClientLeftError
        if work.cancelled() and late:
            raise ApiError(504, f"no answer within {seconds:g} s", kind="server_error")
        work.result()


def urlsplit_host(origin: str) -> str:
    """Returns the host and port of an origin; nothing for one that has none, such as ``null``."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _digest(key: str | None) -> bytes:
    """Returns bytes of one length for any key; none for no key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() if key else b""


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes (KTRT_MAX_BODY_BYTES)")
