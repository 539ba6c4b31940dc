"""Messages as callers give them: checked, and brought into one form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ktrt.errors import ConfigError
from ktrt.prompt.template.base import Message

_ROLES = ("system", "user", "assistant", "tool")
# The roles that may follow; after an assistant's calls only their results.
_NEXT = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    # Anthropic's clients send a user's text next to the results.
    "tool": ("tool", "assistant", "user"),
}
# OpenAI's name of the system message since 2024.
_OTHER_NAMES = {"developer": "system"}
# Keys next to role and content, and the roles that have them.
_OPTIONAL = {
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "tool_call_id": "tool",
    "name": "tool",
}


def check_messages(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """Returns the messages in one form (see ``plain_messages``), ready to be answered.

    ``ConfigError`` names the first message that is malformed or out of turn.
    """
    plain = plain_messages(messages)
    expected: tuple[str, ...] = ("user",)
    called: set[str] = set()
    for index, message in enumerate(plain):
        role = message["role"]
        if role == "system" and index == 0:
            continue
        if role not in expected:
            wanted = " or ".join(dict.fromkeys(expected))
            raise ConfigError(
                f"messages[{index}]: expected a message of the {wanted}, found one of the {role}"
            )
        if calls := message.get("tool_calls"):
            called = {call["id"] for call in calls}
        answered = message.get("tool_call_id")
        if answered and called and answered not in called and "" not in called:
            raise ConfigError(
                f"messages[{index}]: tool_call_id: expected one of the calls before it "
                f"({', '.join(sorted(called))}), found {answered!r:.80}"
            )
        expected = _NEXT["calls" if calls else role]
    if not plain or plain[-1]["role"] not in ("user", "tool"):
        raise ConfigError("messages: expected a last message of the user, nothing to answer")
    return plain


def plain_messages(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """Returns the messages with plain text as content, in any order of roles.

    Content may be a list of OpenAI's text parts, which are joined. An assistant's ``tool_calls``
    get their arguments as mappings. ``ConfigError`` names the first message that is malformed.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages: expected a list of messages, found {messages!r:.80}")
    return [_plain(f"messages[{index}]", message) for index, message in enumerate(messages)]


def plain_tools(tools: Sequence[Mapping[str, object]] | None) -> list[Mapping[str, Any]] | None:
    """Returns the functions that the model may call, each as name, description, parameters …; None
    without any.

    Takes OpenAI's form ({"type": "function", "function": {…}}) or the functions themselves.
    ``strict`` is left out: it says how calls are checked, and no template shows it.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise ConfigError(f"tools: expected a list of functions, found {tools!r:.80}")
    found = [_plain_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    names = [each["name"] for each in found]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"tools[{index}]: expected different names, found {name!r} twice")
    return found or None


def _plain_tool(where: str, tool: object) -> Mapping[str, Any]:
    if isinstance(tool, Mapping) and "function" in tool:
        kind, tool, where = tool.get("type", "function"), tool["function"], f"{where}.function"
    elif isinstance(tool, Mapping) and tool.get("type") not in (None, "function"):
        kind = tool["type"]
    else:
        kind = "function"
    if kind != "function":
        raise ConfigError(f"{where}: expected type 'function', found {kind!r:.40}")
    if not isinstance(tool, Mapping):
        raise ConfigError(f"{where}: expected a function with a name, found {tool!r:.80}")
    name = tool.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{where}: name: expected text, not empty, found {name!r:.80}")
    parameters = tool.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError(
            f"{where}: parameters: expected a JSON schema (a mapping), found {parameters!r:.80}"
        )
    # Templates walk through these two.
    for key, kind, expected in (
        ("properties", Mapping, "a mapping of schemas"),
        ("required", list | tuple, "a list of names"),
    ):
        value = (parameters or {}).get(key)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"{where}: parameters.{key}: expected {expected}, found {value!r:.80}"
            )
    left_out = ("strict", "type")
    found = {key: each for key, each in tool.items() if key not in left_out and each is not None}
    _check_json(where, found)
    return found


def _plain(where: str, message: object) -> Message:
    if not isinstance(message, Mapping) or not {"role"} <= set(message) <= {
        "role", "content", *_OPTIONAL,
    }:  # fmt: skip
        raise ConfigError(f"{where}: expected a mapping of role and content, found {message!r}")
    role = message["role"]
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise ConfigError(f"{where}: role: expected {', '.join(_ROLES)}, found {role!r}")
    found: dict[str, Any] = {"role": role, "content": ""}
    for key, owner in _OPTIONAL.items():
        value = message.get(key)
        if value is None or (key == "name" and role != owner):
            continue
        if role != owner:
            raise ConfigError(f"{where}: {key}: only a message of the {owner} has one")
        found[key] = (
            _calls(f"{where}: {key}", value)
            if key == "tool_calls"
            else _text(f"{where}: {key}", value)
        )
    if not found.get("tool_calls", True):
        del found["tool_calls"]
    may_be_empty = role == "tool" or bool(found.keys() & {"tool_calls", "reasoning_content"})
    found["content"] = _content(f"{where}: content", message.get("content"), may_be_empty)
    return found


def _content(where: str, content: object, may_be_empty: bool) -> str:
    if isinstance(content, list | tuple):
        content = "".join(_part_text(f"{where}[{i}]", part) for i, part in enumerate(content))
    if may_be_empty and content in (None, ""):
        return ""
    if not isinstance(content, str) or not (may_be_empty or content.strip()):
        raise ConfigError(f"{where}: expected text, not empty, found {content!r:.80}")
    return _text(where, content)


def is_unicode(text: str) -> bool:
    """Returns whether a text holds whole characters only. The encoder needs 5 ms for 8 MB, a loop
    over the characters a second, in which no other thread runs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(where: str, text: object) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected text, found {text!r:.80}")
    if not is_unicode(text):
        raise ConfigError(f"{where}: {text!r:.40} holds half a character (U+D800 …)")
    return text


def _part_text(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise ConfigError(f"{where}: expected a part with a type, found {part!r:.80}")
    if kind != "text":
        raise ConfigError(
            f"{where}: expected type 'text', found {kind!r:.40}: ktrt reads text only"
        )
    text = part.get("text")
    if not isinstance(text, str) or set(part) != {"type", "text"}:
        raise ConfigError(f"{where}: expected type and text, found {part!r:.80}")
    return text


def _calls(where: str, calls: object) -> list[dict[str, Any]]:
    if isinstance(calls, str | bytes) or not isinstance(calls, Sequence):
        raise ConfigError(f"{where}: expected a list of calls, found {calls!r:.80}")
    return [_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _call(where: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ConfigError(f"{where}: expected id, type and function, found {call!r:.80}")
    if call.get("type", "function") != "function":
        raise ConfigError(f"{where}: expected type 'function', found {call['type']!r:.40}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: function.name: expected text, found {name!r:.80}")
    return {
        "id": _text(f"{where}: id", call.get("id") or ""),
        "type": "function",
        "function": {
            "name": _text(f"{where}: function.name", name),
            "arguments": _arguments(f"{where}: function.arguments", function.get("arguments")),
        },
    }


def _arguments(where: str, given: object) -> dict[str, Any]:
    found: object = given
    if given is None or (isinstance(given, str) and not given.strip()):
        found = {}
    elif isinstance(given, str):
        try:
            found = json.loads(given)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: expected a JSON object as text, found {given!r:.80}")
    _check_json(where, found)
    return dict(found)


def _check_json(where: str, value: object) -> None:
    """Refuses what JSON text cannot hold: templates write it as such."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: expected JSON, found {error}") from error
    _text(where, text)
