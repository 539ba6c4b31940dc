"""Errors of the HTTP APIs: one exception, rendered in the shape of the API of a path."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from ktrt.errors import AdapterBusyError, AdapterError, ConfigError, EngineError, KtrtError

if TYPE_CHECKING:
    from collections.abc import Mapping

_ANTHROPIC_PATH = "/v1/messages"
# Anthropic's names of the kinds of errors; other codes are "invalid_request_error".
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that gets an error response.

    ``kind``, ``param`` and ``code`` are OpenAI's ``type``, ``param`` and ``code``; ``retry_after``
    is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.kind, self.param, self.code = kind, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class ErrorDetail(BaseModel):
    """OpenAI's ``error``."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's response to a request with an error."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """Anthropic's ``error``."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """Anthropic's response to a request with an error."""

    type: str
    error: AnthropicErrorDetail
    request_id: str | None = None


def error_responses(path: str = "") -> dict[int | str, dict[str, Any]]:
    """Returns FastAPI's ``responses`` for the errors of the API of ``path``."""
    model = AnthropicErrorBody if path.startswith(_ANTHROPIC_PATH) else ErrorBody
    return {
        "4XX": {"model": model, "description": "The request cannot be answered."},
        "5XX": {"model": model, "description": "The server cannot answer now."},
    }


def as_api_error(error: BaseException) -> ApiError:
    """Returns the error response that an exception stands for."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, AdapterBusyError):
        return ApiError(409, str(error), code="adapter_in_use")
    if isinstance(error, AdapterError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, EngineError):
        return ApiError(500, "the engine failed; the server's log says where", kind="server_error")
    if isinstance(error, KtrtError):
        return ApiError(503, str(error), kind="server_error")
    if isinstance(error, MemoryError):
        return ApiError(503, "there is not enough memory for this request", kind="server_error")
    return ApiError(500, "an internal error; the server's log says where", kind="server_error")


def error_body(error: ApiError, path: str, request_id: str | None = None) -> Mapping[str, object]:
    """Returns an error in the shape of the API that ``path`` belongs to."""
    message = error.message.encode("utf-8", "replace").decode()  # lone surrogates of the request
    if path.startswith(_ANTHROPIC_PATH):
        kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error")
        body: dict[str, object] = {"type": "error", "error": {"type": kind, "message": message}}
        return body | ({"request_id": request_id} if request_id else {})
    return {
        "error": {
            "message": message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError, path: str, request_id: str | None = None) -> JSONResponse:
    """Returns the response for an error."""
    body = error_body(error, path, request_id)
    return JSONResponse(body, status_code=error.status, headers=error.headers)
