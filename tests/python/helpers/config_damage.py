"""Random damage (seeded) to JSON objects: one value changed, dropped or moved."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

# Replacements of a value.
_VALUES: list[tuple[str, Any]] = [
    ("null", None), ("a negative number", -3), ("zero", 0), ("a huge number", 10**9),
    ("a number beyond 64 bits", 10**20), ("a fraction", 0.37), ("text", "four"), ("no text", ""),
    ("true", True), ("an empty list", []), ("a list", [1, "two", None]), ("an empty object", {}),
    ("an object", {"a": {"b": [1]}}), ("not a number", float("nan")),
]  # fmt: skip


def damaged(config: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Returns a description of the damage, and the damaged copy."""
    result = copy.deepcopy(config)
    path, parent, key = rng.choice(list(_places(result)))
    value = parent[key]
    kind = rng.choice(["drop", "text of it", "nested", *(["other"] * 9)])
    if kind == "drop" and isinstance(parent, dict):
        del parent[key]
    elif kind == "text of it":
        parent[key] = json.dumps(value)
    elif kind == "nested":
        parent[key] = {str(key): value}
    else:
        kind, parent[key] = rng.choice(_VALUES)
    return f"{path}: {kind}", result


def _places(value: Any, path: str = "") -> Any:
    """Yields every key and index, with its container."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        where = f"{path}.{key}" if path else str(key)
        yield where, value, key
        if isinstance(inner, (dict, list)):
            # The first entries of a long list represent all.
            yield from list(_places(inner, where))[: 2 if isinstance(inner, list) else None]
