"""The table of templates in docs/models.md: ``make docs`` writes it, a test compares it."""

import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[3])]

from helpers.documents import DOCS, generated, replace_generated

from ktrt.prompt.template.table import TemplateSpec
from ktrt.prompt.template.table.chatml import CHATML_TEMPLATES
from ktrt.prompt.template.table.marked import MARKED_TEMPLATES
from ktrt.prompt.template.table.plain import PLAIN_TEMPLATES

DOCUMENT = DOCS / "models.md"
_START = "<!-- templates: LLaMA-Factory 0.9.5 (make docs) -->"
_END = "<!-- templates: end -->"
_KINDS: dict[str, Mapping[str, TemplateSpec]] = {
    "ChatML": CHATML_TEMPLATES,
    "other special tokens": MARKED_TEMPLATES,
    "words": PLAIN_TEMPLATES,
}


def current_block() -> str:
    """The block in the document, markers included; empty if there is none."""
    return generated(DOCUMENT, _START, _END)


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
    replace_generated(DOCUMENT, _START, _END, table_block())


if __name__ == "__main__":
    main()
