"""Routes: Anthropic's messages and the count of their tokens."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktrt.serve.anthropic.blocks import Blocks, stop_of
from ktrt.serve.anthropic.request import answer_begin, conversation_of
from ktrt.serve.anthropic.schema import Message, MessagesRequest, PromptRequest, TokenCount
from ktrt.serve.errors import ApiError, error_body
from ktrt.serve.openai.conversation import prepare
from ktrt.serve.openai.prompts import encode
from ktrt.serve.openai.stream import STREAMED, event, event_stream, failure, unless_gone
from ktrt.serve.server import Server, get_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from ktrt.serve.generation import Asked, Generation
    from ktrt.serve.openai.reply import Reply

T = TypeVar("T")

router = APIRouter()
PATH = "/v1/messages"
# Seconds of silence after which a stream gets a ping: proxies end silent connections.
_SILENCE = 15.0


@router.post(
    PATH,
    response_model=Message,
    responses=STREAMED,
)
async def messages(
    body: MessagesRequest, request: Request, server: Annotated[Server, Depends(get_server)]
) -> Response:
    """Answers a conversation, whole or (``stream``) as Anthropic's events."""
    run = await _prepare_in_thread(server, body)
    if body.stream:
        return await event_stream(server.generate(run.asked), run.events)

    async def whole() -> None:
        async with server.generate(run.asked) as generation:
            async for _ in run.grow(generation):
                pass

    await unless_gone(request.receive, whole())
    return JSONResponse(run.message())


@router.post(f"{PATH}/count_tokens")
async def count_tokens(
    body: PromptRequest, server: Annotated[Server, Depends(get_server)]
) -> TokenCount:
    """Counts the tokens of a conversation's prompt."""
    run = await _prepare_in_thread(server, body)
    return TokenCount(input_tokens=run.input_tokens)


async def _prepare_in_thread(server: Server, body: PromptRequest) -> _Run:
    """Calls ``_prepare`` outside the event loop."""
    call = body.tool_choice is not None and body.tool_choice.get("type") in ("any", "tool")
    threads = server.grammar_threads if call or body.output_config else server.threads
    return await asyncio.get_running_loop().run_in_executor(threads, _prepare, server, body)


def _prepare(server: Server, body: PromptRequest) -> _Run:
    """Checks a request, compiles the grammar that it may need, and renders its prompt."""
    conversation = conversation_of(server, body)
    begin = answer_begin(body)
    if begin:
        if conversation.thinking:
            raise ApiError(
                400, "thinking: expected disabled with a last message of the assistant, which the "
                "answer continues; found enabled", param="thinking",
            )  # fmt: skip
        if conversation.response_format or conversation.tool_choice == "required":
            raise ApiError(
                400, "messages: expected a last message of the user with a format or a call that "
                "the answer must have; found one of the assistant, the answer's begin",
                param="messages",
            )  # fmt: skip
        conversation = replace(conversation, thinking=False)
    prepared = prepare(server, conversation)
    asked = prepared.asked
    ids = server.session.render(asked.messages or (), tools=asked.tools, thinking=asked.thinking)
    if begin:
        ids += encode(server.session, begin, add_special_tokens=False)
    # `message_start` tells the length before anything runs.
    asked = replace(asked, messages=None, tools=None, thinking=None, prompt_ids=ids)
    return _Run(asked, prepared.new_reply(), body.model)


class _Run:
    """A message as it grows."""

    def __init__(self, asked: Asked, reply: Reply, model: str) -> None:
        self.asked, self._reply, self._model = asked, reply, model
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks = Blocks()

    @property
    def input_tokens(self) -> int:
        """The tokens of the prompt."""
        return len(self.asked.prompt_ids or ())

    async def grow(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """Yields the events of the content, to its end."""
        async for _, token in generation:
            for each in self._blocks.push(self._reply.push(token)):
                yield each
            if self._reply.ended:
                break
        for each in self._blocks.end():
            yield each

    def message(self) -> dict[str, Any]:
        """Returns the message so far."""
        reason, sequence = self._stop()
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model,
            "content": self._blocks.content, "stop_reason": reason, "stop_sequence": sequence,
            "usage": self._usage(),
        }  # fmt: skip

    def _stop(self) -> tuple[str | None, str | None]:
        if not self._reply.ended:
            return None, None
        return stop_of(self._reply, self.asked.sampling["max_new_tokens"])

    def _usage(self) -> dict[str, int]:
        last = self._reply.last
        # Known with the first token: `message_start` counts all as computed, `message_delta` what
        # was.
        held = last.reused_tokens if last is not None else 0
        return {
            "input_tokens": self.input_tokens - held,
            "output_tokens": last.generated_tokens if last is not None else 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": held,
        }

    async def events(self, generation: Generation) -> AsyncGenerator[str]:
        """Yields the events of a stream."""
        yield _named({"type": "message_start", "message": {**self.message(), "content": []}})
        yield _named({"type": "ping"})
        try:
            async for each in _with_silences(self.grow(generation), _SILENCE):
                yield _named({"type": "ping"} if each is None else each)
            reason, sequence = self._stop()
            delta = {"stop_reason": reason, "stop_sequence": sequence}
            yield _named({"type": "message_delta", "delta": delta, "usage": self._usage()})
            yield _named({"type": "message_stop"})
        except Exception as error:  # noqa: BLE001 - the status was sent: the error is an event
            yield event(error_body(failure(error), PATH), "error")


def _named(data: dict[str, Any]) -> str:
    return event(data, data["type"])


async def _with_silences(items: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None]:
    """Yields the items, and None after every ``seconds`` without one."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(items))
            await asyncio.wait({waiting}, timeout=seconds)
            if not waiting.done():
                yield None
                continue
            done, waiting = waiting, None
            try:
                item = done.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
