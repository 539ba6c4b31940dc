"""Writes README's table of templates (``python templates_table.py``); a test compares it."""

import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from ktrt.prompt.template.table import TemplateSpec
from ktrt.prompt.template.table.chatml import CHATML_TEMPLATES
from ktrt.prompt.template.table.marked import MARKED_TEMPLATES
from ktrt.prompt.template.table.plain import PLAIN_TEMPLATES

README = Path(__file__).parents[3] / "README.md"
_START = "<!-- templates: LLaMA-Factory 0.9.5 (python tests/python/helpers/templates_table.py) -->"
_END = "<!-- templates: end -->"
_KINDS: dict[str, Mapping[str, TemplateSpec]] = {
    "ChatML": CHATML_TEMPLATES,
    "other special tokens": MARKED_TEMPLATES,
    "words": PLAIN_TEMPLATES,
}


def current_block() -> str:
    """Returns the block in README.md with its markers; empty if there is none."""
    text = README.read_text("utf-8")
    start = text.find(_START)
    return text[start : text.index(_END) + len(_END)] if start >= 0 else ""


def table_block() -> str:
    lines = [
        _START,
        "| turns are marked by | names, and the models that they are for |",
        "|---|---|",
    ]
    for kind, rows in _KINDS.items():
        thinking, plain = (
            ", ".join(
                f"`{name}` ({spec.models})"
                for name, spec in sorted(rows.items())
                if (spec.thought is not None) is reasoning
            )
            for reasoning in (True, False)
        )
        lines.append(f"| {kind} | {plain} |")
        if thinking:
            lines.append(f"| {kind}; thinking can be switched off | {thinking} |")
    return "\n".join([*lines, _END])


def main() -> None:
    old = current_block()
    if not old:
        sys.exit(f"{README} has no block of templates: put {_START} and {_END} there")
    README.write_text(README.read_text("utf-8").replace(old, table_block()), "utf-8")


if __name__ == "__main__":
    main()
