"""Switches the demo's adapters within one session: the answers equal each adapter alone.

On a GPU this runs decode graphs, the hand-off and the GPU's linears with every switch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ktrt

if TYPE_CHECKING:
    from ktrt.session import Session

DEMO = Path(__file__).parents[3] / "examples" / "demo"
NAMES = ("adapter_a", "adapter_b")
QUESTIONS = ("你好，请介绍一下你自己。", "Who are you?")


def ask(session: Session, *, same: bool = False) -> list[str]:
    """Asks two turns: prefill, decode, and a prefill on a kept cache. ``same``: the active adapters
    were asked before; otherwise no other adapters' cache must be used."""
    messages: list[dict[str, str]] = []
    answers = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        responses = list(session.stream_responses(messages, do_sample=False, max_new_tokens=16))
        assert (responses[-1].reused_tokens > 0) == (same or len(messages) > 1)
        answers.append("".join(each.text for each in responses))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def load(*names: str) -> Session:
    adapters = {name: str(DEMO / name) for name in names}
    # Overrides the adapter of the file.
    return ktrt.load(DEMO / "chat.yaml", adapter_name_or_path=None, adapters=adapters)


@pytest.mark.end_to_end
def test_switched_answers_equal_each_adapter_alone() -> None:
    expected = {}
    for name in NAMES:
        with load(name) as session:
            expected[name] = ask(session)
            session.adapters.off()
            expected["base"] = ask(session)
    assert all(a != b for a, b in pairwise(expected.values())), "the adapters must matter"
    with load(*NAMES) as session:
        names = ("adapter_a", "base", "adapter_b")
        for number, name in enumerate([*names, *names]):
            session.adapters.activate({} if name == "base" else name)
            assert ask(session, same=number >= len(names)) == expected[name], name
        session.adapters.activate({"adapter_a": 1.0, "adapter_b": 1.0})
        assert ask(session) not in expected.values()
        session.adapters.activate({"adapter_a": 0.0, "adapter_b": 1.0})
        assert ask(session, same=True) == expected["adapter_b"]


def test_an_adapter_that_is_loaded_later() -> None:
    with load("adapter_b") as session:
        expected = ask(session)
    with load() as session:
        base = ask(session)
        session.adapters.load("late", DEMO / "adapter_b")
        assert ask(session, same=True) == base
        session.adapters.activate("late")
        assert ask(session) == expected
        session.adapters.off()
        session.adapters.unload("late")
        assert ask(session, same=True) == base
