"""The application: routers, error handlers and middlewares over one session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ktrt import __version__
from ktrt.errors import KtrtError
from ktrt.serve import health
from ktrt.serve.anthropic import messages
from ktrt.serve.errors import ApiError, as_api_error, error_response, error_responses
from ktrt.serve.openai import chat, completions, models, responses
from ktrt.serve.page import router as page
from ktrt.serve.server import Server
from ktrt.serve.vllm import adapters, tokens

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from ktrt.serve.settings import ServeSettings
    from ktrt.session import Session


def create_app(session: Session, settings: ServeSettings) -> FastAPI:
    """Returns the application; ``app.state.server`` is its ``Server``. The caller closes
    ``session``."""
    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(title="ktrt", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = Server(session, settings)
    for router in (
        models.router, chat.router, completions.router, responses.router, adapters.router,
        tokens.router, page.router, health.router,
    ):  # fmt: skip
        app.include_router(router, responses=error_responses())
    app.include_router(messages.router, responses=error_responses("/v1/messages"))
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(KtrtError, _failed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(as_api_error(error), request.url.path)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, str(error.detail))
    response = error_response(found, request.url.path)
    response.headers.update(error.headers or {})
    return response


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    place = ".".join(str(each) for each in first["loc"][1:])
    return error_response(
        ApiError(400, f"{place or 'body'}: {first['msg']}", param=place or None), request.url.path
    )
