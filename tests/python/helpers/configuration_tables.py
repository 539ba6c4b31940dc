"""Tables of docs/configuration.md: ``make docs`` writes them, a test compares them.

Keys, types and defaults come from the dataclasses, meanings from configuration_meanings.py.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[3])]

from helpers.configuration_meanings import (
    KT_CONFIG_KEYS,
    MEANINGS,
    OWN_KEYS,
    SHOWN_DEFAULTS,
)
from helpers.documents import DOCS, generated, replace_generated

from ktrt.config import (
    AdapterArgs,
    ExpertArgs,
    ModelArgs,
    SamplingArgs,
    SchedulerArgs,
    TemplateArgs,
)
from ktrt.config.keys import IGNORED, MEANT, NOTED, REFUSED
from ktrt.config.load import _ALIASES, _Switches

DOCUMENT = DOCS / "configuration.md"
END = "<!-- generated: end -->"
SECTIONS = {
    "model": ModelArgs,
    "adapter": AdapterArgs,
    "experts": ExpertArgs,
    "template": TemplateArgs,
    "sampling": SamplingArgs,
    "scheduler": SchedulerArgs,
    "switches": _Switches,
}


def start(name: str) -> str:
    return f"<!-- generated: {name} (make docs) -->"


def tables() -> dict[str, str]:
    """Returns the generated blocks by name, with their markers."""
    found = {name: _keys(section) for name, section in SECTIONS.items()}
    found["aliases"] = _rows(
        ("spelling", "means"),
        ((f"`{spelling}`", f"`{key}`") for spelling, key in sorted(_ALIASES.items())),
    )
    found["noted"] = _rows(
        ("key", "reason"), ((f"`{key}`", reason) for key, reason in sorted(NOTED.items()))
    )
    found["refused"] = _rows(
        ("key", "accepted values", "what to do"),
        (
            (f"`{key}`", ", ".join(_value(each) for each in refusal.neutral), refusal.advice)
            for key, refusal in sorted(REFUSED.items())
        ),
    )
    found["ignored"] = f"{len(IGNORED)} keys: {', '.join(f'`{key}`' for key in sorted(IGNORED))}."
    found["meant"] = _rows(
        ("found", "suggested"), ((f"`{key}`", f"`{meant}`") for key, meant in sorted(MEANT.items()))
    )
    return {name: f"{start(name)}\n{text}\n{END}" for name, text in found.items()}


def _keys(section: type[Any]) -> str:
    columns = ("key", "value", "default", "meaning", "LLaMA-Factory")
    return _rows(
        columns,
        (
            (f"`{each.name}`", _type(each.type), _default(each), MEANINGS[each.name], _origin(each))
            for each in fields(section)
        ),
    )


def _origin(each: Field[Any]) -> str:
    if each.name in OWN_KEYS:
        return "–"
    return "same, also in `kt_config`" if each.name in KT_CONFIG_KEYS else "same"


def _type(hint: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}s"
    if get_origin(hint) is Mapping or str(hint).startswith("collections.abc.Mapping"):
        return f"mapping of names to {_type(get_args(hint)[1])}s"
    return ", ".join(_type(each) for each in get_args(hint) if each is not type(None))


def _default(each: Field[Any]) -> str:
    if each.name in SHOWN_DEFAULTS:
        return SHOWN_DEFAULTS[each.name]
    if each.default is MISSING and each.default_factory is MISSING:
        return "required"
    return _value(each.default) if each.default is not MISSING and each.default != () else "–"


def _value(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else '`""`'


def _rows(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines)


def current(name: str) -> str:
    """Returns the block ``name`` in the document; empty if there is none."""
    return generated(DOCUMENT, start(name), END)


def main() -> None:
    for name, block in tables().items():
        replace_generated(DOCUMENT, start(name), END, block)


if __name__ == "__main__":
    main()
