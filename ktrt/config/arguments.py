"""Keys on a command line: ``--key value`` as people write it, into ``key=value``."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from ktrt.config.check import nearest
from ktrt.config.keys import MEANT
from ktrt.errors import ConfigError

_LONG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
# What follows a key: a value always, one that may be missing, or a boolean that may be missing.
Takes = Literal["value", "any", "flag"]
_FILE = re.compile(r".+\.(yaml|yml|json)")


def convert_options(
    words: Sequence[str],
    options: Mapping[str, bool],
    keys: Collection[str],
    takes: Callable[[str], Takes],
) -> tuple[list[str], list[str]]:
    """``words`` without ``--key value`` and ``--key=value`` of ``keys``; these as ``key=value``.

    ``options``: the command's own, and whether a value always follows. ``takes``: what a key needs;
    one that stands alone is true where it may.

    ``ConfigError``: an option that is neither, with the nearest one; a key without its value.
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
            rest.append(word)  # an option cut short, as argparse allows
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
