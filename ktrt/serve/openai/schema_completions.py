"""Request and response of /v1/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ktrt.serve.openai.schema import (
    JsonObject,
    Prompt,
    SamplingRequest,
    StreamOptions,
    Usage,
)


class CompletionRequest(SamplingRequest):
    """Prompts to continue: a text, token ids, or a list of one of them.

    ``add_special_tokens``: whether a text gets the tokenizer's BOS, never twice. ``echo`` puts the
    prompt in front of the text; with ``logprobs`` its tokens are scored, too.
    """

    prompt: Prompt
    n: int | None = Field(None, ge=1, le=128)
    best_of: int | None = Field(None, ge=0, le=128)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool = True
    response_format: JsonObject | None = None


class CompletionLogprobs(BaseModel):
    """One entry for each token, the one that ended the text included. The first token of an echoed
    prompt has no log probability. ``text_offset``: where the token begins in ``text``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text; ``index`` counts the choices of the first prompt first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The whole response. With ``stream`` it comes in parts, as events of the same form."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None
