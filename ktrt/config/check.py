"""Checks and converts single values, and finds the nearest known name for a wrong one."""

import difflib
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ktrt.errors import ConfigError

_SHOWN = 120
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}


def check_value(key: str, value: object, hint: Any, where: str) -> Any:
    """Returns ``value`` converted to ``hint``, the type of a dataclass field. Accepts an integer as
    a float, text as a path, and "8", "0.5" or "false" in quotes where no text is expected.

    ``hint``: bool, int, float, str, Path, a Literal of texts (case-insensitive), or a union of them
    and None; or a tuple of one of them, for which a list or a single value is accepted too; or a
    Mapping of two of them.
    ``ConfigError`` names ``where``, the key, what was expected and what was found.
    """
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(check_value(key, each, get_args(hint)[0], where) for each in values)
    if get_origin(hint) is Mapping:
        return _checked_mapping(key, value, get_args(hint), where)
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
            return _converted(key, value, each, where)
    if isinstance(value, str) and str not in hints and (plain := _unquoted(value)) is not None:
        return check_value(key, plain, hint, where)
    expected = " or ".join(_expected(each) for each in hints)
    raise ConfigError(f"{where}: {key}: expected {expected}, found {describe(value)}")


def _checked_mapping(key: str, value: object, hints: tuple[Any, Any], where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key}: expected a mapping, found {describe(value)}")
    of_keys, of_values = hints
    return {
        check_value(f"{key}: a key", name, of_keys, where): check_value(
            f"{key}: {shown(name)}", each, of_values, where
        )
        for name, each in value.items()
    }


def _converted(key: str, value: Any, hint: Any, where: str) -> Any:
    if hint is float:
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: {key}: {shown(value)} is too large a number") from None
    if hint in (str, Path):
        text = str(value)
        if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            raise ConfigError(f"{where}: {key}: {shown(value)} holds half a character (U+D800 …)")
        if "\0" in text and hint is Path:
            raise ConfigError(f"{where}: {key}: {shown(value)} holds a NUL byte, which no path has")
    return hint(value)


def _unquoted(text: str) -> int | float | bool | None:
    """Returns the number or boolean that a quoted value means; None if it is text."""
    word = text.strip()
    if _INTEGER.fullmatch(word):
        return int(word)
    if _NUMBER.fullmatch(word):
        return float(word)
    return {"true": True, "false": False}.get(word.lower())


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
    """Returns a value and its kind, for a message."""
    kind = {bool: "a boolean", str: "text", list: "a list", dict: "a mapping", type(None): "null"}
    return f"{shown(value)} ({kind.get(type(value), type(value).__name__)})"


def shown(value: object, text: Callable[[object], str] = repr) -> str:
    """Returns a value for a message, shortened if it is long."""
    if isinstance(value, str | float | bool | None):
        full = text(value)
        return full if len(full) <= _SHOWN else f"{full[:_SHOWN]}…"
    return _LIMITED.repr(value)


class _Limited(reprlib.Repr):
    """A limited ``repr``: YAML's aliases turn a few lines into gigabytes, and 0xFFFF… is an integer
    whose digits Python refuses to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 4
        self.maxstring = self.maxother = _SHOWN
        self.maxlevel = 3

    def repr_int(self, x: int, _level: int) -> str:
        return str(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


_LIMITED = _Limited()


def nearest(
    name: str, known: Iterable[str], cutoff: float = 0.6, *, also: Mapping[str, str] = {}
) -> str:
    """Returns `` (did you mean …?)`` with the known name nearest to ``name``, or nothing.

    ``also``: other words, and the known names that they stand for.
    """
    meant = {each.lower(): answer for each, answer in also.items()}
    meant |= {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), meant, 1, cutoff)
    return f" (did you mean {meant[near[0]]!r}?)" if near else ""
