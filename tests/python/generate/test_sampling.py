"""Tests of ktrt.generate.sampling against transformers' logits processors."""

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_chat import make_model, make_tokenizer
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ktrt.config import SamplingArgs
from ktrt.errors import EngineError, KtrtError
from ktrt.generate.sampling import (
    log_probabilities,
    log_probability_rows,
    make_sampler,
    sample_rows,
)

VOCAB = 500
PROMPT = [3, 3, 7, 100, 499]


def logits(steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[steps, VOCAB]; in bfloat16 many are equal, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(steps, VOCAB, generator=generator) * 3).to(dtype)


class OpenAIPenalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's formula in NumPy, token by token: mu[j] - c[j] * frequency - [c[j] > 0] * presence,
    c[j] being how often j was sampled."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = np.float32(presence), np.float32(frequency)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = scores.numpy().copy()
        for token, count in Counter(input_ids[0, len(PROMPT) :].tolist()).items():
            found[0, token] -= np.float32(count) * self.frequency
            found[0, token] -= self.presence
        return torch.from_numpy(found)


GENERATES = make_model(make_tokenizer())


def transformers_choice(args: SamplingArgs, rows: torch.Tensor) -> list[int]:
    """The choice of transformers' generate (GenerationMixin._sample) on these logits, with the
    processors that it makes itself."""
    own = LogitsProcessorList()
    if args.presence_penalty or args.frequency_penalty:
        own.append(OpenAIPenalties(args.presence_penalty, args.frequency_penalty))
    options: dict[str, Any] = {}
    if args.do_sample:
        options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        options["min_p"] = args.min_p or None
    config = GenerationConfig(
        do_sample=args.do_sample, repetition_penalty=args.repetition_penalty, num_beams=1,
        **options,
    )  # fmt: skip
    processors = GENERATES._get_logits_processor(
        config, input_ids_seq_length=len(PROMPT), logits_processor=own
    )
    generator = torch.Generator().manual_seed(args.seed or 0)
    ids = torch.tensor([PROMPT])
    for row in rows:
        scores = processors(ids, row[None].to(torch.float32))
        if args.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=-1)
    return [int(token) for token in ids[0, len(PROMPT) :]]


CHOICES: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, 0.7),
    "top_k": (0, 5),
    "top_p": (1.0, 0.9),
    "min_p": (0.0, 0.1),
    "repetition_penalty": (1.0, 1.3),
    "presence_penalty": (0.0, 1.75),
    "frequency_penalty": (0.0, -0.5, 0.75),
}


@pytest.mark.parametrize("values", list(product(*CHOICES.values())), ids=str)
def test_every_combination_chooses_like_transformers(values: tuple[Any, ...]) -> None:
    args = SamplingArgs(seed=4, **dict(zip(CHOICES, values, strict=True)))
    for dtype in (torch.float32, torch.bfloat16):
        rows = peaked_logits(25, dtype)
        sampler = make_sampler(args, PROMPT)
        assert [sampler(row) for row in rows] == transformers_choice(args, rows)


def peaked_logits(steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that prefer the same few tokens, so that penalties matter."""
    return logits(steps, seed=1, dtype=dtype) / 2 + 2 * logits(1, seed=2, dtype=dtype)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "temperature"])
@pytest.mark.parametrize("do_sample", [True, False])
def test_every_choice_matters(name: str, do_sample: bool) -> None:
    """The rows above would show a setting that is ignored."""
    off = {key: values[0] for key, values in CHOICES.items()}
    on = off | {name: CHOICES[name][-1]}
    rows = peaked_logits(25, torch.float32)
    found = []
    for options in (off, on):
        sampler = make_sampler(SamplingArgs(seed=4, do_sample=do_sample, **options), PROMPT)
        found.append([sampler(row) for row in rows])
    filters = name in ("top_k", "top_p", "min_p")
    assert (found[0] == found[1]) is (filters and not do_sample)


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_greedy_penalties(name: str) -> None:
    options: dict[str, Any] = {name: 1.5}
    args = SamplingArgs(do_sample=False, **options)
    rows = peaked_logits(60, torch.float32)
    sampler = make_sampler(args, PROMPT)
    assert [sampler(row) for row in rows] == transformers_choice(args, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "args",
    [
        SamplingArgs(do_sample=False),
        SamplingArgs(do_sample=False, repetition_penalty=1.4),
        SamplingArgs(seed=1),
        SamplingArgs(seed=2, temperature=2.5, top_p=1.0, top_k=0),
        SamplingArgs(seed=3, temperature=1.5, top_p=0.95, top_k=0),
        SamplingArgs(seed=4, temperature=1.5, top_p=1.0, top_k=7),
        SamplingArgs(seed=5, temperature=0.5, top_p=0.01, top_k=50),
        SamplingArgs(seed=5, top_p=1e-9),
        SamplingArgs(seed=6, temperature=1.2, top_p=0.9, top_k=10_000),
        SamplingArgs(seed=7, temperature=1.2, top_p=0.9, top_k=40, repetition_penalty=1.2),
        SamplingArgs(seed=8, temperature=1.2, top_p=0.9, top_k=1),
        SamplingArgs(seed=9, temperature=1.2, top_p=0.9, top_k=40, min_p=1.0),
    ],
    ids=str,
)
def test_chooses_like_transformers(args: SamplingArgs, dtype: torch.dtype) -> None:
    rows = logits(200, dtype=dtype)
    sampler = make_sampler(args, PROMPT)
    assert [sampler(row) for row in rows] == transformers_choice(args, rows)


def test_temperature_zero_is_greedy() -> None:
    rows = logits(20)
    sampler = make_sampler(SamplingArgs(temperature=0.0), PROMPT)
    assert [sampler(row) for row in rows] == rows.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-29, 1e-31, 1e-45, 5e-324])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    """Quotients leave float32's range, or are 0 / 0."""
    rows = logits(20)
    sampler = make_sampler(SamplingArgs(temperature=temperature), PROMPT)
    assert [sampler(row) for row in rows] == rows.argmax(-1).tolist()


def test_a_seed_repeats_and_none_does_not() -> None:
    rows = torch.zeros(40, VOCAB)

    def draw(seed: int | None) -> list[int]:
        sampler = make_sampler(SamplingArgs(top_k=0, top_p=1.0, seed=seed), PROMPT)
        return [sampler(row) for row in rows]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_logits_are_left_alone() -> None:
    row = logits(1)[0]
    before = row.clone()
    make_sampler(SamplingArgs(repetition_penalty=2.0), PROMPT)(row)
    assert torch.equal(row, before)


def test_nan_is_an_error() -> None:
    row = logits(1)[0]
    row[17] = float("nan")
    with pytest.raises(KtrtError, match="NaN"):
        make_sampler(SamplingArgs(), PROMPT)(row)


def test_a_draw_that_fails_is_the_rows_own_error() -> None:
    """Others of its step go on: sampling +inf raised for all of them."""
    rows = logits(2)
    rows[0, 3] = float("inf")
    found = sample_rows([make_sampler(SamplingArgs(seed=1), PROMPT) for _ in rows], rows)
    assert isinstance(found[0], EngineError)
    assert found[1] == make_sampler(SamplingArgs(seed=1), PROMPT)(rows[1])


def test_log_probabilities() -> None:
    row = logits(1, dtype=torch.bfloat16)[0]
    values = row.double().log_softmax(-1)
    best = sorted(range(VOCAB), key=lambda token: -values[token])[:5]
    found, top = log_probabilities(row, 17, 5)
    assert found == pytest.approx(float(values[17]), abs=1e-5)
    assert [value for _, value in top] == pytest.approx([float(values[b]) for b in best], abs=1e-5)
    assert [float(row[token]) for token, _ in top] == [float(row[token]) for token in best]
    assert log_probabilities(row, 17, 0)[1] == ()


def test_log_probabilities_of_rows() -> None:
    rows = logits(4, dtype=torch.bfloat16)
    found = log_probability_rows(rows, [17, 3, 0, 499], [5, 0, 20, 1])
    alone = zip(rows, [17, 3, 0, 499], [5, 0, 20, 1], strict=True)
    assert found == [log_probabilities(*each) for each in alone]
    assert [len(top) for _, top in found] == [5, 0, 20, 1]
