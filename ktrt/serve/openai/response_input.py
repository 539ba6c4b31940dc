"""Requests of /v1/responses as conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktrt.serve.errors import ApiError
from ktrt.serve.openai.conversation import (
    Conversation,
    choose_tools,
    readable_messages,
    thinking_switch,
)
from ktrt.serve.openai.sampling import sampling_options
from ktrt.serve.openai.schema import refuse_unknown_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.serve.openai.schema_responses import ResponsesRequest
    from ktrt.serve.server import Server

_LOGPROBS = "message.output_text.logprobs"
# Nothing is encrypted: a thought comes as text, whether it is asked for or not.
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")
# Names of chat completions.
_CHATS = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def response_conversation(server: Server, body: ResponsesRequest) -> Conversation:
    """Returns the conversation of a request. ``ApiError`` 400 names a field that does not fit."""
    refuse_unknown_effects(body.model_extra)
    _refuse_state(body)
    tools, choice, function = choose_tools(chat_tools(body.tools), body.tool_choice)
    sampling = sampling_options(body)
    if body.max_output_tokens is not None:
        sampling["max_new_tokens"] = body.max_output_tokens
    for each in body.include or ():
        if each not in _INCLUDED:
            raise _wrong("include", " or ".join(_INCLUDED), each)
    if body.top_logprobs or _LOGPROBS in (body.include or ()):
        sampling |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise _wrong("reasoning.effort", "text", effort)
    return Conversation(
        adapter=server.names.resolve(body.model, body.adapter_weights),
        messages=readable_messages(_messages(body)),
        sampling=sampling,
        tools=tools,
        tool_choice=choice,
        function=function,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=_response_format(body.text),
        thinking=thinking_switch(body.chat_template_kwargs, effort, body.enable_thinking),
    )


def _refuse_state(body: ResponsesRequest) -> None:
    """Refuses what needs responses that are kept: several processes may serve one address, and a
    restart would forget them."""
    if body.previous_response_id is not None:
        raise ApiError(
            400, "previous_response_id: this server stores no responses; send the earlier items as "
            "input", param="previous_response_id", code="previous_response_not_found",
        )  # fmt: skip
    if body.background:
        raise ApiError(
            400, "background: this server stores no responses; use stream", param="background"
        )
    if body.truncation not in (None, "disabled"):
        raise _wrong("truncation", "'disabled': leave out items of the input", body.truncation)
    for name, own in _CHATS.items():
        if (body.model_extra or {}).get(name) is not None:
            raise ApiError(400, f"{name}: this endpoint's name for it is {own}", param=name)
    if (body.text or {}).get("verbosity") not in (None, "medium"):
        raise _wrong("text.verbosity", "'medium': ask for a length", body.text)
    for name in ("conversation", "prompt", "max_tool_calls", "context_management"):
        if (body.model_extra or {}).get(name) is not None:
            raise ApiError(400, f"{name} is not supported: send all items as input", param=name)


def chat_tools(tools: object) -> object:
    """Returns functions in the form of chat completions, which nests them."""
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": {k: v for k, v in each.items() if k != "type"}}
        if isinstance(each, Mapping) and each.get("type") == "function" and "function" not in each
        else each
        for each in tools
    ]


def _response_format(text: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns the format in the form of chat completions, which nests the schema."""
    given = (text or {}).get("format")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise _wrong("text.format", "a mapping with a type", given)
    if given.get("type") != "json_schema" or "json_schema" in given:
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}


# ---- items


def _messages(body: ResponsesRequest) -> list[Any]:
    """Returns the messages of instructions and input."""
    found: list[Any] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    if not isinstance(body.input, list) or not body.input:
        raise _wrong("input", "text or a list of items, not empty", body.input)
    for index, item in enumerate(body.input):
        _append(found, f"input[{index}]", item)
    return [each for each in found if set(each) != {"role"}]


def _append(found: list[Any], where: str, item: object) -> None:
    """Appends an item. Thought, text and calls of one turn are several items, and one message."""
    if not isinstance(item, Mapping):
        raise _wrong(where, "an item", item)
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") != "assistant":
        found.append({"role": item.get("role"), "content": _content(where, item.get("content"))})
    elif kind == "message":
        text = _content(where, item.get("content"))
        _turn(found, "content")["content"] = text
    elif kind == "reasoning":
        text = _texts(where, item.get("content") or item.get("summary") or [])
        if text:
            _turn(found, "reasoning_content")["reasoning_content"] = text
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _turn(found, "").setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _content(where, item.get("output"))
        found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    else:
        raise _wrong(
            f"{where}: type", "message, reasoning, function_call or function_call_output", kind
        )


def _turn(found: list[Any], key: str) -> dict[str, Any]:
    """Returns the assistant's message that ``key`` belongs to: the last one, or a new one where
    that has the key or something that follows it."""
    order = ["reasoning_content", "content", "tool_calls"]
    later = order[order.index(key) :] if key else []
    last = found[-1] if found else {}
    if last.get("role") != "assistant" or any(each in last for each in later):
        last = {"role": "assistant"}
        found.append(last)
    return last


def _content(where: str, content: object) -> object:
    return _texts(where, content) if isinstance(content, list) else content


def _texts(where: str, parts: Sequence[object]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else part
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise _wrong(f"{where}: content", "parts of text (ktrt reads text only)", kind)
        texts.append(text)
    return "".join(texts)


def _wrong(name: str, expected: str, found: object) -> ApiError:
    return ApiError(
        400, f"{name}: expected {expected}, found {found!r:.80}", param=name.split(":")[0]
    )
