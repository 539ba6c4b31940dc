"""Fields that the requests and responses of OpenAI's endpoints share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}


def described(*schemas: Mapping[str, Any]) -> WithJsonSchema:
    """Returns the JSON schema of a field that code checks: its messages name what was found, where
    pydantic lists what every member of a union expected."""
    return WithJsonSchema({"anyOf": [dict(each) for each in schemas]})


Texts = Annotated[Any, described({"type": "string"}, _STRINGS, {"type": "null"})]
Prompt = Annotated[
    Any, described({"type": "string"}, _STRINGS, _IDS, {"type": "array", "items": _IDS})
]
Bias = Annotated[
    Any,
    described({"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}),
]
JsonObject = dict[str, Any]


class StreamOptions(BaseModel):
    """Options of a stream; vLLM's ``continuous_usage_stats`` puts the usage into every chunk.
    Members that nobody here knows are tolerated: clients send them to every server."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(BaseModel):
    """How tokens are chosen. A field that is left out has the configured value of the session.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``, ``skip_special_tokens``,
    ``min_tokens`` and ``ignore_eos`` are vLLM's names, ``do_sample`` is LLaMA-Factory's.
    ``adapter_weights``: the weighted sum of adapters that answers, in place of the one that
    ``model`` names.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str = ""
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    do_sample: bool | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts = None
    stop_token_ids: list[int] | None = None
    logit_bias: Bias = None
    skip_special_tokens: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    adapter_weights: dict[str, float] | None = None


class PromptTokensDetails(BaseModel):
    """``cached_tokens``: tokens of the prompt that an earlier request had computed."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """``reasoning_tokens``: tokens of thoughts."""

    reasoning_tokens: int


class Usage(BaseModel):
    """The tokens of a request and of all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


# Fields that change the answer and that are not implemented: their values without effect, and what
# to do. Fields in neither list nor schema are tolerated.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((True,), "an answer is always begun"),
    "allowed_token_ids": (([],), "use logit_bias, stop or response_format"),
    "audio": ((), "answers are text"),
    "bad_words": (([],), "use logit_bias"),
    "cache_salt": (("",), "prompts of all clients share the prefix cache"),
    "chat_template": ((), "the template is a setting of the server"),
    "continue_final_message": ((False,), "send the prompt to /v1/completions"),
    "documents": (([],), "put them into a message"),
    "best_of": ((1,), "use n"),
    "early_stopping": ((False,), "beam search is not implemented"),
    "echo": ((False,), "use /v1/completions"),
    "function_call": (("none",), "use tool_choice"),
    "functions": (([],), "use tools"),
    "guided_choice": (([],), "use response_format with a JSON schema that has an enum"),
    "guided_grammar": ((), "use response_format"),
    "guided_json": ((), "use response_format with a JSON schema"),
    "guided_regex": ((), "use response_format with a JSON schema that has a pattern"),
    "images": (([],), "ktrt reads text"),
    "include_stop_str_in_output": ((False,), "the stop string is never part of the answer"),
    "include_reasoning": ((True,), "thoughts come apart from the answer, as reasoning_content"),
    "kv_transfer_params": (({},), "this server computes the whole answer"),
    "length_penalty": ((1,), "beam search is not implemented"),
    "logits_processors": (([],), "use logit_bias or response_format"),
    "mm_processor_kwargs": (({},), "ktrt reads text"),
    "modalities": ((["text"], []), "answers are text"),
    "priority": ((0,), "clients share the engine fairly"),
    "prompt_embeds": (([],), "send text or token ids"),
    "prompt_logprobs": ((0, False), "use /v1/completions with echo and logprobs"),
    "response_prefix": (("",), "send the prompt to /v1/completions"),
    "return_token_ids": ((False,), "use /tokenize"),
    "return_tokens_as_token_ids": ((False,), "logprobs have the tokens' text and bytes"),
    "structured_outputs": (({},), "use response_format"),
    "thinking_token_budget": ((), "use max_tokens, or switch thinking off"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "typical_p": ((1,), "use top_p or min_p"),
    "use_beam_search": ((False,), "use n"),
    "verbosity": (("medium",), "ask for a length in a message"),
    "vllm_xargs": (({},), "ktrt has no such arguments"),
    "web_search_options": ((), "give a search as one of tools"),
}


def refuse_unknown_effects(fields: Mapping[str, Any] | None) -> None:
    """``ApiError`` 400 names the first of the extra ``fields`` of a request that would change the
    answer if it were implemented."""
    for name, value in (fields or {}).items():
        neutral, advice = _REFUSED.get(name, ((value,), ""))
        if value is not None and value not in neutral:
            raise ApiError(400, f"{name} is not supported: {advice}", param=name)
