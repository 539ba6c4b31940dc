"""Reads, parses and types foreign JSON files (models, adapters, manifests)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from ktrt.errors import KtrtError

T = TypeVar("T")

_LFS_MARK = b"version https://git-lfs"
_SHOWN = 80
# Real files nest about 5 deep. Python parses hundreds of levels, but cannot print or compare them.
_DEEPEST = 64


class JsonObject(BaseModel):
    """Base class of JSON objects: unknown keys pass, values are not converted.

    Strict (in pydantic's sense): the text "false" is no boolean and 1.5 is no integer, but an
    integer is a number. The type of a nullable key includes None.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())


def read_json(file: Path, error: type[KtrtError], advice: str = "") -> Any:
    """Returns the content of a UTF-8 JSON file, with or without a byte order mark.

    Raises ``error`` with the file, the finding and ``advice`` for: a missing file, a dangling link,
    a Git LFS pointer, invalid UTF-8, invalid JSON, too deep nesting.
    """
    try:
        data = file.read_bytes()
    except OSError as cause:
        raise error(_text(f"{file}: {_why_unreadable(file, cause)}", advice)) from cause
    if data.startswith(_LFS_MARK):
        raise error(
            f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
            f"{file.parent}, or download the folder again."
        )
    return parse_json(data, str(file), error, advice)


def parse_json(data: bytes, where: str, error: type[KtrtError], advice: str = "") -> Any:
    """Parses UTF-8 JSON like ``read_json``; ``where`` names the source in errors."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
        if _is_deeper(content, _DEEPEST):
            raise RecursionError
        return content
    except UnicodeDecodeError as cause:
        raise error(_text(f"{where} is not UTF-8 text (byte {cause.start})", advice)) from cause
    except RecursionError as cause:
        raise error(_text(f"{where} is damaged: nested too deeply for JSON", advice)) from cause
    except ValueError as cause:
        reason = f"{where} is no valid JSON ({cause}; {len(data)} bytes)"
        raise error(_text(reason, advice)) from cause


def read_json_as(file: Path, shape: type[T], error: type[KtrtError], advice: str = "") -> T:
    """Combines ``read_json`` and ``typed``."""
    return typed(read_json(file, error, advice), shape, str(file), error, advice)


def typed(
    content: object, shape: type[T], where: str, error: type[KtrtError], advice: str = ""
) -> T:
    """Validates parsed JSON as ``shape``: a ``JsonObject`` class or any type that pydantic knows
    (``dict[str, str]`` …).

    Raises ``error`` with ``where``, the key, the value found and the type expected.
    """
    try:
        return TypeAdapter(shape).validate_python(content, strict=True)
    except ValidationError as cause:
        # One problem at a time: the first is the outermost, and often the cause of the others.
        reason = f"{where}: {_describe(cause.errors(include_url=False)[0])}"
        raise error(_text(reason, advice)) from cause


def shown(value: object) -> str:
    """Formats ``value`` for a message, truncated if long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _describe(problem: ErrorDetails) -> str:
    key = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    expected = "an object" if problem["type"] in ("model_type", "dict_type") else expected
    found = f"found {shown(problem['input'])}, expected {expected}"
    return f"{key}: {found}" if key else found


def _is_deeper(content: object, levels: int) -> bool:
    """Returns whether containers nest more than ``levels`` deep; does not recurse."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(levels):
        items = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for each in items for inner in each if isinstance(inner, dict | list)]
    return bool(level)


def _is_union_branch(part: object) -> bool:
    """Returns whether ``part`` of an error's location is the union branch that pydantic tried."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _why_unreadable(file: Path, cause: OSError) -> str:
    if isinstance(cause, FileNotFoundError) and file.is_symlink():
        return f"a link to {file.readlink()}, which is not there (an interrupted download?)"
    return (cause.strerror or str(cause)).lower()


def _text(reason: str, advice: str) -> str:
    return f"{reason}. {advice}" if advice else f"{reason}."
