"""Writes tools and calls as text, by the tables in ``table.tools``."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ktrt.errors import ConfigError
from ktrt.prompt.template.table.tools import Calls, ToolFormat

_MARK = re.compile(r"\{(\w+(?: \w+)?)\}")

Tool = Mapping[str, Any]


def tools_text(form: ToolFormat, tools: Sequence[Tool]) -> str:
    """Returns the text that follows the system prompt. ``tools``: see ``plain_tools``."""
    if form.tool:
        texts = [_tool_text(form, tool) for tool in tools]
        text = form.between.join(texts)
    else:
        text = _json([_shown(form, tool) for tool in tools])
    date = f"{datetime.now():%d %b %Y}" if "{date}" in form.prompt else ""
    names = ", ".join(tool["name"] for tool in tools)
    return _fill(form.prompt, tools=text, names=names, date=date)


def calls_text(name: str, form: Calls, calls: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of an assistant's ``tool_calls``. ``ConfigError``: template ``name`` has no
    form for that many at once."""
    if form.most is not None and len(calls) > form.most:
        raise ConfigError(
            f"template {name!r} allows {form.most} call in an answer, found {len(calls)} tool_calls"
        )
    texts = [_call_text(form, call["function"]) for call in calls]
    around = form.around_one if form.around_one and len(calls) == 1 else form.around
    return _fill(around, calls=form.between.join(texts))


def _fill(slot: str, **values: str) -> str:
    """Replaces the marks that have a value, in one pass: texts may look like marks."""
    return _MARK.sub(lambda mark: values.get(mark[1].replace(" ", "_"), mark[0]), slot)


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _shown(form: ToolFormat, tool: Tool) -> Tool:
    return {"type": "function", "function": tool} if form.wrapped else tool


def _tool_text(form: ToolFormat, tool: Tool) -> str:
    if form.tool == "listing":
        return _listing(tool)
    if form.tool == "gemma":
        return _gemma_declaration(tool)
    return _fill(form.tool, name=tool["name"], json=_json(_shown(form, tool), form.indent))


def _call_text(form: Calls, function: Mapping[str, Any]) -> str:
    name, arguments = function["name"], function["arguments"]
    if form.argument:
        keys = sorted(arguments) if form.values == "gemma" else arguments
        texts = (_fill(form.argument, key=key, value=_value(form, arguments[key])) for key in keys)
        text = form.between_arguments.join(texts)
    else:
        text = _json(arguments)
    return _fill(form.one, name=name, json_name=_json(name), arguments=text)


def _value(form: Calls, value: object) -> str:
    if form.values == "gemma":
        return _gemma_value(value)
    if isinstance(value, str) and form.values != "json":
        return value if form.values == "text" else f'"{value}"'
    return _json(value)


def _listing(tool: Tool) -> str:
    parameters = tool.get("parameters") or {}
    required = parameters.get("required") or ()
    about = tool.get("description", "")
    lines = [f"> Tool Name: {tool['name']}\nTool Description: {about}\nTool Args:\n"]
    for name, schema in (parameters.get("properties") or {}).items():
        schema = schema if isinstance(schema, Mapping) else {}
        kind = schema.get("type", "")
        line = f"  - {name} ({kind}{', required' if name in required else ''}): "
        line += str(schema.get("description", ""))
        if choices := schema.get("enum"):
            line += f", should be one of [{', '.join(map(str, choices))}]"
        if (items := schema.get("items")) and isinstance(items, Mapping):
            line += f", where each item should be {items.get('type', '')}"
        lines.append(line + "\n")
    return "".join(lines) + "\n"


def _gemma_text(text: object) -> str:
    return f'<|"|>{text}<|"|>'


def _gemma_declaration(tool: Tool) -> str:
    parts = [f"description:{_gemma_text(tool.get('description', ''))}"]
    if schema := tool.get("parameters"):
        inner = []
        if properties := schema.get("properties"):
            shown = (f"{name}:{{{_gemma_property(each)}}}" for name, each in properties.items())
            inner.append(f"properties:{{{','.join(shown)}}}")
        if required := schema.get("required"):
            inner.append(f"required:[{','.join(map(_gemma_text, required))}]")
        inner += _gemma_type(schema)
        parts.append(f"parameters:{{{','.join(inner)}}}")
    if response := tool.get("response"):
        about = response.get("description")
        inner = [f"description:{_gemma_text(about)}"] if about else []
        inner += _gemma_type(response) if str(response.get("type")).upper() == "OBJECT" else []
        parts.append(f"response:{{{','.join(inner)}}}")
    return f"declaration:{tool['name']}{{{','.join(parts)}}}"


def _gemma_property(schema: object) -> str:
    if not isinstance(schema, Mapping):
        return ""
    about = schema.get("description")
    shown = [f"description:{_gemma_text(about)}"] if about else []
    return ",".join(shown + _gemma_type(schema))


def _gemma_type(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type")
    return [f"type:{_gemma_text(str(kind).upper())}"] if kind else []


def _gemma_value(value: object) -> str:
    if isinstance(value, str):
        return _gemma_text(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_gemma_value(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_gemma_value, value))}]"
    return str(value) if isinstance(value, float) else _json(value)
