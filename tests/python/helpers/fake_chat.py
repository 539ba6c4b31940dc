"""``python fake_chat.py [chat arguments]``: ktrt.chat over a session that echoes, without torch.

Besides echoing, it understands: ``slow`` streams for ever, ``fail`` fails in the middle of an
answer, ``bug`` fails as only a defect does, ``history`` tells the turns it was given.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Self

from ktrt.chat import main
from ktrt.config import Config
from ktrt.errors import KtrtError


class EchoSession:
    """Stands in for ktrt.session.Session."""

    def __init__(self) -> None:
        self.closed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def stream_responses(self, messages: Sequence[Mapping[str, str]]) -> Iterator[Any]:
        """The last message, twice, piece by piece."""
        for text in self._pieces(messages):
            yield SimpleNamespace(text=text, summary=lambda: "some tokens")

    def _pieces(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        text = messages[-1]["content"]
        if text == "history":
            yield " | ".join(f"{turn['role']}: {turn['content']}" for turn in messages[:-1])
        elif text == "slow":
            for number in range(10_000):
                yield f"{number} "
                time.sleep(0.02)
        elif text == "fail":
            yield "half an "
            raise KtrtError("the engine is out of order")
        elif text == "bug":
            raise ZeroDivisionError("by zero")
        elif text != "silence":
            yield from (text, " ", text)


def open_session(config: Config) -> Any:
    """The stand-in for ktrt.api.open_session."""
    if config.sampling.seed == 13:
        raise KtrtError("no such luck")
    return EchoSession()


if __name__ == "__main__":
    sys.exit(main(open_session=open_session))
