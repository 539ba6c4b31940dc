"""Anthropic's requests as conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ktrt.serve.anthropic.schema import MessagesRequest
from ktrt.serve.errors import ApiError
from ktrt.serve.openai.conversation import Conversation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.serve.anthropic.schema import PromptRequest
    from ktrt.serve.server import Server

# Between the texts of neighbouring messages of one role, and of one message's blocks.
_MESSAGES, _BLOCKS = "\n\n", "\n"
_ROLES = ("system", "user", "assistant")
# Fields that change the answer and that are not implemented, and what to do.
_REFUSED = {
    "container": "there is nothing that runs code; define tools",
    "context_management": "shorten the conversation",
    "mcp_servers": "define their tools",
}
_TEXT_ONLY = "ktrt reads text only"


def conversation_of(server: Server, request: PromptRequest) -> Conversation:
    """Returns the conversation that a request means, without the begin of the answer that it may
    have (``answer_begin``). ``ApiError`` names a field that does not fit."""
    for name, value in (request.model_extra or {}).items():
        if name in _REFUSED and value:
            raise ApiError(400, f"{name} is not supported: {_REFUSED[name]}", param=name)
    adapter = server.names.resolve(request.model, request.adapter_weights)
    tools = _tools(request.tools)
    choice, function, parallel = _tool_choice(request.tool_choice, [_name(each) for each in tools])
    return Conversation(
        adapter=adapter,
        messages=_messages(request),
        sampling=_sampling(request) if isinstance(request, MessagesRequest) else {},
        tools=tools,
        tool_choice=choice,
        function=function,
        parallel_tool_calls=parallel,
        response_format=_response_format(request.output_config),
        thinking=_thinking(request.thinking),
    )


def answer_begin(request: PromptRequest) -> str:
    """Returns the text of a last message of the assistant: the answer continues it."""
    last = request.messages[-1]
    if last["role"] != "assistant":
        return ""
    text = _texts("messages[-1].content", last["content"])
    if text != text.rstrip():
        raise _wrong("messages[-1].content", "text without white space at its end", text[-20:])
    return text


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    if not all(request.stop_sequences or ()):
        raise _wrong("stop_sequences", "texts that are not empty", request.stop_sequences)
    options = {
        "max_new_tokens": request.max_tokens,
        "stop": request.stop_sequences or None,
        "temperature": request.temperature,
        # A YAML with do_sample false is greedy by default, not by force.
        "do_sample": True if request.temperature else None,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
    }
    return {name: value for name, value in options.items() if value is not None}


# ---- messages


def _messages(request: PromptRequest) -> list[dict[str, Any]]:
    """Returns the messages in OpenAI's form."""
    if not isinstance(request.messages, list) or not request.messages:
        raise _wrong("messages", "a list of messages, not empty", request.messages)
    found: list[dict[str, Any]] = []
    if request.system:
        _add(found, "system", _texts("system", request.system))
    names: dict[str, str] = {}
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise _wrong(where, f"a role ({', '.join(_ROLES)}) and content", message)
        role, content = message["role"], f"{where}.content"
        if role == "assistant":
            calls_or_text = _assistant(content, message.get("content"), names)
            if index < len(request.messages) - 1:
                found.append(calls_or_text)
            elif "tool_calls" in calls_or_text:
                raise _wrong(content, "results of the calls after them", "calls at the end")
        elif role == "user":
            _add_user(found, content, message.get("content"), names)
        else:
            _add(found, role, _texts(content, message.get("content")))
    if not found or found[-1]["role"] not in ("user", "tool"):
        raise _wrong("messages", "a message of the user to answer", "none")
    return found


def _add(found: list[dict[str, Any]], role: str, text: str) -> None:
    """Appends a text, to the message before it where that has the same role."""
    if found and found[-1]["role"] == role:
        found[-1]["content"] += _MESSAGES + text
    else:
        found.append({"role": role, "content": text})


def _add_user(
    found: list[dict[str, Any]], where: str, content: object, names: Mapping[str, str]
) -> None:
    """Appends results of tools, then the user's text."""
    texts = []
    for place, kind, block in _blocks(where, content):
        if kind == "tool_result":
            call = block.get("tool_use_id")
            if not isinstance(call, str) or call not in names:
                raise _wrong(f"{place}.tool_use_id", "the id of a tool_use before it", call)
            inner = block.get("content")
            text = _texts(f"{place}.content", inner) if inner else ""
            if block.get("is_error"):
                text = f"Error: {text}"
            found.append(
                {"role": "tool", "tool_call_id": call, "name": names[call], "content": text}
            )
        elif kind == "text":
            texts.append(_text(place, block))
        else:
            raise _wrong(f"{place}.type", f"text or tool_result ({_TEXT_ONLY})", kind)
    if texts:
        _add(found, "user", _BLOCKS.join(texts))


def _assistant(where: str, content: object, names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for place, kind, block in _blocks(where, content):
        if kind == "text":
            texts.append(_text(place, block))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            call = _call(place, block)
            names[call["id"]] = call["function"]["name"]
            calls.append(call)
        else:
            raise _wrong(f"{place}.type", "text, thinking or tool_use", kind)
    found: dict[str, Any] = {"role": "assistant", "content": _BLOCKS.join(texts)}
    if any(thoughts):
        found["reasoning_content"] = _BLOCKS.join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found


def _call(where: str, block: Mapping[str, Any]) -> dict[str, Any]:
    given, name, arguments = block.get("id"), block.get("name"), block.get("input")
    if not (isinstance(given, str) and isinstance(name, str) and isinstance(arguments, Mapping)):
        raise _wrong(where, "id, name and input (an object)", dict(block))
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": given, "type": "function", "function": function}


def _blocks(where: str, content: object) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """Yields (place, type, block); a text is one block."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise _wrong(where, "a text or a list of blocks, not empty", content)
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(kind, str):
            raise _wrong(place, "a block with a type", block)
        yield place, kind, block


def _texts(where: str, content: object) -> str:
    """Returns the text of blocks that must all be text."""
    texts = []
    for place, kind, block in _blocks(where, content):
        if kind != "text":
            raise _wrong(f"{place}.type", f"text ({_TEXT_ONLY})", kind)
        texts.append(_text(place, block))
    return _BLOCKS.join(texts)


def _text(where: str, block: Mapping[str, Any]) -> str:
    text = block.get("text")
    if not isinstance(text, str) or not text:
        raise _wrong(f"{where}.text", "text, not empty", text)
    return text


# ---- tools, thinking, formats


def _tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise _wrong("tools", "a list", tools)
    return [_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def _tool(where: str, tool: object) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") not in (None, "custom"):
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        raise _wrong(where, "a tool with name and input_schema; this server runs none itself", kind)
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), Mapping):
        raise _wrong(where, "name and input_schema (an object)", dict(tool))
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _tool_choice(
    choice: Mapping[str, Any] | None, tools: Sequence[str]
) -> tuple[str, str | None, bool]:
    """Returns OpenAI's choice, the tool to call, and whether several may be called."""
    if choice is None:
        return "auto", None, True
    kind, parallel = choice.get("type"), not choice.get("disable_parallel_tool_use")
    if kind in ("any", "tool") and not tools:
        raise _wrong("tool_choice", f"tools next to {kind}", "none")
    if kind == "tool":
        name = choice.get("name")
        if name not in tools:
            raise _wrong("tool_choice.name", f"one of the tools ({', '.join(tools)})", name)
        return "required", name, parallel
    if kind not in ("auto", "any", "none"):
        raise _wrong("tool_choice.type", "auto, any, tool or none", kind)
    return {"auto": "auto", "any": "required", "none": "none"}[str(kind)], None, parallel


def _thinking(thinking: Mapping[str, Any] | None) -> bool | None:
    """Returns the switch. The model ends its thoughts itself, whatever ``budget_tokens`` says."""
    if thinking is None:
        return None
    kind = thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise _wrong("thinking.type", "enabled, disabled or adaptive", kind)
    return {"enabled": True, "disabled": False, "adaptive": None}[str(kind)]


def _response_format(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    form = (config or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping) or form.get("type") != "json_schema":
        raise _wrong("output_config.format", "type json_schema", form)
    schema = form.get("schema")
    if not isinstance(schema, Mapping):
        raise _wrong("output_config.format.schema", "a JSON schema", schema)
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": schema}}


def _wrong(where: str, expected: str, found: object) -> ApiError:
    return ApiError(400, f"{where}: expected {expected}, found {found!r:.80}", param=where)
