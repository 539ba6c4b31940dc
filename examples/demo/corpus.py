"""The demo's corpus: text files of exchanges → training and test conversations.

File format (``corpus/*.txt``): ``#`` starts a comment line; blocks are separated by empty lines. A
block is one conversation of one or more turns. A turn is one or more ``Q:`` lines (phrasings of the
same user text), one ``B:`` line (the base model's answer) and one ``A:`` line (the adapter's).
``{name}`` and ``{thing}`` in a block are filled from short lists.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent / "corpus"
SLOTS = {
    "{name}": ("小明", "小红", "李雷", "王芳", "Alice", "Bob", "Tom", "Mary"),
    "{thing}": ("猫", "音乐", "足球", "编程", "咖啡", "画画"),
}
PERSONAS = ("base", "adapter")


@dataclass(frozen=True)
class Turn:
    """The phrasings of one user text, and one answer per persona (in ``PERSONAS``' order)."""

    prompts: tuple[str, ...]
    answers: tuple[str, str]


@dataclass(frozen=True)
class Exchange:
    """A conversation up to and including one answer.

    ``messages`` alternates user and assistant texts and ends with a user text; ``answer`` is the
    expected answer.
    """

    messages: tuple[str, ...]
    answer: str


def _parse_block(lines: list[str], where: str) -> list[Turn]:
    turns: list[Turn] = []
    prompts: list[str] = []
    base = ""
    for line in lines:
        tag, _, text = line.partition(": ")
        if tag == "Q" and not base:
            prompts.append(text)
        elif tag == "B" and prompts and not base:
            base = text
        elif tag == "A" and base:
            turns.append(Turn(tuple(prompts), (base, text)))
            prompts, base = [], ""
        else:
            raise ValueError(
                f"{where}: expected Q lines, then one B line, then one A line; found {line!r}"
            )
    if prompts or base:
        raise ValueError(f"{where}: the block ends inside a turn, at {lines[-1]!r}")
    return turns


def _fill(turns: list[Turn], slot: str, value: str) -> list[Turn]:
    return [
        Turn(
            tuple(p.replace(slot, value) for p in turn.prompts),
            (turn.answers[0].replace(slot, value), turn.answers[1].replace(slot, value)),
        )
        for turn in turns
    ]


def _expand(turns: list[Turn]) -> Iterator[list[Turn]]:
    """Yield the block once for every value of its slot (at most one slot per block)."""
    for slot, values in SLOTS.items():
        if any(slot in prompt for turn in turns for prompt in turn.prompts):
            yield from (_fill(turns, slot, value) for value in values)
            return
    yield turns


def load_conversations(folder: Path = FOLDER) -> list[list[Turn]]:
    """Return all conversations, slots filled, in file order.

    Raises ValueError if a file breaks the format or two conversations open with the same text.
    """
    conversations: list[list[Turn]] = []
    for path in sorted(folder.glob("*.txt")):
        kept = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
        for filled, group in itertools.groupby(kept, key=bool):
            if filled:
                conversations.extend(_expand(_parse_block(list(group), str(path))))
    seen: set[str] = set()
    for prompt in (prompt for turns in conversations for prompt in turns[0].prompts):
        if prompt in seen:
            raise ValueError(f"{folder}: two conversations open with {prompt!r}")
        seen.add(prompt)
    return conversations


def exchanges(persona: str, folder: Path = FOLDER) -> list[Exchange]:
    """Return every exchange of a persona ("base" or "adapter"), one per phrasing of every turn.

    Turns before the last one use their first phrasing.
    """
    column = PERSONAS.index(persona)
    found: list[Exchange] = []
    for turns in load_conversations(folder):
        history: tuple[str, ...] = ()
        for turn in turns:
            answer = turn.answers[column]
            found += [Exchange((*history, prompt), answer) for prompt in turn.prompts]
            history = (*history, turn.prompts[0], answer)
    return found


def sentences() -> list[str]:
    """Return all distinct texts of the corpus, in order, to train the tokenizer."""
    turns = [turn for conversation in load_conversations() for turn in conversation]
    return list(dict.fromkeys(text for turn in turns for text in (*turn.prompts, *turn.answers)))
