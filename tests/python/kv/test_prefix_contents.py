"""Keys and values of one adapter are never reused for another, whatever their names: answers and
logits equal a fresh session's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.many_adapters import ask, forget, load, make_folder

from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ktrt.generate.response import Response
    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

P = ask("hello, who are you? 你好，请介绍一下你自己。")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("prefixes"))


@pytest.fixture(scope="module")
def cold(folder: Path) -> Iterator[Session]:
    with load(folder) as session:
        yield session


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    with load(folder, ("a", "b", "router", "dora")) as session:
        yield session


def answer(session: Session, adapter: Any) -> Response:
    return session.chat(P, adapter=adapter)


def logits(session: Session, adapter: str | None) -> torch.Tensor:
    """The logits after the prompt, computed as a step on whatever is held."""
    runner, prompt = session._open().runner, session.template.encode(P)
    choice = session.adapters.choose(adapter)
    assert choice.row is not None
    slot = runner.pool.open(choice.key, prompt)
    ids = prompt[slot.length :]
    (found,) = runner.run(Step((Span(slot=slot, ids=ids, adapter=choice.row),)))
    runner.pool.close(slot)
    return found[-1]


@pytest.mark.parametrize("second", ["b", "router", {"a": 0.5}, {"a": 1.0, "b": 1.0}], ids=str)
def test_adapters_in_turn(session: Session, cold: Session, second: Any) -> None:
    order = ("a", second, "a", None, "a", second, None)
    found = [answer(session, adapter) for adapter in order]
    for adapter, each in zip(order, found, strict=True):
        forget(cold)
        assert each.token_ids == answer(cold, adapter).token_ids
    # Each prompt came for the first time with its adapter, or was held but for the last token.
    first = [index == order.index(adapter) for index, adapter in enumerate(order)]
    prompt = found[0].prompt_tokens
    assert [each.reused_tokens for each in found] == [0 if new else prompt - 1 for new in first]
    assert len({tuple(found[index].token_ids) for index in (0, 1, 3)}) == 3, "adapters matter"


def test_another_adapter_under_the_same_name(session: Session, cold: Session, folder: Path) -> None:
    first = answer(session, "a")
    session.adapters.unload("a")
    session.adapters.load("a", folder / "c")
    renamed = answer(session, "a")
    assert renamed.reused_tokens == 0
    forget(cold)
    assert renamed.token_ids == answer(cold, "c").token_ids != first.token_ids
    session.adapters.unload("a")
    session.adapters.load("again", folder / "a")
    back = answer(session, "again")
    assert back.token_ids == first.token_ids
    assert back.reused_tokens == back.prompt_tokens - 1, "the same contents under another name"


def test_logits_of_rows_equal_cold_ones(session: Session, cold: Session, folder: Path) -> None:
    order = ("a", "b", "a", None, "b")
    found = [logits(session, adapter) for adapter in order]
    session.adapters.unload("a")
    session.adapters.load("a", folder / "c")
    found.append(logits(session, "a"))
    for index, (adapter, each) in enumerate(zip((*order, "c"), found, strict=True)):
        forget(cold)
        expected = logits(cold, adapter)
        if adapter in order[:index]:
            # The last token alone after a held prompt: the same numbers in another order.
            expected = logits(cold, adapter)
        assert torch.equal(each, expected), index


def test_new_numbers_in_place_are_not_mixed_with_old_ones(session: Session) -> None:
    before = answer(session, "a")
    session.adapters.refresh()
    after = answer(session, "a")
    assert after.reused_tokens == 0
    assert after.token_ids == before.token_ids
