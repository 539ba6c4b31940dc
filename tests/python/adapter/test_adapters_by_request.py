"""Requests with different adapters in one session, over a tiny MoE model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.resident_folder import NAMES, save_residents
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import token_ids

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs, SamplingArgs, TemplateArgs
from ktrt.errors import AdapterError, KtrtError
from ktrt.loading.model import load_model
from ktrt.prompt.template.load import load_template
from ktrt.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = [{"role": "user", "content": "hello, who are you?"}]
OTHER = [{"role": "user", "content": "你好，请介绍一下你自己。"}]
SUM = {"a": 0.5, "b": 1.0}
ALL: tuple[Any, ...] = (*NAMES, None, SUM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_residents(tmp_path_factory.mktemp("adapters"))


def open_session(folder: Path, *names: str, dtype: Any = "bfloat16") -> Session:
    adapters = AdapterArgs(adapters={name: folder / name for name in names})
    model = ModelArgs(folder / "base", infer_dtype=dtype)
    loaded = load_model(model, adapters, ExpertArgs(kt_num_threads=1, kt_fixed_kernels=True))
    tokenizer = make_tokenizer(vocab_size=380)
    args = SamplingArgs(do_sample=False, max_new_tokens=8)
    return Session(loaded, tokenizer, load_template(TemplateArgs("default"), tokenizer), args)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def session(folder: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    with open_session(folder, *NAMES, dtype=request.param) as session:
        yield session


@pytest.fixture(scope="module")
def alone(session: Session) -> dict[str, tuple[int, ...]]:
    """The answers with one adapter after the other active in the model."""
    found = {}
    for adapter in ALL:
        session.adapters.activate({} if adapter is None else adapter)
        found[repr(adapter)] = session.chat(ASK).token_ids
    session.adapters.activate("a")
    assert len(set(found.values())) == len(ALL)
    return found


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Session]:
    with open_session(folder, *NAMES) as session:
        yield session


@pytest.fixture
def bf16(shared: Session) -> Session:
    shared.adapters.activate("a")
    return shared


def logits(session: Session) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = session.model(token_ids(1, 30)).logits
    return found


class TestChoices:
    def test_rows_and_turns(self, bf16: Session) -> None:
        """Names what rows of a step can choose; the others have a reason and take turns."""
        adapters = bf16.adapters
        for name in ("a", "b", "attention"):
            choice = adapters.choose(name)
            assert (choice.weights, choice.row) == (((name, 1.0),), adapters.number(name))
        assert adapters.choose(None).row == adapters.number(None) == -1
        assert adapters.choose({"a": 0}) == adapters.choose(None)
        turns: tuple[Any, ...] = ("router", "saved", "dora", {"a": 0.5}, {"a": 1, "b": 1})
        for turn in turns:
            assert adapters.choose(turn).row is None, turn
        assert adapters.choose() == adapters.choose("a")
        adapters.scale(0.5)
        assert adapters.choose() == adapters.choose({"a": 0.5})
        with pytest.raises(AdapterError, match="no adapter 'c'"):
            adapters.choose("c")

    def test_what_acts_in_a_step(self, bf16: Session) -> None:
        """``prepare`` switches the model as little as it can, and ``active`` stays."""
        adapters = bf16.adapters
        alone = {}
        for name in ("b", "router", "a"):
            adapters.activate(name)
            alone[name] = logits(bf16)
        adapters.off()
        alone["base"] = logits(bf16)
        adapters.on()
        a, b, router = (adapters.choose(name) for name in ("a", "b", "router"))
        changes = adapters.active_set.changes
        assert adapters.prepare([a])
        assert not adapters.prepare([a, b])
        assert not adapters.prepare([b])
        assert adapters.active_set.changes == changes
        assert adapters.prepare([router])
        assert adapters.active == {"a": 1.0}
        assert torch.equal(logits(bf16), alone["router"])
        assert not adapters.prepare([a, b])
        assert torch.equal(logits(bf16), alone["base"])
        assert adapters.prepare([router])
        assert adapters.prepare([b])
        assert torch.equal(logits(bf16), alone["b"])
        adapters.restore()
        assert adapters.prepare([b], by_row=False)
        assert torch.equal(logits(bf16), alone["b"])
        adapters.restore()
        assert torch.equal(logits(bf16), alone["a"])

    def test_kept_steps(self, bf16: Session, folder: Path) -> None:
        """Only modules that change themselves, loads, unloads and renewals outdate kept steps."""
        adapters, found = bf16.adapters, bf16.adapters.active_set
        before = found.structure
        same: tuple[Any, ...] = ("b", {"a": 0.5, "b": 2}, {})
        for change in same:
            adapters.activate(change)
            assert found.structure == before
        others: tuple[Any, ...] = ("router", {"router": 0.5}, "saved", "dora")
        changed = []
        for change in others:
            adapters.activate(change)
            changed.append(found.structure)
        assert len({before, *changed}) == 5
        adapters.activate("router")
        assert found.structure == changed[0]
        adapters.activate("a")
        assert found.structure == before
        seen = {before}
        calls: tuple[Callable[[], None], ...] = (
            lambda: adapters.load("x", folder / "attention"),
            lambda: adapters.unload("x"),
            adapters.refresh,
        )
        for count, call in enumerate(calls, start=2):
            call()
            seen.add(found.structure)
            assert len(seen) == count


def test_a_batch_of_all_kinds(session: Session, alone: dict[str, tuple[int, ...]]) -> None:
    requests = [{"messages": ASK, "adapter": adapter} for adapter in ALL]
    found = session.batch([*requests, {"messages": ASK}])
    for adapter, answer in zip([*ALL, "a"], found, strict=True):
        assert answer.token_ids == alone[repr(adapter)], adapter
    assert session.adapters.active == {"a": 1.0}
    assert session.chat(ASK).token_ids == alone[repr("a")]


def test_an_answer_of_another_adapter(session: Session, alone: dict[str, tuple[int, ...]]) -> None:
    for adapter in ("b", None, "router", SUM):
        found = session.chat(ASK, adapter=adapter)
        assert found.token_ids == alone[repr(adapter)]
        assert "".join(session.stream(ASK, adapter=adapter)) == found.text
    assert session.adapters.active == {"a": 1.0}


def test_answers_interleave(session: Session, alone: dict[str, tuple[int, ...]]) -> None:
    streams = {repr(each): session.stream_responses(ASK, adapter=each) for each in ("a", "dora")}
    tokens: dict[str, list[int]] = {name: [] for name in streams}
    for _ in range(8):
        for name, stream in streams.items():
            tokens[name] += [next(stream).token]
    assert {name: tuple(each) for name, each in tokens.items()} == {n: alone[n] for n in streams}


def test_an_answer_keeps_its_adapters(session: Session, alone: dict[str, tuple[int, ...]]) -> None:
    """Whatever becomes active meanwhile."""
    responses = session.stream_responses(ASK)
    tokens = [next(responses).token]
    session.adapters.activate("router")
    tokens += [each.token for each in responses]
    assert tuple(tokens) == alone[repr("a")]
    assert session.chat(ASK).token_ids == alone[repr("router")]
    session.adapters.activate("a")


def test_no_prefix_across_adapters(folder: Path) -> None:
    """A(p), B(p), A(p), base(p), then another adapter under A's name: as in a cold session."""

    def cold(name: str | None) -> tuple[int, ...]:
        with open_session(folder, *([name] if name else [])) as session:
            return session.chat(ASK).token_ids

    with open_session(folder, "a", "b") as session:
        for adapter in ("a", "b", "a", None):
            assert session.chat(ASK, adapter=adapter).token_ids == cold(adapter)
        session.adapters.activate("b")
        session.adapters.unload("a")
        session.adapters.load("a", folder / "attention")
        found = session.chat(ASK, adapter="a")
        assert (found.token_ids, found.reused_tokens) == (cold("attention"), 0)
        session.adapters.load("c", folder / "b")
        assert session.chat(ASK, adapter="b").reused_tokens > 0
        assert session.chat(ASK, adapter="c").reused_tokens > 0, "the same contents"


class TestLoadingMeanwhile:
    def test_between_steps(self, folder: Path) -> None:
        with open_session(folder, "a", "b") as session:
            expected = session.chat(ASK, adapter="a", max_new_tokens=60).token_ids
            handle = session.submit(ASK, adapter="a", max_new_tokens=60)
            next(handle)
            session.adapters.load("late", folder / "attention")
            late = session.submit(OTHER, adapter="late").result(60)
            assert handle.result(60).token_ids == expected
            session.adapters.unload("late")
            assert late.text == session.chat(OTHER, adapter=None).text or late.text
            with pytest.raises(AdapterError, match="no adapter 'late'"):
                session.submit(ASK, adapter="late")

    @pytest.mark.parametrize("adapter", ["router", "saved", "dora", SUM])
    def test_next_to_one_with_turns_of_its_own(self, folder: Path, adapter: Any) -> None:
        """A load has the active adapters act in the model; the answer's act again after it."""
        with open_session(folder, *NAMES) as session:
            expected = session.chat(ASK, adapter=adapter).token_ids
            responses = session.stream_responses(ASK, adapter=adapter)
            tokens = [next(responses).token]
            session.adapters.load("late", folder / "attention")
            tokens += [next(responses).token]
            session.adapters.unload("late")
            tokens += [next(responses).token]
            with pytest.raises(AdapterError):
                session.adapters.load("bad", folder / "base")
            assert (*tokens, *(each.token for each in responses)) == expected

    def test_loaded_again_before_the_answer_begins(self, folder: Path) -> None:
        """The same contents have another number then."""
        with open_session(folder, "a", "b") as session:
            responses = session.stream_responses(ASK, adapter="b")
            session.adapters.unload("b")
            session.adapters.load("b", folder / "b")
            with pytest.raises(AdapterError, match="b were changed before the answer began"):
                next(responses)
            assert not +session.adapters._users

    def test_refreshed_while_it_waits(self, folder: Path) -> None:
        """Tokens that are held for the adapters' old numbers are not reused."""
        with open_session(folder, "a", "b") as session:
            session.chat(ASK, adapter="b")
            handle = session.submit(ASK, adapter="b")
            handle.pause()
            session.adapters.refresh()
            handle.resume()
            with pytest.raises(KtrtError, match="were changed"):
                handle.result(60)
            assert not +session.adapters._users

    def test_one_that_is_used_is_not_unloaded(self, folder: Path) -> None:
        with open_session(folder, "a", "b") as session:
            stream = session.stream(ASK, adapter="b")
            next(stream)
            with pytest.raises(AdapterError, match="'b' is used by 1 answer "):
                session.adapters.unload("b")
            del stream
            session.adapters.unload("b")
            assert session.adapters.names == ("a",)
