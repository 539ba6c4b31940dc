"""Computes one routed expert in NumPy, exactly or with the roundings of the engine's formats.

The roundings follow the format's definition, not the engine's code: bfloat16 inputs and LoRA; INT8
by rows, scale max/127, half to even; INT4 in multiples of max/7, via multiples of max/112.
``coded`` weights are codes times scales already, and stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ktrt.audit.reference.adapter import Lora
    from ktrt.audit.reference.tensors import Float32

WeightFormat = Literal["float32", "bf16", "int8", "int4", "coded"]

# Codes of a group's largest weight that its candidates for a scale give.
_LARGEST = (-7.1, -7.3, -7.5, -7.7, -7.9, -8.1, -8.3, 6.2, 6.45, 6.7, 6.95, 7.2)
_CHUNK = 512  # groups


@dataclass(frozen=True)
class Clamps:
    """gpt-oss's activation: gate at most ``limit``, up between −``limit`` and ``limit``; then
    (up + 1) · gate · sigmoid(``slope`` · gate)."""

    limit: float
    slope: float


@dataclass
class Expert:
    """gate, up [I, H] and down [H, I], rounded once to ``weight_format``. ``down_slices``: number
    of separately quantised slices of down's columns. ``biases`` of all projections or none."""

    weights: Mapping[str, Float32]
    weight_format: WeightFormat
    down_slices: int = 1
    biases: Mapping[str, Float32] = field(default_factory=dict)
    clamps: Clamps | None = None
    _stored: dict[str, Float32] = field(init=False)

    def __post_init__(self) -> None:
        self._stored = {
            name: _by_slices(weight, self.weight_format, self._slices(name), _stored)
            for name, weight in self.weights.items()
        }

    def _slices(self, projection: str) -> int:
        return self.down_slices if projection == "down" else 1

    def project(self, projection: str, x: Float32, lora: Mapping[str, Lora]) -> Float32:
        """Returns y = Wx + s·B(Ax) + bias; rows of x are tokens."""
        if self.weight_format != "float32":
            x = to_bf16(x)
        coded = _by_slices(x, self.weight_format, self._slices(projection), _activations)
        y: Float32 = coded @ self._stored[projection].T
        if projection in self.biases:
            y = y + self.biases[projection]
        if pair := lora.get(projection):
            a, b = pair.a, pair.b * np.float32(pair.scaling)
            if self.weight_format == "float32":
                return y + (x @ a.T) @ b.T
            y = y + to_bf16(x @ to_bf16(a).T) @ to_bf16(b).T
        return y


def expert_output(expert: Expert, x: Float32, lora: Mapping[str, Lora]) -> Float32:
    """Returns down(silu(gate x) · up x) [tokens, H], or with the expert's clamps, without a routing
    weight; ``lora`` may be empty."""
    gate = expert.project("gate", x, lora)
    up = expert.project("up", x, lora)
    slope = np.float32(1)
    if expert.clamps is not None:
        limit, slope = np.float32(expert.clamps.limit), np.float32(expert.clamps.slope)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + np.float32(1)
    with np.errstate(over="ignore"):
        inner = gate / (1 + np.exp(-slope * gate)) * up
    return expert.project("down", inner, lora)


def to_bf16(x: Float32) -> Float32:
    """Rounds to bfloat16, half to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = (bits + (0x7FFF + odd)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _by_slices(
    x: Float32,
    weight_format: WeightFormat,
    slices: int,
    rule: Callable[[Float32, WeightFormat], Float32],
) -> Float32:
    found: list[Float32] = [rule(each, weight_format) for each in np.split(x, slices, axis=1)]
    return np.concatenate(found, axis=1) if slices > 1 else found[0]


def _stored(weight: Float32, weight_format: WeightFormat) -> Float32:
    """Returns a weight's values after packing."""
    if weight_format in ("float32", "coded"):
        return weight
    weight = to_bf16(weight)
    if weight_format == "int8":
        return int8_rows(weight)
    if weight_format == "int4":
        step: Float32 = np.abs(weight).max(axis=1, keepdims=True) / np.float32(112)
        fine = np.rint(_divided(weight, step))
        coarse: Float32 = np.sign(fine) * np.floor(np.abs(fine) / 16 + np.float32(0.5))
        rounded: Float32 = step * 16 * coarse
        return rounded
    return weight


def _activations(x: Float32, weight_format: WeightFormat) -> Float32:
    return int8_rows(x) if weight_format in ("int8", "int4") else x


def int4_groups(weight: Float32, group: int = 32) -> Float32:
    """Quantises to codes −8 … 7 times one BF16 scale for each row and ``group`` of columns: of the
    scales that give the largest weight about −8 or 7 (``_LARGEST``), the one with the least squared
    error."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // group) * group), np.float32)
    padded[:, :columns] = to_bf16(weight)
    groups = padded.reshape(-1, group)
    for start in range(0, len(groups), _CHUNK):  # as much as a core's cache holds
        groups[start : start + _CHUNK] = _searched(groups[start : start + _CHUNK])
    return padded[:, :columns]


def _searched(groups: Float32) -> Float32:
    best, least = np.zeros_like(groups), np.full(len(groups), np.inf)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    for code in _LARGEST:
        scale = to_bf16(largest / np.float32(code))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.rint(groups * (np.float32(1) / scale))
            np.clip(values, -8, 7, out=values)
            values *= scale
        off = (groups - values).astype(np.float64)
        error = np.einsum("ij,ij->i", off, off)
        better = error < least  # never for NaN, of a group of zeros
        np.copyto(best, values, where=better[:, None])
        np.copyto(least, error, where=better)
    return best


def int8_rows(rows: Float32) -> Float32:
    """Rounds each row to INT8 codes with one scale; returns the values."""
    scale = np.abs(rows).max(axis=1, keepdims=True) * np.float32(1 / 127)
    rounded: Float32 = np.rint(_divided(rows, scale)) * scale
    return rounded


def _divided(rows: Float32, scale: Float32) -> Float32:
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    quotient: Float32 = rows * inverse
    return quotient
