"""Turns ``--key value`` on a command line into ``key=value``."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from ktrt.config.check import nearest
from ktrt.config.keys import MEANT
from ktrt.errors import ConfigError

_LONG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
# Whether a value follows a key: always, perhaps, or perhaps a boolean.
Takes = Literal["value", "any", "flag"]
_FILE = re.compile(r".+\.(yaml|yml|json)")


def convert_options(
    words: Sequence[str],
    options: Mapping[str, bool],
    keys: Collection[str],
    takes: Callable[[str], Takes],
) -> tuple[list[str], list[str]]:
    """Splits ``words`` into those that remain, and ``key=value`` for each ``--key value`` and
    ``--key=value`` of ``keys``.

    ``options``: the command's options, and whether a value always follows. ``takes``: what follows
    a key; a key that may stand alone is then true.

    ``ConfigError``: an unknown option, with the nearest known one; a key without its value.
    """
    rest: list[str] = []
    overrides: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        match = _LONG.fullmatch(word)
        if word == "--":
            rest += [word, *left]
            break
        if match is None or f"--{match[1]}" in options:
            rest.append(word)
            if options.get(word) and left:
                rest.append(left.pop(0))
            continue
        key = match[1].replace("-", "_")
        if key.removeprefix("kt_config.") in keys:
            value = match[2] if match[2] is not None else _value(word, left, options, takes(key))
            overrides.append(f"{key}={value}")
        elif any(option.startswith(f"--{match[1]}") for option in options):
            rest.append(word)  # an abbreviated option, which argparse allows
        else:
            raise ConfigError(_unknown(match[1], options, keys))
    return rest, overrides


def _value(word: str, left: list[str], options: Mapping[str, bool], takes: Takes) -> str:
    """Takes the value from the front of ``left``."""
    if left and left[0] not in options and not left[0].startswith("--"):
        # The configuration or an override may follow a flag.
        if takes != "flag" or not (_FILE.fullmatch(left[0]) or "=" in left[0]):
            return left.pop(0)
    elif takes == "value":
        raise ConfigError(f"{word}: expected a value, as in {word} VALUE")
    return "true"


def _unknown(name: str, options: Mapping[str, bool], keys: Collection[str]) -> str:
    long = [option.removeprefix("--") for option in options if option.startswith("--")]
    hint = nearest(name, [*long, *keys])
    if meant := MEANT.get(name.lower().replace("-", "_")):
        hint = f" (did you mean {meant!r}?)"
    hint = hint.replace("mean '", "mean '--")
    return f"unknown option --{name}{hint}; keys of the configuration are key=value or --key value"
