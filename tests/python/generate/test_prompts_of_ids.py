"""Prompts of token ids: log probabilities of their tokens, whatever chunks and company, and several
answers to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.many_adapters import ask, forget, load, make_folder
from helpers.tiny_chat import make_session

from ktrt.errors import ConfigError, EngineError, KtrtError
from ktrt.generate import prompt_scores
from ktrt.generate.prompt_scores import PromptScores
from ktrt.generate.sampling import log_probability_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 380


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
    return found


@pytest.fixture(scope="module")
def alone() -> Iterator[Session]:
    """A model whose sequences run one after the other."""
    with make_session() as session:
        assert not session._open().runner.mixes
        yield session


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def mixed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    folder: Path = make_folder(tmp_path_factory.mktemp("scores"))
    with load(folder, ("a", "b"), infer_dtype=request.param) as session:
        assert session._open().runner.mixes
        yield session


def score(session: Session, ids: Sequence[int], count: int = 2, **options: Any) -> Any:
    options = {"max_new_tokens": 0} | options
    handle = session.submit(prompt_ids=ids, prompt_logprobs=count, **options)
    response = handle.result(120)
    assert response.prompt_tokens == len(ids)
    assert response.reused_tokens == 0
    assert handle.prompt_logprobs is not None
    assert len(handle.prompt_logprobs) == len(ids)
    assert handle.prompt_logprobs[0] is None
    return handle.prompt_logprobs


@pytest.mark.parametrize("length", [2, 3, 130, 700])
def test_they_are_those_of_transformers(alone: Session, length: int) -> None:
    ids = prompt(length)
    with torch.inference_mode():
        logits = alone.model(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1)
    found = score(alone, ids)[1:]
    for row, (value, top) in enumerate(found):
        assert value == pytest.approx(float(expected[row, ids[row + 1]]), abs=2e-4)
        assert len(top) == 2
        assert top[0][1] == pytest.approx(float(expected[row].max()), abs=2e-4)
        # lm-eval's question whether the token is the one that greedy decoding takes.
        assert (value == top[0][1]) == (ids[row + 1] == top[0][0])


def test_one_token_and_none_of_the_likeliest(alone: Session) -> None:
    assert score(alone, prompt(1)) == (None,)
    found = score(alone, prompt(5), 0)
    assert all(top == () for _, top in found[1:])


def test_prompts_that_are_not_divided(alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = score(alone, prompt(700))
    monkeypatch.setattr(alone._open().runner.pool, "continues", False)
    found = score(alone, prompt(700))
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one[0] == pytest.approx(other[0], abs=2e-4)


def test_company_and_chunks_change_nothing(mixed: Session) -> None:
    ids = [*prompt(300, 1)]
    expected = {}
    for adapter in (None, "a"):
        forget(mixed)
        expected[adapter] = score(mixed, ids, adapter=adapter)
    assert expected[None] != expected["a"]
    handles = [mixed.submit(ask("hello"), max_new_tokens=30, adapter="b") for _ in range(2)]
    scored = {
        adapter: mixed.submit(prompt_ids=ids, adapter=adapter, prompt_logprobs=2, max_new_tokens=3)
        for adapter in expected
    }
    for adapter, handle in scored.items():
        assert len(handle.result(120).token_ids) == 3
        assert handle.prompt_logprobs == expected[adapter]
    assert all(handle.result(120).generated_tokens for handle in handles)


def test_the_answer_is_the_one_without_scores(mixed: Session) -> None:
    ids = prompt(200, 2)
    handle = mixed.submit(prompt_ids=ids, prompt_logprobs=1, max_new_tokens=6)
    assert handle.result(120).token_ids == mixed.submit(
        prompt_ids=ids, max_new_tokens=6
    ).result(120).token_ids  # fmt: skip
    # The first token's own logits follow the prompt's last one.
    again = mixed.submit(prompt_ids=[*ids, handle.result().token_ids[0]], prompt_logprobs=1)
    again.result(120)
    assert again.prompt_logprobs is not None
    value, ((best, largest),) = again.prompt_logprobs[-1] or (0.0, ((0, 1.0),))
    assert (value, best) == (largest, handle.result().token_ids[0])


def test_rows_are_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    rows = log_probability_rows

    def noted(logits: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(logits))
        return rows(logits, *rest)

    ids = prompt(100)
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(1))
    whole = PromptScores(ids, 2)
    whole.push(0, logits)
    monkeypatch.setattr(prompt_scores, "log_probability_rows", noted)
    parts = PromptScores(ids, 2)
    parts.push(0, logits[:70])
    parts.push(69, logits[69:])  # a token that is computed again
    assert max(sizes) <= 32
    assert sum(sizes) == 99
    assert parts.whole() == whole.whole()


def test_nan_is_an_error() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 5] = float("nan")
    with pytest.raises(KtrtError, match="NaN"):
        PromptScores(prompt(3), 1).push(0, logits)


def test_several_answers_have_one_prefill(mixed: Session) -> None:
    """The others begin with the first one's prefix, while that goes on, bit for bit."""
    ids = prompt(300, 4)
    options: dict[str, Any] = {
        "prompt_ids": ids, "do_sample": True, "temperature": 2.0, "logprobs": True,
        "max_new_tokens": 20,
    }  # fmt: skip
    alone = []
    for seed in range(3):
        forget(mixed)
        alone.append(mixed.submit(**options, seed=seed).result(120))
    forget(mixed)
    first = mixed.submit(**options, seed=0)
    next(first)
    rest = [mixed.submit(**options, seed=seed) for seed in (1, 2)]
    found = [each.result(120) for each in (first, *rest)]
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]
    assert [each.logprobs for each in found] == [each.logprobs for each in alone]
    assert len({each.token_ids for each in found}) == 3
    assert [each.reused_tokens for each in found] == [0, 299, 299]


class TestErrors:
    @pytest.mark.parametrize("count", [-1, 21, True, "2", 1.0])
    def test_the_number_is_checked(self, alone: Session, count: Any) -> None:
        with pytest.raises(ConfigError, match="prompt_logprobs: expected 0 … 20"):
            alone.submit(ask("hello"), prompt_logprobs=count)

    def test_no_tokens_only_with_scores(self, alone: Session) -> None:
        with pytest.raises(ConfigError, match="max_new_tokens: expected at least 1, found 0"):
            alone.submit(ask("hello"), max_new_tokens=0)

    def test_a_full_context_can_be_scored(self, alone: Session) -> None:
        ids = prompt(alone.context_limit)
        assert len(score(alone, ids)) == alone.context_limit
        with pytest.raises(ConfigError, match="2048 tokens, the model's context holds 2048"):
            alone.submit(prompt_ids=ids, prompt_logprobs=1, max_new_tokens=1)
        with pytest.raises(ConfigError, match="2049 tokens"):
            alone.submit(prompt_ids=[*ids, 5], prompt_logprobs=1, max_new_tokens=0)

    def test_a_failure_ends_its_request_alone(
        self, mixed: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("no memory for scores")

        monkeypatch.setattr(PromptScores, "push", broken)
        scored = mixed.submit(prompt_ids=prompt(40), prompt_logprobs=1)
        other = mixed.submit(prompt_ids=prompt(40, 7))
        with pytest.raises(EngineError, match="no memory for scores"):
            scored.result(120)
        assert other.result(120).generated_tokens == 8
        assert mixed._open().runner.pool.slots_in_use == 0
