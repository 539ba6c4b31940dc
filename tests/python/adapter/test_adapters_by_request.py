"""Requests with different adapters in one session, over a tiny MoE model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.resident_folder import NAMES, save_residents
from helpers.tiny_chat import make_tokenizer

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs, SamplingArgs, TemplateArgs
from ktrt.errors import AdapterError
from ktrt.loading.model import load_model
from ktrt.prompt.template.load import load_template
from ktrt.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = [{"role": "user", "content": "hello, who are you?"}]
OTHER = [{"role": "user", "content": "你好，请介绍一下你自己。"}]
SUM = {"a": 0.5, "b": 1.0}
ALL: tuple[Any, ...] = (*NAMES, None, SUM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_residents(tmp_path_factory.mktemp("adapters"))


def open_session(folder: Path, *names: str, dtype: str = "bfloat16") -> Session:
    adapters = AdapterArgs(adapters={name: folder / name for name in names})
    model = ModelArgs(folder / "base", infer_dtype=dtype)
    loaded = load_model(model, adapters, ExpertArgs(kt_num_threads=1))
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

    def test_one_that_is_used_is_not_unloaded(self, folder: Path) -> None:
        with open_session(folder, "a", "b") as session:
            stream = session.stream(ASK, adapter="b")
            next(stream)
            with pytest.raises(AdapterError, match="'b' is used by 1 answer "):
                session.adapters.unload("b")
            del stream
            session.adapters.unload("b")
            assert session.adapters.names == ("a",)
