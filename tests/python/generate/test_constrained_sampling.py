"""logit_bias and constraints in the sampler of a step's rows, and the log probabilities that are
reported next to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ktrt.config import SamplingArgs
from ktrt.errors import KtrtError
from ktrt.generate.sampling import log_probability_rows, make_sampler, sample_rows

if TYPE_CHECKING:
    from collections.abc import Collection

VOCAB = 500
SETTINGS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.4, "presence_penalty": 1.0},
    {"seed": 3},
    {"seed": 4, "top_k": 0, "top_p": 1.0},
    {"seed": 5, "top_k": 0, "top_p": 0.9, "frequency_penalty": 1.5},
    {"seed": 6, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
)


class Only:
    """Allows these tokens, and what follows a token by one."""

    def __init__(self, allowed: Collection[int]) -> None:
        self.allowed = set(allowed)
        self.accepted: list[int] = []
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def mask(self, logits: torch.Tensor) -> None:
        self.seen.append((tuple(logits.shape), logits.dtype))
        kept = torch.full_like(logits, -np.inf)
        kept[list(self.allowed)] = logits[list(self.allowed)]
        logits.copy_(kept)

    def accept(self, token: int) -> None:
        self.accepted.append(token)
        self.allowed = {token + 1}


class Broken:
    def __init__(self, place: str) -> None:
        self._place = place

    def mask(self, logits: torch.Tensor) -> None:
        if self._place == "mask":
            raise RuntimeError("no state")
        if self._place == "all":
            logits.fill_(-np.inf)
        if self._place == "nan":
            logits.fill_(np.nan)

    def accept(self, token: int) -> None:
        if self._place == "accept":
            raise ValueError("not mine")


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, VOCAB, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constraint_holds_with_all_settings(options: dict[str, Any], dtype: torch.dtype) -> None:
    allowed = {7, 20, 21, 22}
    constraint = Only(allowed)
    sampler = make_sampler(SamplingArgs(**options), [7, 7, 9], constraint)
    logits = rows(3, dtype=dtype)
    before = logits.clone()
    first, second, third = (sampler(row) for row in logits)
    assert first in allowed
    assert [second, third] == [first + 1, first + 2]
    assert constraint.accepted == [first, second, third]
    assert constraint.seen == [((VOCAB,), torch.float32)] * 3
    assert torch.equal(logits, before), "others read them, too"


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_constraint_that_allows_all_changes_nothing(options: dict[str, Any]) -> None:
    class All(Only):
        def mask(self, logits: torch.Tensor) -> None:
            pass

    free = make_sampler(SamplingArgs(**options), [1, 2])
    bound = make_sampler(SamplingArgs(**options), [1, 2], All(()))
    for row in rows(6):
        assert free(row) == bound(row)


def test_greedy_takes_the_best_of_what_is_allowed_after_penalties() -> None:
    logits = torch.zeros(VOCAB)
    logits[[10, 11, 12]] = torch.tensor([3.0, 2.9, 9.0])
    args = SamplingArgs(do_sample=False, repetition_penalty=1.2)
    assert make_sampler(args, [10], Only({10, 11}))(logits) == 11
    assert make_sampler(args, [], Only({10, 11}))(logits) == 10


@pytest.mark.parametrize(
    ("place", "words"),
    [("mask", "failed: no state"), ("accept", "failed: not mine"), ("all", "allows no token"),
     ("nan", "allows no token")],
)  # fmt: skip
def test_a_broken_constraint_fails_its_row_alone(place: str, words: str) -> None:
    samplers = [make_sampler(SamplingArgs(do_sample=False), []) for _ in range(2)]
    samplers.insert(1, make_sampler(SamplingArgs(do_sample=False), [], Broken(place)))
    logits = rows(3)
    found = sample_rows(samplers, logits)
    assert isinstance(found[1], KtrtError)
    assert words in str(found[1])
    assert [found[0], found[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_bias_is_added_to_its_tokens() -> None:
    logits = rows(1)[0]
    best = int(logits.argmax())
    for options in ({"do_sample": False}, {"seed": 1, "temperature": 0.5}):
        chosen = make_sampler(SamplingArgs(**options, logit_bias={33: 100}), [])
        assert chosen(logits) == 33
    banned = make_sampler(SamplingArgs(do_sample=False, logit_bias={best: -100, 10**6: 5}), [])
    expected = logits.clone()
    expected[best] -= 100
    assert banned(logits) == int(expected.argmax()) != best
    small = make_sampler(SamplingArgs(do_sample=False, logit_bias={best: -1e-3}), [])
    assert small(logits) == best


def test_bias_comes_before_penalties_and_a_constraint_after_both() -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[4], logits[5] = 1.0, 2.0
    args = SamplingArgs(do_sample=False, logit_bias={4: 3.0, 9: 100}, repetition_penalty=2.0)
    # (1 + 3) / 2 = 2 < 2.5; without the bias's place before the penalty it would be 3.5.
    logits[5] = 2.5
    assert make_sampler(args, [4], Only({4, 5}))(logits) == 5


def test_rows_without_bias_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    plain = [make_sampler(SamplingArgs(do_sample=False), []) for _ in range(2)]
    for each in plain:
        assert each.plain_greedy
        monkeypatch.setattr(each, "_change", lambda scores: copies.append(1))
    sample_rows(plain, rows(2))
    assert not copies
    for options in ({"logit_bias": {1: 1.0}}, {"repetition_penalty": 1.1}):
        assert not make_sampler(SamplingArgs(do_sample=False, **options), []).plain_greedy
    assert not make_sampler(SamplingArgs(do_sample=False), [], Only({1})).plain_greedy


class TestLogProbabilities:
    def test_they_are_a_log_softmax_in_float32(self) -> None:
        logits = rows(5)
        expected = logits.log_softmax(-1)
        found = log_probability_rows(logits, [1, 2, 3, 4, 5], [3, 0, 20, 1, 2])
        for row, (value, top) in enumerate(found):
            assert value == pytest.approx(float(expected[row, row + 1]), abs=1e-6)
            best = expected[row].topk(20)
            assert [each for each, _ in top] == best.indices[: len(top)].tolist()
            assert [v for _, v in top] == pytest.approx(best.values[: len(top)].tolist(), abs=1e-6)
        assert [len(top) for _, top in found] == [3, 0, 20, 1, 2]

    def test_only_the_greedy_token_equals_the_largest(self) -> None:
        """Where logits are equal, and where float32 rounds different ones to equal values."""
        logits = torch.zeros(4, VOCAB)
        logits[0, [8, 3, 400]] = 5.0
        logits[1, [3, 8]] = torch.tensor([20.0, 20.000002])
        logits[2, 17] = 3.0
        logits[3, :] = 1.0
        for row, greedy in enumerate((3, 8, 17, 0)):
            assert int(logits[row].argmax()) == greedy
            for token in (0, 3, 8, 17, 400):
                for count in (1, 3, 20):
                    ((value, top),) = log_probability_rows(logits[row : row + 1], [token], [count])
                    assert top[0][0] == greedy
                    assert (value == max(each for _, each in top)) == (token == greedy)
                    assert len({each for each, _ in top}) == len(top) == count
                    assert value == dict(top).get(token, value), "the list says the same"
                    exact = float(logits[row].double().log_softmax(-1)[token])
                    assert value == pytest.approx(exact, abs=3e-6)
