"""Request and responses of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ktrt.serve.openai.schema import (
    JsonObject,
    SamplingRequest,
    StreamOptions,
    Usage,
    described,
)

_OBJECT = {"type": "object"}
_NULL = {"type": "null"}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": _OBJECT}, _NULL],
        },
        "name": {"type": ["string", "null"]},
        "tool_calls": {"anyOf": [{"type": "array", "items": _OBJECT}, _NULL]},
        "tool_call_id": {"type": ["string", "null"]},
        "reasoning_content": {"type": ["string", "null"]},
    },
}
Messages = Annotated[Any, described({"type": "array", "minItems": 1, "items": _MESSAGE})]
Tools = Annotated[Any, described({"type": "array", "items": _OBJECT}, _NULL)]
ToolChoice = Annotated[Any, described({"enum": ["none", "auto", "required"]}, _OBJECT, _NULL)]


class ChatRequest(SamplingRequest):
    """A conversation to continue. Fields that are unknown here are ignored; fields that would
    change the answer and are not implemented get an error."""

    messages: Messages
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: JsonObject | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: JsonObject | None = None
    enable_thinking: bool | None = None


class FunctionCall(BaseModel):
    """``arguments``: JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of one of the request's functions."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    """``content`` null: the message consists of tool calls. ``reasoning`` equals
    ``reasoning_content``: clients know one name or the other."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(BaseModel):
    """``token``: the text, or escaped bytes of a part of a character. ``bytes`` null: the tokenizer
    does not say."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token with the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of the answer, thoughts and calls included, without the one that ended it."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The whole response. With ``stream`` it comes as events ``chat.completion.chunk``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    service_tier: str | None = None
