"""Route: /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktrt.serve.errors import ApiError, error_body
from ktrt.serve.generation import Asked
from ktrt.serve.openai.chat import FINGERPRINT
from ktrt.serve.openai.constraints import with_least_length
from ktrt.serve.openai.prompts import Prompt, read_prompts
from ktrt.serve.openai.sampling import sampling_options
from ktrt.serve.openai.schema import refuse_unknown_effects
from ktrt.serve.openai.schema_completions import Completion, CompletionRequest
from ktrt.serve.openai.stream import (
    DONE,
    STREAMED,
    EventStream,
    event,
    failure,
    merged,
    unless_gone,
)
from ktrt.serve.openai.text import Text, TextMaker
from ktrt.serve.server import Server, get_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from ktrt.serve.generation import Generation
    from ktrt.serve.openai.schema import StreamOptions

router = APIRouter()
PATH = "/v1/completions"
# OpenAI's default.
_MAX_TOKENS = 16


@router.post(
    PATH,
    response_model=Completion,
    responses=STREAMED,
)
async def completions(
    body: CompletionRequest, request: Request, server: Annotated[Server, Depends(get_server)]
) -> Response:
    """Continues one prompt or several, whole or (``stream``) in pieces."""
    asked = await _asked(server, body)
    maker = TextMaker(server, echo=bool(body.echo), scored=body.logprobs is not None)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": body.model, "system_fingerprint": FINGERPRINT,
    }  # fmt: skip
    n = body.n or 1
    prompts = [each for each, _ in asked]
    context = AsyncExitStack()
    try:
        generations = [
            await context.enter_async_context(server.generate(each)) for _, each in asked
        ]
    except BaseException:
        await context.aclose()
        raise
    run = _Run(generations, [[maker.text(p) for _ in range(n)] for p in prompts])
    if body.stream:
        return EventStream(run.chunks(head, body.stream_options), context)
    async with context:
        await unless_gone(request.receive, run.whole())
    choices = [
        {
            "index": index, "text": each.text, "logprobs": each.logprobs(),
            "finish_reason": each.finish_reason,
        }
        for index, each in enumerate(run.texts)
    ]  # fmt: skip
    return JSONResponse({**head, "choices": choices, "usage": run.usage()})


async def _asked(server: Server, body: CompletionRequest) -> list[tuple[Prompt, Asked]]:
    """Returns the request of each prompt."""
    refuse_unknown_effects(body.model_extra)
    _check(body)
    adapter = server.names.resolve(body.model, body.adapter_weights)
    read = partial(
        read_prompts, server.session, body.prompt, add_special_tokens=body.add_special_tokens
    )
    prompts = await asyncio.get_running_loop().run_in_executor(server.threads, read)
    n, room = body.n or 1, server.admission.most_of_client
    if len(prompts) * n > room:
        raise ApiError(
            400, f"prompt: expected {room // n} prompts or fewer with n {n}, found {len(prompts)}",
            param="prompt",
        )  # fmt: skip
    sampling = sampling_options(body)
    most = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling["max_new_tokens"] = most
    scores = body.logprobs if body.echo else None
    if body.logprobs is not None:
        sampling |= {"logprobs": True, "top_logprobs": body.logprobs}
    if most == 0 and scores is None:
        scores = 0
    return [
        (
            each,
            with_least_length(
                Asked(
                    adapter=adapter, prompt_ids=each.ids, sampling=sampling,
                    prompt_logprobs=scores, n=n if most else 1,
                ),
                body, server.session.end_ids,
            ),
        )
        for each in prompts
    ]  # fmt: skip


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise ApiError(
            400, "suffix is not supported: this model continues a text, it fills no gap",
            param="suffix",
        )  # fmt: skip
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            400, f"best_of: expected n ({body.n or 1}) or nothing, found {body.best_of}: ask for n "
            "choices and choose by their logprobs", param="best_of",
        )  # fmt: skip
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens: expected 1 or more, found 0 without echo", param="max_tokens"
        )
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise ApiError(
            400, "response_format is supported by /v1/chat/completions only",
            param="response_format",
        )  # fmt: skip


class _Run:
    """The generations of all prompts, each with the texts of its choices."""

    def __init__(self, generations: list[Generation], texts: list[list[Text]]) -> None:
        self._generations, self._texts = generations, texts
        self.texts = [each for choices in texts for each in choices]

    async def whole(self) -> None:
        """Waits for all texts."""
        async for _ in self._grow():
            pass

    async def _grow(self) -> AsyncIterator[tuple[int, Text]]:
        """Yields (index, text) for every text that has grown."""
        n = len(self._texts[0])
        async for place, found in merged(list(map(_with_end, self._generations))):
            if found is None:  # the prompt was all
                for index, text in enumerate(self._texts[place]):
                    text.end(self._generations[place].prompt_logprobs)
                    yield place * n + index, text
                continue
            choice, token = found
            text = self._texts[place][choice]
            text.push(token, self._generations[place].prompt_logprobs)
            yield place * n + choice, text

    def usage(self) -> dict[str, Any]:
        """Returns the usage so far."""
        first = [choices[0] for choices in self._texts]
        prompt = sum(len(each.prompt.ids) for each in first)
        generated = sum(each.generated for each in self.texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(each.reused for each in first)},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    async def chunks(
        self, head: dict[str, Any], options: StreamOptions | None
    ) -> AsyncGenerator[str]:
        """Yields the events of a stream."""
        totals = bool(options and options.include_usage)
        always = bool(options and options.continuous_usage_stats)
        try:
            async for index, text in self._grow():
                choice = {"index": index, **text.news(), "finish_reason": text.finish_reason}
                if not (choice["text"] or choice["logprobs"] or choice["finish_reason"]):
                    continue
                found = {**head, "choices": [choice]}
                if totals or always:
                    found["usage"] = self.usage() if always else None
                yield event(found)
            if totals:
                yield event({**head, "choices": [], "usage": self.usage()})
        except Exception as error:  # noqa: BLE001 - the status was sent: the error is an event
            yield event(error_body(failure(error), PATH))
        yield DONE


async def _with_end(generation: Generation) -> AsyncGenerator[tuple[int, Any] | None]:
    """Yields the tokens; None if there are none."""
    empty = True
    async for each in generation:
        empty = False
        yield each
    if empty:
        yield None
