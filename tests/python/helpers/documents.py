"""The project's documents: their code blocks, links and generated blocks."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "README.md"
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"(?:^<!-- (?P<marks>[^\n]*?) -->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``marks``: the comment in the line above it, which controls its test."""

    document: Path
    line: int
    language: str
    marks: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def documents() -> list[Path]:
    """Returns the documents for users and developers, without generated files."""
    folders = [ROOT, DOCS, ROOT / "csrc", *sorted((ROOT / "examples").iterdir())]
    return [path for folder in folders for path in sorted(folder.glob("*.md"))]


def guides() -> list[Path]:
    """Returns the documents whose blocks are executed: README.md, docs/ and the examples'."""
    return [README, *sorted(DOCS.glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def blocks(document: Path, *languages: str) -> list[Block]:
    """Returns the fenced blocks of ``document`` in one of ``languages``."""
    text = document.read_text("utf-8")
    return [
        Block(
            document,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["marks"] or "",
            match["text"],
        )
        for match in _FENCE.finditer(text)
        if match["language"] in languages
    ]


def prose(document: Path) -> str:
    """Returns ``document`` without its fenced blocks."""
    text = document.read_text("utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(document: Path) -> list[str]:
    """Returns the texts in backticks, with Markdown's escapes resolved."""
    found = re.findall(r"`([^`\n]+)`", prose(document))
    return [each.replace(r"\|", "|") for each in found]


def commands(document: Path) -> list[str]:
    """Returns command lines: of bash blocks, after ``$`` in console blocks, and in backticks."""
    lines = [line for block in blocks(document, "bash") for line in block.text.splitlines()]
    for block in blocks(document, "console"):
        lines += [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    return [part.strip() for line in [*lines, *inline_code(document)] for part in line.split(" | ")]


def words(command: str) -> list[str]:
    """Returns a command line's words, without leading environment variables and comments."""
    try:
        found = shlex.split(command, comments=True)
    except ValueError:  # an apostrophe: no command
        return []
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        del found[0]
    return found


def generated(document: Path, start: str, end: str) -> str:
    """Returns the block from ``start`` to ``end``, both included; empty if there is none."""
    text = document.read_text("utf-8")
    at = text.find(start)
    return text[at : text.index(end, at) + len(end)] if at >= 0 else ""


def replace_generated(document: Path, start: str, end: str, block: str) -> None:
    """Replaces the generated block by ``block``. Raises ``ValueError`` if there is none."""
    old = generated(document, start, end)
    if not old:
        raise ValueError(f"{document}: no block {start} … {end}")
    document.write_text(document.read_text("utf-8").replace(old, block), "utf-8")
