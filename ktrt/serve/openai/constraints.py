"""Grammars that hold an answer to ``response_format`` and ``tool_choice``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ktrt.prompt.reply.structure import calls_structure, json_structure
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ktrt.generate.grammar import Grammars
    from ktrt.generate.sampling import Constraint
    from ktrt.prompt.template.base import Template
    from ktrt.serve.generation import Asked
    from ktrt.serve.openai.schema import SamplingRequest


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


class LongAnswer:
    """Keeps tokens that end an answer from being chosen; a ``Constraint`` of one answer.

    ``until``: ids, and the number of the answer's tokens before which they cannot come (None: they
    never can).
    """

    def __init__(self, until: Sequence[tuple[Collection[int], int | None]]) -> None:
        self._until = [(torch.tensor(sorted(ids)), count) for ids, count in until if ids]
        self._count = 0

    def mask(self, logits: torch.Tensor) -> None:
        """Sets the logits [vocab_size] of these tokens to -inf, in place."""
        for ids, count in self._until:
            if count is None or self._count < count:
                logits[ids[ids < len(logits)]] = float("-inf")

    def accept(self, _token: int) -> None:
        """Counts a token."""
        self._count += 1


def with_least_length(asked: Asked, body: SamplingRequest, ends: Collection[int]) -> Asked:
    """Returns the request with what its ``min_tokens`` and ``ignore_eos`` mean; ``ends``: the ids
    that end an answer of this model. ``ApiError`` 400: they contradict another field."""
    least = body.min_tokens or 0
    if not (least or body.ignore_eos):
        return asked
    name = "min_tokens" if least else "ignore_eos"
    most = asked.sampling.get("max_new_tokens")
    if most is not None and least > most:
        raise ApiError(
            400, f"min_tokens: expected max_tokens ({most}) at most, found {least}",
            param="min_tokens",
        )  # fmt: skip
    if least and asked.sampling.get("stop"):
        raise ApiError(
            400, "min_tokens: expected no stop next to it, which ends an answer of any length; "
            "use stop_token_ids", param="min_tokens",
        )  # fmt: skip
    if asked.constraint is not None:
        raise ApiError(
            400, f"{name}: expected neither response_format nor a forced tool call next to it: "
            "they say where an answer ends", param=name,
        )  # fmt: skip
    own = asked.sampling.get("stop_token_ids", ())
    until = [(ends, None if body.ignore_eos else least), (own, least)]
    return replace(asked, constraint=lambda: LongAnswer(until))


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
