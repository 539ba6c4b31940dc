"""What a folder is, by the names of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NAMED = 4


def names_in(folder: Path) -> list[str]:
    """The names of what lies in ``folder``, sorted; empty if it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def describe_folder(folder: Path) -> str:
    """What lies in ``folder``, for the middle of a sentence."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"nothing that can be read ({(error.strerror or str(error)).lower()})"
    if not names:
        return "an empty folder"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
