"""Request and response of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ktrt.serve.openai.schema import JsonObject, SamplingRequest, described
from ktrt.serve.openai.schema_chat import ToolChoice, Tools, TopLogprob

Input = Annotated[
    Any, described({"type": "string"}, {"type": "array", "items": {"type": "object"}})
]


class ResponsesRequest(SamplingRequest):
    """A conversation to continue, as items. Nothing is stored: ``input`` holds all of it, and
    ``previous_response_id`` gets an error."""

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    text: JsonObject | None = None
    reasoning: JsonObject | None = None
    chat_template_kwargs: JsonObject | None = None
    enable_thinking: bool | None = None
    previous_response_id: str | None = None
    truncation: str | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None


class OutputLogprob(TopLogprob):
    """A token of the text with the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class OutputText(BaseModel):
    """A message's only part."""

    type: Literal["output_text"]
    text: str
    annotations: list[JsonObject]
    logprobs: list[OutputLogprob]


class OutputMessage(BaseModel):
    """The answer's text."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ReasoningText(BaseModel):
    """The text of a thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(BaseModel):
    """The model's thought."""

    id: str
    type: Literal["reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[JsonObject]
    content: list[ReasoningText]


class FunctionCallItem(BaseModel):
    """A call of one of the request's functions."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(BaseModel):
    """``cached_tokens``: tokens of the prompt that an earlier request had computed."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """``reasoning_tokens``: tokens of thoughts."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """The tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class ResponseObject(BaseModel):
    """The whole response. With ``stream`` it comes as OpenAI's events."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | ReasoningItem | FunctionCallItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: JsonObject
    store: Literal[False]
    background: Literal[False]
    temperature: float
    text: JsonObject
    tool_choice: str | JsonObject
    tools: list[JsonObject]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
