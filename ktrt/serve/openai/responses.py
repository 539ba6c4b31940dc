"""Route: /v1/responses."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktrt.serve.openai.conversation import prepare_in_thread
from ktrt.serve.openai.reply import usage
from ktrt.serve.openai.response_input import response_conversation
from ktrt.serve.openai.response_items import Items
from ktrt.serve.openai.schema_responses import ResponseObject, ResponsesRequest
from ktrt.serve.openai.stream import STREAMED, event, event_stream, failure, unless_gone
from ktrt.serve.server import Server, get_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from ktrt.serve.errors import ApiError
    from ktrt.serve.generation import Generation
    from ktrt.serve.openai.reply import Reply
    from ktrt.serve.openai.response_items import Emitted

router = APIRouter()
PATH = "/v1/responses"


@router.post(
    PATH,
    response_model=ResponseObject,
    responses=STREAMED,
)
async def responses(
    body: ResponsesRequest, request: Request, server: Annotated[Server, Depends(get_server)]
) -> Response:
    """Answers a conversation, whole or (``stream``) as OpenAI's events. Stores nothing."""
    conversation = response_conversation(server, body)
    prepared = await prepare_in_thread(server, conversation)
    run = _Run(prepared.new_reply(), _head(server, body))
    if body.stream:
        return await event_stream(server.generate(prepared.asked), run.events)

    async def whole() -> None:
        async with server.generate(prepared.asked) as generation:
            async for _ in run.grow(generation):
                pass

    await unless_gone(request.receive, whole())
    return JSONResponse(run.response())


def _head(server: Server, body: ResponsesRequest) -> dict[str, Any]:
    """Returns the fields of the response that the request decides."""
    sampling = server.session.sampling
    temperature, top_p = body.temperature, body.top_p
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "store": False,
        "temperature": sampling.temperature if temperature is None else temperature,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p if top_p is None else top_p,
        "truncation": "disabled",
        "user": body.user,
    }


class _Run:
    """A response as it grows."""

    def __init__(self, reply: Reply, head: dict[str, Any]) -> None:
        self._reply, self._head = reply, head
        self._items = Items()
        self._error: dict[str, str] | None = None
        self._number = 0

    async def grow(self, generation: Generation) -> AsyncIterator[Emitted]:
        """Yields the events of the output's items, to their end."""
        async for _, token in generation:
            found = self._reply.push(token)
            # Tokens without an event wait for the next one.
            scores = self._reply.new_logprobs() if found else ()
            for each in self._items.push(found, scores):
                yield each
            if self._reply.ended:
                break
        for each in self._items.finish(self._status()):
            yield each

    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        reason = self._reply.finish_reason
        return "in_progress" if reason is None else _STATUS.get(reason, "completed")

    def response(self) -> dict[str, Any]:
        """Returns the response so far."""
        status = self._status()
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": self._error,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "output": [] if status == "in_progress" else self._items.output,
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        found = usage([self._reply])
        cached = found["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": found["completion_tokens_details"],
            "total_tokens": found["total_tokens"],
        }

    async def events(self, generation: Generation) -> AsyncGenerator[str]:
        """Yields the events of a stream."""
        yield self._event("response.created", {"response": self.response()})
        yield self._event("response.in_progress", {"response": self.response()})
        try:
            async for name, data in self.grow(generation):
                yield self._event(name, data)
        except Exception as error:  # noqa: BLE001 - the status was sent: the error is an event
            self._error = _error(failure(error))
        yield self._event(f"response.{self._status()}", {"response": self.response()})

    def _event(self, name: str, data: dict[str, Any]) -> str:
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **data}, name)


_STATUS = {"length": "incomplete"}


def _error(error: ApiError) -> dict[str, str]:
    code = "rate_limit_exceeded" if error.status == 429 else "server_error"
    return {"code": code, "message": error.message}
