"""Grammars that hold an answer to ``response_format`` and ``tool_choice``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktrt.prompt.reply.structure import calls_structure, json_structure
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.generate.grammar import Grammars
    from ktrt.generate.sampling import Constraint
    from ktrt.prompt.template.base import Template


def make_constraint(
    grammars: Grammars,
    template: Template,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    response_format: Mapping[str, Any] | None,
    must_call: bool,
    function: str | None,
    parallel: bool,
) -> Callable[[], Constraint] | None:
    """Returns a function that makes the constraint of one choice; None: the answer is free.

    ``must_call``: the answer consists of calls of ``tools`` (``function``: of this one). If not,
    and the format is JSON, it is either. ``ConfigError``: the grammar cannot be made; it may take
    seconds.
    """
    form, start = template.reply, template.reply_start
    schema = wanted_schema(response_format)
    must_call = must_call and bool(tools)
    if not must_call and schema is None:
        return None
    structures = []
    if tools:
        calls = calls_structure(form, start, tools, name=function, parallel=parallel)
        structures.append(calls)
    if not must_call:
        strict = is_strict(response_format)
        structures.append(json_structure(form, start, schema or None, strict=strict))
    both = {"type": "or", "elements": structures}
    grammar = grammars.compile(both if len(structures) > 1 else structures[0])
    stop_ids = template.stop_ids
    return lambda: grammar.constraint(stop_ids)


def needs_grammar(response_format: Mapping[str, Any] | None, tool_choice: str) -> bool:
    """Returns whether ``make_constraint`` may have to compile a grammar."""
    return tool_choice == "required" or wanted_schema(response_format) is not None


def wanted_schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns the JSON schema that a format asks for, empty for any object; None: text.
    ``ApiError`` 400: it is no format of OpenAI's."""
    kind = (response_format or {}).get("type", "text" if response_format is None else None)
    if kind == "text":
        return None
    if kind == "json_object":
        return {}
    if response_format is None or kind != "json_schema":
        raise _wrong("type text, json_object or json_schema", kind)
    given = response_format.get("json_schema")
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping):
        raise _wrong("json_schema with a schema", given)
    # An empty schema allows any value, where json_object allows objects only.
    return schema or {"type": ["object", "array", "string", "number", "boolean", "null"]}


def is_strict(response_format: Mapping[str, Any] | None) -> bool:
    """Returns whether a schema with keywords that no grammar holds is an error. OpenAI's default is
    false; here a client has to say that it wants less than its schema."""
    given = (response_format or {}).get("json_schema")
    return not isinstance(given, Mapping) or given.get("strict") is not False


def _wrong(expected: str, found: object) -> ApiError:
    return ApiError(
        400, f"response_format: expected {expected}, found {found!r:.80}", param="response_format"
    )
