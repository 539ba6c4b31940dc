"""JSON in pieces, and values that are written without JSON's quotes."""

import json
import math
from collections.abc import Mapping
from typing import Any

_OPEN, _CLOSE = "{[", "}]"
# Words of Python that models write instead of JSON's.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class JsonScanner:
    """Finds the end of a JSON object that comes in pieces.

    Counts brackets outside of strings. ``depth`` is the number of open ones at the begin.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False

    def find_end(self, text: str) -> tuple[int, bool] | None:
        """Returns the length of the next piece's part of the object, and whether the object is
        complete: False means that a ``<`` outside of strings ends it, which begins a mark. None:
        all of ``text`` belongs to it."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in _OPEN:
                self._depth += 1
            elif character in _CLOSE:
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1, True
            elif character == "<":
                return at, False
        return None


def parsed(text: str) -> Any:
    """Returns the value of JSON text. Raises ``ValueError`` for anything else, NaN included, and
    for numbers that are infinite as floats: they could not be written again."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _refuse(name: str) -> None:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def dumped(value: object) -> str:
    """Returns JSON text that can be encoded: half characters stay escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_text(text) else json.dumps(value)


def is_text(text: str) -> bool:
    """Returns whether the text has no half characters."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def typed(text: str, schema: object) -> str:
    """Returns the JSON text of a value that was written without quotes, by its JSON schema: what
    looks like a number is a string where the schema wants one."""
    wanted = _types(schema)
    if wanted == {"string"}:
        return dumped(text)
    for candidate in (text, _PYTHON.get(text.strip(), text)):
        try:
            kind = _type_of(parsed(candidate))
        except ValueError:
            continue
        if not wanted or wanted & kind or "string" not in wanted:
            return candidate.strip()
    return dumped(text)


def _types(schema: object) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    found = {each for each in _listed(schema.get("type")) if isinstance(each, str)}
    for name in ("anyOf", "oneOf"):
        for each in _listed(schema.get(name)):
            found |= _types(each)
    if not found:
        for each in _listed(schema.get("enum")):
            found |= _type_of(each)
    return found


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _type_of(value: object) -> set[str]:
    """Returns JSON schema's names of the value's type."""
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    return {
        "string" if isinstance(value, str) else "object" if isinstance(value, dict) else "array"
    }
