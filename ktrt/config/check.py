"""Checks and conversions of single values, and the nearest known name for a wrong one."""

import difflib
import types
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ktrt.errors import ConfigError

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}


def check_value(key: str, value: object, hint: Any, where: str) -> Any:
    """``value`` as a dataclass field's type ``hint``; an integer is a fine float, text a fine path.

    ``hint``: bool, int, float, str, Path, a Literal of texts (case-insensitive), or a union of them
    and None; or a tuple of one of them, for which a list and a single value are fine too.
    ``ConfigError`` names ``where``, the key, what was expected and what was found.
    """
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(check_value(key, each, get_args(hint)[0], where) for each in values)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hints = [each for each in get_args(hint) if each is not type(None)]
    else:
        hints = [hint]
    for each in hints:
        if get_origin(each) is Literal:
            for choice in get_args(each):
                if isinstance(value, str) and value.lower() == choice.lower():
                    return choice
        elif _fits(value, each):
            return each(value)
    expected = " or ".join(_expected(each) for each in hints)
    raise ConfigError(f"{where}: {key}: expected {expected}, found {describe(value)}")


def _expected(hint: Any) -> str:
    return " or ".join(get_args(hint)) if get_origin(hint) is Literal else _NAMES[hint]


def _fits(value: object, hint: type) -> bool:
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    if hint is Path:
        return isinstance(value, str | PathLike)
    return isinstance(value, hint)


def describe(value: object) -> str:
    """A value for a message: how it reads, and what kind of thing it is."""
    kind = {bool: "a boolean", str: "text", list: "a list", dict: "a mapping", type(None): "null"}
    return f"{value!r} ({kind.get(type(value), type(value).__name__)})"


def nearest(name: str, known: Iterable[str], also: Mapping[str, str] = {}) -> str:
    """`` (did you mean …?)`` for the known name nearest to ``name``; empty if none is near.

    ``also``: other words, and the known names that they stand for.
    """
    meant = {each.lower(): answer for each, answer in also.items()}
    meant |= {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), meant, n=1)
    return f" (did you mean {meant[near[0]]!r}?)" if near else ""
