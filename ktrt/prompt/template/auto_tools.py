"""Tools in a tokenizer's own chat template: the forms of tools, calls and results that it takes."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ktrt.errors import ConfigError
from ktrt.prompt.template.base import Tool

Turns = list[dict[str, Any]]

# Words that no template contains.
_NAME, _KEY, _VALUE, _RESULT = "probe_tool", "probe_key", "probe_value", "7319"
_USER: dict[str, Any] = {"role": "user", "content": "?"}
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class _CallForm:
    """``text_arguments``: arguments as JSON text, not as a mapping. ``short_ids``: ids of nine
    letters and digits."""

    text_arguments: bool
    short_ids: bool


class ToolForm:
    """The forms that one chat template takes. ``shows_tools``: the prompt names the tools;
    ``calls``: the form of messages with calls, None if the template shows none."""

    def __init__(self, shows_tools: bool, calls: _CallForm | None) -> None:
        self._shows_tools, self._calls = shows_tools, calls

    def shown(self, turns: Turns, tools: Sequence[Tool] | None) -> tuple[Turns, dict[str, Any]]:
        """Returns the messages and options for ``apply_chat_template``."""
        if tools and not self._shows_tools:
            raise ConfigError(
                "tools: the tokenizer's chat template does not show them to the model; set "
                "template to a name that fits the model, or leave tools out"
            )
        has_calls = any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
        if has_calls and self._calls is None:
            raise ConfigError(
                "messages: the tokenizer's chat template shows no calls of tools; set template to "
                "a name that fits the model"
            )
        form = self._calls
        shown = [dict(turn) for turn in turns] if form is None else _in_form(turns, form)
        return shown, {"tools": [_wrapped(tool) for tool in tools]} if tools else {}


def find_tool_form(apply: Callable[..., str]) -> ToolForm:
    """Tries which forms the template takes. ``apply`` returns the prompt of messages."""
    tool = {
        "name": _NAME,
        "description": "?",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "?"}},
            "required": [_KEY],
        },
    }
    options = {"tools": [_wrapped(tool)]}
    shows_tools = _NAME in _tried(apply, [_USER], options)
    call = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    turns: Turns = [
        _USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_0123456789", "type": "function", "function": call}],
        },
        {"role": "tool", "content": _RESULT, "tool_call_id": "call_0123456789", "name": _NAME},
    ]
    for short_ids, text_arguments in product((False, True), repeat=2):
        form = _CallForm(text_arguments, short_ids)
        text = _tried(apply, _in_form(turns, form), options if shows_tools else {})
        shown = text.rpartition("?")[2]
        # A mapping that is joined to text looks like Python's.
        if all(each in shown for each in (_NAME, _KEY, _VALUE, _RESULT)) and (
            f"'{_KEY}'" not in shown and '\\\\"' not in shown
        ):
            return ToolForm(shows_tools, form)
    return ToolForm(shows_tools, None)


def _tried(apply: Callable[..., str], turns: Turns, options: dict[str, Any]) -> str:
    try:
        return apply(turns, **options)
    except ConfigError:
        return ""


def _wrapped(tool: Tool) -> dict[str, Any]:
    # Templates index these without asking.
    filled = {"description": "", "parameters": {"type": "object", "properties": {}}, **tool}
    return {"type": "function", "function": filled}


def _in_form(turns: Turns, form: _CallForm) -> Turns:
    names: dict[str, str] = {}
    shown = []
    for turn in turns:
        turn = dict(turn)
        if calls := turn.get("tool_calls"):
            names = {each["id"]: each["function"]["name"] for each in calls}
            turn["tool_calls"] = [_call(each, form) for each in calls]
        elif turn["role"] == "tool":
            given = turn.get("tool_call_id", "")
            # gpt-oss and others show the name of what was called.
            turn.setdefault("name", names.get(given) or next(iter(names.values()), ""))
            if "tool_call_id" in turn and form.short_ids:
                turn["tool_call_id"] = _short(given)
        shown.append(turn)
    return shown


def _call(call: dict[str, Any], form: _CallForm) -> dict[str, Any]:

    function = dict(call["function"])
    if form.text_arguments:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    number = _short(call["id"]) if form.short_ids else call["id"]
    return {**call, "id": number, "function": function}


def _short(given: str) -> str:
    if _SHORT_ID.fullmatch(given):
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:9]
