"""The application: routers, error handlers and middlewares over one session."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ktrt import __version__
from ktrt.config.check import shown
from ktrt.serve import health
from ktrt.serve.access import Access
from ktrt.serve.anthropic import messages
from ktrt.serve.errors import ApiError, error_response, error_responses
from ktrt.serve.limits import Body, Guard
from ktrt.serve.openai import chat, completions, models, responses
from ktrt.serve.page import router as page
from ktrt.serve.server import Server
from ktrt.serve.vllm import adapters, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from ktrt.serve.settings import ServeSettings
    from ktrt.session import Session

logger = logging.getLogger(__name__)


def create_app(session: Session, settings: ServeSettings) -> FastAPI:
    """Returns the application; ``app.state.server`` is its ``Server``. The caller closes
    ``session``."""
    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(
        title="ktrt", version=__version__, docs_url=None, redoc_url=None,
        root_path=settings.root_path,
    )  # fmt: skip
    app.state.server = Server(session, settings)
    for router in (
        models.router, chat.router, completions.router, responses.router, adapters.router,
        tokens.router, page.router, health.router,
    ):  # fmt: skip
        app.include_router(router, responses=error_responses())
    app.include_router(messages.router, responses=error_responses("/v1/messages"))
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    # From the inside to the outside.
    app.add_middleware(Body, settings=settings)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Access)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"],
            allow_headers=["*"], expose_headers=["Retry-After", "X-Request-Id"],
        )  # fmt: skip
    return app


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status == 500:
        cause = error.__cause__ or error
        logger.error(
            "Request %s %s failed", request.state.request_id, request.url.path, exc_info=cause
        )
    return error_response(error, request.url.path, request.state.request_id)


async def _refused(request: Request, error: Exception) -> Response:
    """A path or method that does not exist, or a body that FastAPI cannot read."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    text = f"{error.detail}: {request.method} {path[:200]}"
    found = ApiError(error.status_code, text)
    response = error_response(found, path, request.state.request_id)
    response.headers.update(error.headers or {})
    return response


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if any(each["loc"] == ("body",) for each in errors) and not _is_json(request):
        found = ApiError(
            400, "the body is no JSON: send `Content-Type: application/json` and a JSON object"
        )
    else:
        found = _as_invalid(errors)
    return error_response(found, request.url.path, request.state.request_id)


def _is_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "").lower()


def _as_invalid(errors: Sequence[Any]) -> ApiError:
    """Returns the error for what pydantic found: the first field's, with what was found there."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is no JSON: {reason} at character {first['loc'][-1]}")
    place = ".".join(str(each) for each in first["loc"][1:]) or "body"
    found = "" if first["type"] == "missing" else f", found {shown(first.get('input'))}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}{found}{more}", param=place)
