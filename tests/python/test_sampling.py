"""Tests of ktrt.sampling against transformers' logits processors."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ktrt.config import SamplingArgs
from ktrt.errors import KtrtError
from ktrt.sampling import make_sampler

VOCAB = 500
PROMPT = [3, 3, 7, 100, 499]


def logits(steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[steps, VOCAB]; in bfloat16 many are equal, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(steps, VOCAB, generator=generator) * 3).to(dtype)


def transformers_choice(args: SamplingArgs, rows: torch.Tensor) -> list[int]:
    """What transformers' generate chooses (GenerationMixin._sample) on these logits."""
    processors = LogitsProcessorList()
    if args.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(args.repetition_penalty))
    if args.do_sample:
        processors.append(TemperatureLogitsWarper(args.temperature))
        if args.top_k:
            processors.append(TopKLogitsWarper(args.top_k))
        if args.top_p < 1:
            processors.append(TopPLogitsWarper(args.top_p))
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
