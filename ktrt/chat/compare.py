"""``/compare``: shows the adapter's effect on one message."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ktrt.chat.dialog import Talk
from ktrt.errors import KtrtError

# Narrower terminals show the answers one after the other.
_MIN_WIDTH = 80


def compare(talk: Talk, text: str) -> None:
    """Answers ``text`` in the conversation without and with the adapter, from the same seed;
    neither answer becomes part of the conversation. ``KtrtError``: no adapter is loaded."""
    adapters = talk.adapters
    seed = talk.sampling.seed
    seed = secrets.randbelow(2**31) if seed is None else seed
    side_by_side = talk.terminal.interactive and talk.terminal.width >= _MIN_WIDTH
    messages = talk.fitted(text)
    found: list[tuple[str, str]] = []
    with _restored(talk):
        for tuned in (False, True):
            (adapters.on if tuned else adapters.off)()
            if tuned and not adapters.active:
                raise KtrtError("/compare: no adapter is active; /adapter NAME activates one")
            name = " + ".join(adapters.active) if tuned else "base model"
            quiet = side_by_side or talk.as_json
            answer = talk.generate(messages, _show(talk, name, quiet=quiet), seed=seed)
            if talk.as_json:
                talk.record(answer, answered_by=name)
            found.append((name, answer.text))
            if not answer.complete:
                break
    if side_by_side and len(found) == 2:
        talk.terminal.columns(*found)
    elif side_by_side:
        talk.terminal.note("Stopped.")


def _show(talk: Talk, name: str, *, quiet: bool) -> Callable[[Iterable[str]], str]:
    def show(pieces: Iterable[str]) -> str:
        if quiet:
            return talk.terminal.collect(pieces, name)
        return talk.terminal.answer(pieces, f"{name}: ")

    return show


@contextmanager
def _restored(talk: Talk) -> Iterator[None]:
    """Restores the adapter's state after the block."""
    adapters = talk.adapters
    was_on = bool(adapters.active)
    try:
        yield
    finally:
        (adapters.on if was_on else adapters.off)()
