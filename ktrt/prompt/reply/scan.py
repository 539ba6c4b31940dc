"""Text that is there, and marks in it that may be incomplete."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ktrt.prompt.reply.events import Event


@dataclass
class Source:
    """The text not yet taken, and the events found. ``raw`` is text that was taken and belongs to
    no event yet: if it is no call, it is content. ``ended``: no more text comes."""

    text: str = ""
    raw: str = ""
    ended: bool = False
    events: list[Event] = field(default_factory=list)

    def take(self, length: int) -> str:
        """Removes the first characters and returns them."""
        found, self.text = self.text[:length], self.text[length:]
        return found

    def take_raw(self, length: int) -> None:
        """Moves the first characters to ``raw``."""
        self.raw += self.take(length)

    def take_events(self) -> list[Event]:
        """Removes the events and returns them."""
        found, self.events = self.events, []
        return found


def first_of(
    text: str,
    marks: Iterable[str],
    is_allowed: Callable[[str, int, str], bool] = lambda *_: True,
) -> tuple[int, str]:
    """Returns the first mark in the text, the longest of several at one place, and where it is;
    (0, "") for none."""
    found: tuple[int, int, str] | None = None
    for mark in marks:
        at = text.find(mark) if mark else -1
        while at >= 0 and not is_allowed(text, at, mark):
            at = text.find(mark, at + 1)
        if at >= 0 and (found is None or (at, -len(mark)) < found[:2]):
            found = at, -len(mark), mark
    return (0, "") if found is None else (found[0], found[2])


def held_length(text: str, marks: Iterable[str]) -> int:
    """Returns the length of the longest end of the text that begins a mark."""
    longest = 0
    for mark in marks:
        for length in range(min(len(text), len(mark) - 1), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


def starts_with(text: str, marks: Iterable[str], *, ended: bool) -> str | None:
    """Returns the longest mark that the text starts with; "" for none; None if a longer text may
    start with one (another one)."""
    found = ""
    for mark in marks:
        if not mark:
            continue
        if text.startswith(mark):
            found = mark if len(mark) > len(found) else found
        elif not ended and mark.startswith(text):
            return None
    return found
