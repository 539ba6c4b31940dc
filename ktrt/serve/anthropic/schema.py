"""Requests and responses of Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ktrt.serve.openai.schema import JsonObject, described

_OBJECT = {"type": "object"}
_BLOCKS = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_CONTENT = {"anyOf": [{"type": "string"}, _BLOCKS]}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": _CONTENT},
}
Content = Annotated[Any, described({"type": "string"}, _BLOCKS, {"type": "null"})]
Messages = Annotated[Any, described({"type": "array", "minItems": 1, "items": _MESSAGE})]
Tools = Annotated[Any, described({"type": "array", "items": _OBJECT}, {"type": "null"})]


class PromptRequest(BaseModel):
    """The fields that the prompt depends on. ``adapter_weights`` is ktrt's: a weighted sum of
    adapters, with the base as ``model``. Fields that are unknown here are ignored; fields that
    would change the answer and are not implemented get an error."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: Messages
    system: Content = None
    tools: Tools = None
    tool_choice: JsonObject | None = None
    thinking: JsonObject | None = None
    output_config: JsonObject | None = None
    adapter_weights: dict[str, float] | None = None


class MessagesRequest(PromptRequest):
    """A conversation to continue; a last message of the assistant is the begin of the answer."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)


class TextBlock(BaseModel):
    """Text of the answer."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingBlock(BaseModel):
    """The model's thought. There is nothing to be proved by ``signature``, which is empty."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(BaseModel):
    """A call of one of the request's tools."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    """The prompt has ``input_tokens``, which were computed, and ``cache_read_input_tokens``, which
    an earlier request had computed."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class Message(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """The tokens of a prompt."""

    input_tokens: int
