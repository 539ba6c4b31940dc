"""The router: reads which model a request asks for, and passes the request on to a replica."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.middleware.cors import CORSMiddleware

from ktrt.serve.access import Access, access_log
from ktrt.serve.errors import ApiError, error_body
from ktrt.serve.limits import ADMIN_PATHS, Body, Guard
from ktrt.serve.ray.arguments import read_arguments
from ktrt.serve.ray.metrics import joined_metrics
from ktrt.serve.ray.replica import REPLICA_HEADER
from ktrt.serve.settings import ServeSettings, is_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# The members of an ASGI scope that a replica's application reads; others hold objects of the
# router's process.
_SENT = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string",
    "root_path", "headers", "client", "server",
)  # fmt: skip


class Entrance:
    """The ASGI application that Ray calls: passes requests to the router of its process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await serve.get_replica_context().servable_object.enter(scope, receive, send)
            return
        while scope["type"] == "lifespan":
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


class Router:
    """Checks keys and limits, as the application does, and passes requests to the replicas."""

    def __init__(self, args: Mapping[str, Any], model: Any) -> None:
        """``model``: the handle of the other deployment."""
        self._model = model
        _, settings = read_arguments(args)
        self._settings = settings
        guarded = Guard(Body(self._forward, settings), settings)
        self._app: ASGIApp = Access(_Local(guarded, settings))
        if settings.cors_origins:
            self._app = CORSMiddleware(
                self._app, allow_origins=settings.cors_origins, allow_methods=["*"],
                allow_headers=["*"], expose_headers=["Retry-After", "X-Request-Id"],
            )  # fmt: skip
        self._log = ExitStack()
        if settings.access_log:
            self._log.enter_context(access_log())

    def __del__(self) -> None:
        if hasattr(self, "_log"):
            self._log.close()

    async def enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        await self._app(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on a request whose body ``Body`` has read."""
        body = (await receive())["body"]
        sent = {name: scope[name] for name in _SENT if name in scope}
        sent["headers"] = [
            *(each for each in scope["headers"] if each[0] != b"x-request-id"),
            (b"x-request-id", scope["state"]["request_id"].encode()),
        ]
        if scope["path"] == "/metrics" or scope["path"] in ADMIN_PATHS:
            await self._ask_all(sent, body, send)
        else:
            await self._ask_one(sent, body, send)

    async def _ask_one(self, scope: Scope, body: bytes, send: Send) -> None:
        options: dict[str, Any] = {"stream": True}
        if name := asked_model(body, self._settings.model_name or ""):
            options["multiplexed_model_id"] = name
        response = self._model.options(**options).answer.remote(scope, body)
        sent = _Started(send)
        try:
            async for messages in response:
                for message in messages:
                    await sent(message)
        except (RayError, RayServeException, ConnectionError) as error:
            await sent.fail(_as_api_error(error), scope["path"])
        finally:
            response.cancel()

    async def _ask_all(self, scope: Scope, body: bytes, send: Send) -> None:
        """Asks every replica: for its metrics, or to load or unload an adapter. Sends the first
        refusal if there is one, else the first response."""
        try:
            found = await self._model.broadcast("answer_whole", scope, body).results_async()
        except (RayError, RayServeException, ConnectionError) as error:
            raise _as_api_error(error) from error
        if not found:
            raise _as_api_error(ConnectionError())
        refused = [each for each in found if each[0]["status"] != 200]
        chosen = (refused or found)[0]
        if scope["path"] == "/metrics" and not refused:
            chosen = joined_metrics(found, REPLICA_HEADER)
        elif refused:
            logger.warning("%s: %d of %d replicas refused", scope["path"], len(refused), len(found))
        for message in chosen:
            await send(message)


class _Local:
    """Without a key only programs of this machine may ask: Ray's proxy listens on all addresses
    unless its own settings say otherwise."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if not self._settings.api_key and not (client and is_loopback(client[0])):
            raise ApiError(
                403, "no key is set, so only programs of this machine may ask; set API_KEY in the "
                "environment of `ray start`",
                kind="permission_error",
            )  # fmt: skip
        await self._app(scope, receive, send)


class _Started:
    """Sends messages, and notes what was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._headers: list[tuple[bytes, bytes]] | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._headers = list(message["headers"])
        await self._send(message)

    async def fail(self, error: ApiError, path: str) -> None:
        """Reports that the replica is gone: as a response, as a last event of a stream, or, in the
        middle of another response, by an incomplete one."""
        if self._headers is None:
            raise error
        kind = dict(self._headers).get(b"content-type", b"")
        if not kind.startswith(b"text/event-stream"):
            raise error
        event = b"event: error\n" if path.startswith("/v1/messages") else b""
        data = json.dumps(error_body(error, path)).encode()
        body = b"\n\n" + event + b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        return ApiError(
            429, "the queue is full; try later",
            kind="rate_limit_error", code="queue_full", retry_after=1.0,
        )  # fmt: skip
    lines = str(error).strip().splitlines() or [""]
    logger.warning("A replica failed: %s: %s", type(error).__name__, lines[-1])
    return ApiError(
        503, "the replica that answered has failed; ask again", kind="server_error",
        code="replica_failed", retry_after=1.0,
    )  # fmt: skip


def asked_model(body: bytes, base: str) -> str | None:
    """Returns the adapter or the sum that a request's body names; None for the base, for which any
    replica will do, and for bodies without a model."""
    try:
        content = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None  # the application says what is wrong
    if not isinstance(content, dict):
        return None
    model, weights = content.get("model"), content.get("adapter_weights")
    if isinstance(weights, dict) and weights:
        return json.dumps(weights, sort_keys=True)[:512]
    return model[:512] if isinstance(model, str) and model and model != base else None
