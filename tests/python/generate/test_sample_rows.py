"""Tests of ktrt.generate.sampling for the rows of a step, and of the draw among candidates."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ktrt.config import SamplingArgs
from ktrt.errors import KtrtError
from ktrt.generate import race, sampling
from ktrt.generate.sampling import RowSampler, make_sampler, sample_rows

PROMPT = [3, 3, 7, 100, 499, 10**6]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.4},
    {},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 0, "top_p": 0.95, "frequency_penalty": 0.5},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.05, "presence_penalty": 1.0},
    {"temperature": 2.0, "top_k": 7, "top_p": 1.0},
)


def samplers(rows: int) -> list[RowSampler]:
    options = [SETTINGS[row % len(SETTINGS)] for row in range(rows)]
    return [
        make_sampler(SamplingArgs(seed=row, **each), PROMPT) for row, each in enumerate(options)
    ]


def peaked(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Logits [rows, vocab] in bfloat16, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).bfloat16()


@pytest.mark.parametrize("vocab", [30, 500, 20_000])
def test_rows_together_choose_as_each_alone(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_threads", lambda: 4)
    together, alone = samplers(21), samplers(21)
    for step in range(6):
        rows = peaked(21, vocab, step)
        expected = [sampler(row) for sampler, row in zip(alone, rows, strict=True)]
        assert sample_rows(together, rows) == expected


def test_nan_fails_its_row_alone_and_leaves_its_sampler() -> None:
    rows = peaked(14, 500, 0)
    rows[3, 17] = rows[8, 0] = float("nan")
    together, alone = samplers(14), samplers(14)
    found = sample_rows(together, rows)
    failed = [row for row, token in enumerate(found) if isinstance(token, KtrtError)]
    assert failed == [3, 8]
    assert "NaN" in str(found[3])
    for row in range(14):
        if row not in failed:
            assert found[row] == alone[row](rows[row])
    rows = peaked(14, 500, 1)
    assert sample_rows(together, rows) == [s(row) for s, row in zip(alone, rows, strict=True)]


def test_a_wrong_number_of_samplers_is_refused() -> None:
    with pytest.raises(ValueError, match="2 samplers, 3 rows"):
        sample_rows(samplers(2), peaked(3, 50, 0))
    assert sample_rows([], torch.empty(0, 50)) == []


@given(
    scale=st.sampled_from((0.0, 0.3, 3.0, 15.0)),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from((0.01, 0.7, 1.0, 3.0)),
    top_k=st.sampled_from((0, 0, 1, 5, 50)),
    top_p=st.sampled_from((1e-9, 0.1, 0.5, 0.9, 0.9999, 1.0)),
    min_p=st.sampled_from((0.0, 0.0, 0.01, 0.5, 1.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    missing=st.booleans(),
)
def test_the_race_ends_as_the_definition(
    scale: float, seed: int, temperature: float, top_k: int, top_p: float, min_p: float,
    dtype: torch.dtype, missing: bool,
) -> None:  # fmt: skip
    """And takes the same random numbers, or none."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(9000, generator=generator) * scale).to(dtype).float() / temperature
    if missing:
        scores[::3] = float("-inf")
    args = SamplingArgs(top_k=top_k, top_p=top_p, min_p=min_p)
    before = generator.get_state()
    found = race.draw(scores.numpy(), race.Filters(top_k, top_p, min_p), generator)
    after = generator.get_state()
    generator.set_state(before)
    if found is None:
        assert torch.equal(after, before)
    else:
        assert found == sampling._exact_draw(scores, args, generator)
        assert torch.equal(after, generator.get_state())


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0, "top_p": 1.0, "min_p": 0.05}], ids=str
)
def test_the_definition_is_rarely_asked(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Mock(wraps=sampling._exact_draw)
    monkeypatch.setattr(sampling, "_exact_draw", exact)
    sampler = make_sampler(SamplingArgs(seed=1, **options), [])
    # As peaked as a language model's.
    falling = -1.6 * torch.arange(1, 20_001).log()
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        sampler(falling[torch.randperm(20_000, generator=generator)])
    assert exact.call_count <= 3


@pytest.mark.parametrize("serial", [True, False])
def test_exponentials_are_torchs(serial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if serial and not race._draws_serially():
        pytest.skip("this torch draws in parallel on this CPU")
    monkeypatch.setattr(race, "_draws_serially", lambda: serial)
    one, other = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    for count in (1, 311, 313, 5000):
        ids = np.arange(count % 5, count, 3)
        drawn = torch.empty(count).exponential_(1, generator=other)
        assert (race.exponentials(one, count, ids) == drawn.numpy()[ids]).all()
        assert torch.equal(one.get_state(), other.get_state())
