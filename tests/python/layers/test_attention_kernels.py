"""Triton's attention kernels, interpreted on tiny shapes, against torch in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.interpreted import interpreted

from ktrt.layers.engine_attention import HeldKeys
from ktrt.layers.form import AttentionForm
from ktrt.layers.gpu import decode, prefill
from ktrt.layers.gpu.decode import Blocks, Operands, decode_attention
from ktrt.layers.gpu.prefill import prefill_attention

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = AttentionForm(0.3)
SINKS = torch.linspace(-1, 2, 4)


@pytest.fixture(autouse=True)
def interpreter() -> None:
    interpreted()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []
    kernels = decode.kernels()
    for name in ("decode_kernel", "merge_kernel", "prefill_kernel"):
        monkeypatch.setattr(kernels, name, _Counted(name, getattr(kernels, name), names))
    for module in (decode, prefill):
        monkeypatch.setattr(module, "runs_kernels", lambda _query: True)
    monkeypatch.setattr(decode, "device_facts", lambda _device: (32, 100 << 10))
    monkeypatch.setattr(decode, "_blocks", lambda *_: Blocks(16, 32, 4, 2))
    return names


class _Counted:
    def __init__(self, name: str, kernel: Any, names: list[str]) -> None:
        self.name, self.kernel, self.names = name, kernel, names

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self.names.append(self.name)
        launch: Callable[..., Any] = self.kernel[grid]
        return launch


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
) -> torch.Tensor:
    """Attention of the last positions of one row, in float32: [heads, n, …] each."""
    (heads, n, _), (groups, total, _) = query.shape, key.shape
    key, value = (x.float().repeat_interleave(heads // groups, 0) for x in (key, value))
    scores = query.float() @ key.transpose(1, 2) * form.scaling
    if form.softcap:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    distance = torch.arange(total - n, total)[:, None] - torch.arange(total)
    hidden = (distance < 0) | ((distance >= form.window) if form.window else False)
    scores = scores.masked_fill(hidden, float("-inf"))
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks[:, None, None].expand(-1, n, 1)], -1)
    return scores.softmax(-1)[..., :total] @ value


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def states(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("groups", "size", "value_size", "tokens", "ring", "form", "dtype"),
    [
        (2, 16, 16, 1, 0, PLAIN, torch.float32),
        (2, 24, 20, 1, 0, replace(PLAIN, softcap=2.0), torch.float16),
        (1, 48, 32, 3, 0, replace(PLAIN, window=20, sinks=SINKS), torch.float32),
        (4, 16, 16, 2, 128, replace(PLAIN, window=100, sinks=SINKS), torch.float32),
        (1, 16, 16, 20, 0, PLAIN, torch.float32),
    ],
    ids=["plain", "softcap", "sinks", "ring", "tokens"],
)
@pytest.mark.parametrize("by", ["kernels", "torch"])
def test_decode_attention(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, by: str, groups: int, size: int,
    value_size: int, tokens: int, ring: int, form: AttentionForm, dtype: torch.dtype,
) -> None:  # fmt: skip
    if by == "torch":
        monkeypatch.setattr(decode, "runs_kernels", lambda _query: False)
    lengths, capacity = (tokens, 77, 200), ring or 210
    query, key, value = (
        states(3, *shape, dtype=dtype)
        for shape in ((4, tokens, size), (groups, 200, size), (groups, 200, value_size))
    )
    # Nobody may read what lies after a row's length.
    held_key, held_value = (
        x.new_full((3, groups, capacity, x.shape[-1]), torch.nan) for x in (key, value)
    )
    for row, length in enumerate(lengths):
        at = torch.arange(max(0, length - capacity), length)
        held_key[row, :, at % capacity] = key[row, :, at]
        held_value[row, :, at % capacity] = value[row, :, at]
    out = decode_attention(query, held_key, held_value, torch.tensor(lengths), form, ring=ring)
    assert out.shape == (3, tokens, 4, value_size)
    assert out.dtype == dtype
    for row, length in enumerate(lengths):
        expected = exact(query[row], key[row, :, :length], value[row, :, :length], form)
        limit = 1e-6 if dtype == torch.float32 else 1e-3
        assert error(out[row].transpose(0, 1), expected) < limit
    split = ["decode_kernel"] + ["merge_kernel"] * (form.window != 20)
    assert launches == (split if by == "kernels" else [])


@pytest.mark.parametrize("by", ["kernels", "torch"])
def test_rows_pick_their_slots(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "torch":
        monkeypatch.setattr(decode, "runs_kernels", lambda _query: False)
    query, key, value = states(3, 4, 1, 16), states(5, 2, 80, 16), states(5, 2, 80, 24)
    slots, lengths = torch.tensor([4, 1, 2]), torch.tensor([80, 5, 33])
    out = decode_attention(query, key, value, lengths, PLAIN, slots=slots)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        expected = exact(query[row], key[slot, :, :length], value[slot, :, :length], PLAIN)
        assert error(out[row].transpose(0, 1), expected) < 1e-6


@pytest.mark.parametrize("sms", [1, 32])
def test_a_row_without_tokens_gives_zeros(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, sms: int
) -> None:
    monkeypatch.setattr(decode, "device_facts", lambda _device: (sms, 100 << 10))
    query, key, value = states(2, 4, 1, 16), states(2, 2, 80, 16), states(2, 2, 80, 16)
    for form in (PLAIN, replace(PLAIN, window=10, sinks=SINKS)):
        out = decode_attention(query, key, value, torch.tensor([0, 80]), form)
        assert not out[0].any()
        assert error(out[1].transpose(0, 1), exact(query[1], key[1], value[1], form)) < 1e-6
    assert ("merge_kernel" in launches) == (sms > 1)


@pytest.mark.parametrize(
    ("groups", "size", "tokens", "total", "form"),
    [
        (2, 16, 37, 37, PLAIN),
        (1, 24, 20, 90, replace(PLAIN, softcap=2.0)),
        (1, 48, 53, 60, replace(PLAIN, window=20, sinks=SINKS)),
    ],
)
def test_prefill_attention(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, groups: int, size: int, tokens: int,
    total: int, form: AttentionForm,
) -> None:  # fmt: skip
    query, key = states(1, 4, tokens, size), states(1, groups, total, size)
    value = states(1, groups, total, 20)
    expected = exact(query[0], key[0], value[0], form)
    few = prefill_attention(query[:, :, -4:], key, value, form)[0].transpose(0, 1)
    assert error(few, expected[:, -4:]) < 1e-6
    assert "prefill_kernel" not in launches
    monkeypatch.setattr(prefill, "_FEW", 0)
    monkeypatch.setattr(prefill, "_blocks", lambda *_: Blocks(16, 16, 4, 1))
    assert error(prefill_attention(query, key, value, form)[0].transpose(0, 1), expected) < 1e-6
    assert launches[-1] == "prefill_kernel"
    for module in (decode, prefill):
        monkeypatch.setattr(module, "runs_kernels", lambda _query: False)
    monkeypatch.setattr(prefill, "_SCORES", 4 * total * 16)
    assert error(prefill_attention(query, key, value, form)[0].transpose(0, 1), expected) < 1e-6


def test_a_slot_of_a_forward_of_many_sequences(launches: list[str]) -> None:
    """Its keys lie in a ring of 96 positions, of which the window needs some."""
    form, length = replace(PLAIN, window=20, sinks=SINKS), 130
    query, key, value = (states(1, *shape) for shape in ((4, 3, 16), (2, 130, 16), (2, 130, 16)))
    at = torch.arange(length - 96, length)
    rings = torch.full((2, 2, 2, 96, 16), torch.nan)
    for ring, each in zip(rings, (key, value), strict=True):
        ring[1, :, at % 96] = each[0, :, at]
    engine: Any = None
    found = HeldKeys(engine, rings[0], rings[1], form).last(query, 1, length, 0, form)
    assert error(found[0].transpose(0, 1), exact(query[0], key[0], value[0], form)) < 1e-6
    assert launches[0] == "decode_kernel"


def test_vectors_that_lie_apart_are_refused(launches: list[str]) -> None:
    key = states(1, 2, 16, 80).transpose(2, 3)
    with pytest.raises(ValueError, match=r"numbers are 80 elements apart, expected 1"):
        decode_attention(states(1, 4, 1, 16), key, key, torch.tensor([80]), PLAIN)
    assert Operands(key, key, key).sizes == (16, 0, 16)
