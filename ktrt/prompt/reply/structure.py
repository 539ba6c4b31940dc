"""Describes replies that a grammar enforces: JSON of a schema, and calls as a family writes them.

The descriptions are xgrammar's structural tags as plain data, so nothing here needs xgrammar.
``ktrt.generate.grammar`` compiles them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ktrt.errors import ConfigError
from ktrt.prompt.reply.json_text import dumped
from ktrt.prompt.reply.table import CALL_TEXTS, CallText, ReplyFormat

Format = dict[str, Any]

# Models that are forced into JSON may write white space for ever.
_MOST_SPACE = 12
# Keywords that xgrammar reads over, and those whose values are schemas by name.
_IGNORED = frozenset((
    "not", "if", "then", "else", "uniqueItems", "multipleOf", "contains", "dependentRequired",
    "dependentSchemas", "dependencies",
))  # fmt: skip
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_FINAL = "<|channel|>final<|message|>"
_ANALYSIS = "<|channel|>analysis<|message|>"
_NEXT_MESSAGE = "<|end|><|start|>assistant"


def json_structure(
    form: ReplyFormat | None,
    start: str,
    schema: Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
) -> Format:
    """Returns a reply that is JSON of the schema (None: any JSON object), after a thought.

    ``start``: the text of the reply that the prompt holds, see ``Template.reply_start``.
    ``strict``: keywords of the schema that cannot be enforced are a ``ConfigError``; otherwise the
    reply may violate them.
    """
    wanted: object = {"type": "object", "additionalProperties": True} if schema is None else schema
    if not isinstance(wanted, Mapping):
        raise ConfigError(f"the schema: expected a mapping, found {wanted!r:.80}")
    if strict and (found := _not_enforced(wanted)):
        raise ConfigError(
            f"the schema: {', '.join(found)} cannot be enforced; leave it out, or set strict to "
            "false"
        )
    return _after_thought(form, start, _schema(wanted), is_call=False)


def _not_enforced(schema: Mapping[str, Any]) -> list[str]:
    """Returns the keywords of the schema that xgrammar ignores."""
    found: dict[str, None] = {}
    left: list[object] = [schema]
    while left:
        each = left.pop()
        if isinstance(each, list | tuple):
            left += each
        if not isinstance(each, Mapping):
            continue
        for key, inner in each.items():
            if key in _NAMED and isinstance(inner, Mapping):
                left += inner.values()
            elif key in _IGNORED or (key == "allOf" and isinstance(inner, list) and len(inner) > 1):
                if inner is not False:
                    found[key] = None
            elif key not in ("const", "enum", "default", "examples"):
                left.append(inner)
    return list(found)


def calls_structure(
    form: ReplyFormat | None,
    start: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str | None = None,
    parallel: bool = True,
) -> Format:
    """Returns a reply that consists of calls, after a thought: at least one call of a tool, or of
    tool ``name`` alone; at most one unless ``parallel``.

    ``ConfigError``: it is unknown how the model writes calls, or no tool has the name.
    """
    functions = [each.get("function", each) for each in tools]
    if name is not None:
        functions = [each for each in functions if each["name"] == name]
    if not functions:
        wanted = "at least one function" if name is None else f"a function {name!r}"
        raise ConfigError(f"tool_choice: expected {wanted} among tools, found none")
    if form is not None and form.channels and not form.calls:
        return _after_thought(form, start, _any_of([_message(each) for each in functions]))
    text = CALL_TEXTS.get(form.calls) if form is not None and form.calls else None
    if text is None:
        raise ConfigError(
            "tool_choice: expected auto or none, found a call to enforce: the way in which this "
            "template's models write calls is unknown"
        )
    call = _any_of([_call(text, each) for each in functions])
    between = text.between if parallel else None
    more = [] if between is None else [_star(_sequence(_text(between), call))]
    calls = _sequence(_text(text.begin), call, *more, _text(text.end))
    # In a format with channels, such calls are text of the final message.
    return _after_thought(form, start, calls, is_call=False)


def _after_thought(
    form: ReplyFormat | None, start: str, rest: Format, *, is_call: bool = True
) -> Format:
    """Returns the reply with a thought before it, if the model may think. ``is_call``: with
    channels, ``rest`` is a whole message, otherwise the text of the final one."""
    if form is not None and form.channels:
        if start.endswith(_FINAL):
            if is_call:
                raise ConfigError(
                    "tool_choice: a call cannot be enforced with thinking off: the prompt begins "
                    "the final message already"
                )
            return rest
        message = rest if is_call else _sequence(_text(_FINAL), rest)
        thought = _sequence(_text(_ANALYSIS), _any_text("<|end|>"), _text(_NEXT_MESSAGE))
        return _any_of([_sequence(thought, message), message])
    if form is None or form.thought is None:
        return rest
    begin, end = form.thought
    open_at, closed_at = start.rfind(begin), start.rfind(end)
    if closed_at > open_at:  # a thought that is over: the model may not think
        return rest
    inner = _sequence(_any_text(end), _text(end), _regex(r"\n{0,2}"), rest)
    if open_at >= 0:
        return inner
    return _any_of([_sequence(_regex(r"\n{0,1}"), _text(begin), inner), rest])


def _message(function: Mapping[str, Any]) -> Format:
    # The token <|call|> that follows ends the reply, and is no part of it.
    begin = f"<|channel|>commentary to=functions.{function['name']} <|constrain|>json<|message|>"
    return _sequence(_text(begin), _parameters(function))


def _call(text: CallText, function: Mapping[str, Any]) -> Format:
    name = function["name"]
    filled = text.one.replace("{json name}", dumped(name)).replace("{name}", name)
    before, _, after = filled.partition("{arguments}")
    parts = [_text(before), _parameters(function, text.style), _text(after)]
    if "{index}" in before:
        left, _, right = before.partition("{index}")
        parts[:1] = [_text(left), _regex("[0-9]{1,3}"), _text(right)]
    return _sequence(*parts)


def _parameters(function: Mapping[str, Any], style: str = "json") -> Format:
    schema = function.get("parameters")
    if not schema:
        schema = {"type": "object", "properties": {}}
    return _schema(schema, style)


def _schema(schema: object, style: str = "json") -> Format:
    found: Format = {
        "type": "json_schema",
        "json_schema": schema,
        "style": style,
        "max_whitespace_cnt": _MOST_SPACE,
    }
    if style == "gemma":  # these marks would end a text's call, or begin another
        found["excludes"] = ["<|tool_call>", "<tool_call|>"]
    return found


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}


def _regex(pattern: str) -> Format:
    return {"type": "regex", "pattern": pattern}


def _any_text(*excludes: str) -> Format:
    return {"type": "any_text", "excludes": [*excludes]}


def _star(content: Format) -> Format:
    return {"type": "star", "content": content}


def _sequence(*elements: Format) -> Format:
    kept = [each for each in elements if each.get("value") != ""]
    return kept[0] if len(kept) == 1 else {"type": "sequence", "elements": kept}


def _any_of(elements: list[Format]) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": elements}
