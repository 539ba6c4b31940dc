"""How this process was called, for usage lines."""

import sys
from pathlib import Path


def program(verb: str | None = None) -> str:
    """Returns ``ktrt VERB``, ``python -m ktrt VERB`` or ``python -m ktrt.VERB``; without a verb,
    ``ktrt`` or ``python -m ktrt``."""
    script = Path(sys.argv[0] if sys.argv else "")
    if script.name == "ktrt":
        name = "ktrt"
    elif verb is None or script.parts[-2:] == ("ktrt", "__main__.py"):
        name = "python -m ktrt"
    else:
        return f"python -m ktrt.{verb}"
    return f"{name} {verb}" if verb else name
