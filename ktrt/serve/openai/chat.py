"""Route: /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktrt import __version__
from ktrt.prompt.reply import Content, Reasoning, ToolCallStart
from ktrt.serve.errors import ApiError, error_body
from ktrt.serve.openai.constraints import with_least_length
from ktrt.serve.openai.conversation import (
    Conversation,
    choose_tools,
    prepare_in_thread,
    readable_messages,
    thinking_switch,
)
from ktrt.serve.openai.reply import usage
from ktrt.serve.openai.sampling import sampling_options
from ktrt.serve.openai.schema import refuse_unknown_effects
from ktrt.serve.openai.schema_chat import ChatCompletion, ChatRequest
from ktrt.serve.openai.stream import (
    DONE,
    STREAMED,
    encode,
    event,
    event_stream,
    failure,
    unless_gone,
)
from ktrt.serve.server import Server, get_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from ktrt.generate.response import TokenResponse
    from ktrt.prompt.reply import Event
    from ktrt.serve.generation import Generation
    from ktrt.serve.openai.reply import Reply
    from ktrt.serve.openai.schema import StreamOptions

router = APIRouter()
PATH = "/v1/chat/completions"
FINGERPRINT = f"ktrt-{__version__}"


@router.post(
    PATH,
    response_model=ChatCompletion,
    responses=STREAMED,
)
async def chat_completions(
    body: ChatRequest, request: Request, server: Annotated[Server, Depends(get_server)]
) -> Response:
    """Answers a conversation, whole or (``stream``) in pieces."""
    conversation = chat_conversation(server, body)
    prepared = await prepare_in_thread(server, conversation)
    asked = with_least_length(prepared.asked, body, server.session.end_ids)
    replies = [prepared.new_reply() for _ in range(conversation.n)]
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model,
        "system_fingerprint": FINGERPRINT,
    }  # fmt: skip
    if body.stream:
        chunks = _Chunks(replies, head, body.stream_options)
        return await event_stream(server.generate(asked), chunks.events)

    async def whole() -> None:
        async with server.generate(asked) as generation:
            async for index, token in generation:
                if not replies[index].ended:
                    replies[index].push(token)
                if all(each.ended for each in replies):
                    return

    await unless_gone(request.receive, whole())
    scored = bool(body.logprobs)
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [_choice(place, each, scored) for place, each in enumerate(replies)],
            "usage": usage(replies),
        }
    )


def chat_conversation(server: Server, body: ChatRequest) -> Conversation:
    """Returns the conversation of a request. ``ApiError`` 400 names a field that does not fit."""
    refuse_unknown_effects(body.model_extra)
    tools, choice, function = choose_tools(body.tools, body.tool_choice)
    sampling = sampling_options(body)
    if (most := _most_tokens(body)) is not None:
        sampling["max_new_tokens"] = most
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, f"top_logprobs: expected logprobs true next to it, found {body.logprobs}",
            param="top_logprobs",
        )  # fmt: skip
    if body.logprobs is not None:
        sampling |= {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs or 0}
    thinking = thinking_switch(
        body.chat_template_kwargs, body.reasoning_effort, body.enable_thinking
    )
    return Conversation(
        adapter=server.names.resolve(body.model, body.adapter_weights),
        messages=readable_messages(body.messages),
        sampling=sampling,
        tools=tools,
        tool_choice=choice,
        function=function,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=body.response_format,
        thinking=thinking,
        n=body.n or 1,
    )


def _most_tokens(body: ChatRequest) -> int | None:
    first, second = body.max_completion_tokens, body.max_tokens
    if first is not None and second not in (None, first):
        raise ApiError(
            400, f"max_completion_tokens ({first}) and max_tokens ({second}, its old name) differ; "
            "keep one of them", param="max_tokens",
        )  # fmt: skip
    return second if first is None else first


def _choice(index: int, reply: Reply, scored: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.reasoning:
        message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
    if reply.calls:
        message |= {"tool_calls": reply.calls, "content": reply.content or None}
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": reply.logprobs, "refusal": None} if scored else None,
        "finish_reason": reply.finish_reason,
    }


class _Chunks:
    """The events of a stream."""

    def __init__(
        self, replies: list[Reply], head: dict[str, Any], options: StreamOptions | None
    ) -> None:
        self._replies = replies
        # Every chunk begins with it.
        self._head = encode({**head, "object": "chat.completion.chunk"})[:-1]
        self._totals = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)

    async def events(self, generation: Generation) -> AsyncGenerator[str]:
        """Yields the events, to the last."""
        for index in range(len(self._replies)):
            yield self._chunk([_delta(index, {"role": "assistant"})])
        try:
            async for index, token in generation:
                found = "".join([self._chunk([choice]) for choice in self._grow(index, token)])
                if found:
                    yield found
                if all(each.ended for each in self._replies):
                    break
            if self._totals:
                yield self._chunk([], last=True)
        except Exception as error:  # noqa: BLE001 - the status was sent: the error is an event
            yield event(error_body(failure(error), PATH))
        yield DONE

    def _grow(self, index: int, token: TokenResponse) -> Iterator[dict[str, Any]]:
        """Yields the choices of the chunks that a token completes."""
        reply = self._replies[index]
        if reply.ended:
            return
        deltas = [delta_of(each) for each in reply.push(token)]
        scores = reply.new_logprobs()
        if scores and not deltas:
            deltas = [{}]
        for delta in deltas:
            yield _delta(index, delta, scores)
            scores = []
        if reply.ended:
            yield _delta(index, {}, reason=reply.finish_reason)

    def _chunk(self, choices: list[dict[str, Any]], *, last: bool = False) -> str:
        more = ""
        if self._always or last:
            more = f',"usage":{encode(usage(self._replies))}'
        elif self._totals:
            more = ',"usage":null'
        return f'data: {self._head},"choices":{encode(choices)}{more}}}\n\n'


def delta_of(each: Event) -> dict[str, Any]:
    """Returns an event of a reply as a delta."""
    if isinstance(each, Content):
        return {"content": each.text}
    if isinstance(each, Reasoning):
        return {"reasoning_content": each.text, "reasoning": each.text}
    call: dict[str, Any] = {"index": each.index}
    if isinstance(each, ToolCallStart):
        call |= {"id": each.id, "type": "function"}
        call["function"] = {"name": each.name, "arguments": ""}
    else:
        call["function"] = {"arguments": each.text}
    return {"tool_calls": [call]}


def _delta(
    index: int,
    delta: dict[str, Any],
    scores: list[dict[str, Any]] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    logprobs = {"content": scores, "refusal": None} if scores else None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
