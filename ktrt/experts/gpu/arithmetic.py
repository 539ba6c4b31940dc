"""The routed experts' arithmetic in torch, rounding where the engine does (csrc/README.md).

Float32 sums may be made in another order than the engine's; INT8 sums are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.activation import Activation

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine.rank_masks import RankMask

# Products of two INT8 codes stay below 127² in magnitude, so sums of this many are integers below
# 2^24: float32 holds all of them, in whatever order they are added.
_EXACT_TERMS = 1024
# 1/127 in float32: a Python float would be rounded only after the product.
RECIPROCAL = float(torch.tensor(1.0) / torch.tensor(127.0))
# ``torch._int_mm`` takes more rows than this.
_INT8_ROWS = 16


@dataclass(frozen=True)
class ExpertBank:
    """Weights of n experts on one device, row-major. p, h: intermediate and hidden size, each
    padded to 32 where it counts outputs.

    gate_up [n, 2p, hidden_size] (gate's rows first; [n, p, hidden_size], up's, without gate) and
    down [n, h, p]: bfloat16 or INT8 codes, the latter with scales of their rows, float32; biases of
    the rows, float32. LoRA of all resident adapters side by side, bfloat16: input_a
    [n, ranks, hidden_size], gate's and then from up_first up's; down_a [n, ranks, p]; gate_b, up_b
    [n, p, ranks], down_b [n, h, ranks].
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    input_a: torch.Tensor | None = None
    gate_b: torch.Tensor | None = None
    up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None
    up_first: int = 0
    has_gate: bool = True
    activation: Activation = field(default_factory=Activation)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def take(self, index: torch.Tensor) -> ExpertBank:
        """Copies of the experts at ``index`` (integers [m] on the device, repetitions allowed)."""
        return self._map(lambda tensor: tensor.index_select(0, index))

    def part(self, experts: slice) -> ExpertBank:
        """Some of the experts, without a copy."""
        return self._map(lambda tensor: tensor[experts])

    def accepts(self, other: ExpertBank) -> bool:
        """Whether ``other``'s values can be copied into these tensors."""
        mine, theirs = self.tensors(), other.tensors()
        return {name: tensor.shape for name, tensor in mine.items()} == {
            name: tensor.shape for name, tensor in theirs.items()
        } and self.up_first == other.up_first

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ExpertBank:
        changed: dict[str, Any] = {n: change(tensor) for n, tensor in self.tensors().items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class Rows:
    """Inputs of a projection: values [..., m, k] in bfloat16; for quantised weights also their INT8
    codes, as int8 or bfloat16, and scale [..., m, 1] in float32."""

    values: torch.Tensor
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def take(self, index: torch.Tensor) -> Rows:
        """The rows at ``index`` (integers of any shape) of two-dimensional rows."""
        if self.codes is None or self.scale is None:
            return Rows(self.values[index])
        return Rows(self.values[index], self.codes[index], self.scale[index])

    def for_each(self, count: int) -> Rows:
        """Two-dimensional rows for each of ``count`` experts, without a copy."""
        values = self.values.expand(count, -1, -1)
        if self.codes is None or self.scale is None:
            return Rows(values)
        return Rows(values, self.codes.expand(count, -1, -1), self.scale.expand(count, -1, -1))


@dataclass(frozen=True)
class LoraChoice:
    """Which ranks of a bank's LoRA each row takes; None: all ranks."""

    input: RankMask | None = None
    down: RankMask | None = None

    def take(self, index: torch.Tensor) -> LoraChoice:
        """The choice of the rows at ``index`` (integers of any shape)."""
        masks = (None if mask is None else mask.take(index) for mask in (self.input, self.down))
        return LoraChoice(*masks)


ALL_RANKS = LoraChoice()


def make_rows(values: torch.Tensor, quantized: bool, codes: torch.dtype = torch.bfloat16) -> Rows:
    """Rounds to bfloat16, the one rounding of inputs and of intermediate activations; quantises
    those per row for quantised weights, to ``codes`` of that dtype."""
    rounded = values.to(torch.bfloat16)
    return Rows(rounded, *_quantize(rounded, codes)) if quantized else Rows(rounded)


def grouped_rows(parts: Sequence[torch.Tensor], quantized: bool) -> Rows:
    """The rows of all ``parts`` [tokens, hidden_size] as one, as ``Grouping`` takes them best; only
    one part at a time takes more memory than the result."""
    device, codes = parts[0].device, torch.bfloat16
    if quantized and _multiplies_int8(device):
        codes = torch.int8
    if len(parts) == 1:
        return make_rows(parts[0], quantized, codes)
    shape = sum(len(part) for part in parts), parts[0].shape[1]
    whole = Rows(torch.empty(shape, dtype=torch.bfloat16, device=device))
    if quantized:
        scale = torch.empty(shape[0], 1, device=device)
        whole = replace(whole, codes=torch.empty(shape, dtype=codes, device=device), scale=scale)
    first = 0
    for part in parts:
        rows, at = make_rows(part, quantized, codes), slice(first, first + len(part))
        whole.values[at] = rows.values
        for target, source in ((whole.codes, rows.codes), (whole.scale, rows.scale)):
            if target is not None and source is not None:
                target[at] = source
        first = at.stop
    return whole


def _quantize(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max · float32(1/127), codes rounded half to even. A row of zeros, or so small that
    1/scale overflows, has scale 0; NaN and infinity stay in the scale, with codes 0."""
    scale = rows.abs().amax(dim=-1, keepdim=True).float() * RECIPROCAL
    inverse = 1.0 / scale
    usable = (inverse > 0) & (inverse < torch.inf)
    codes = torch.where(usable, (rows * inverse).round_(), 0.0)  # the product is in float32
    return codes.to(dtype), torch.where(inverse == torch.inf, 0.0, scale)


# Rows of two dimensions by expert: (index in the bank, where its rows are).
Groups = Sequence[tuple[int, slice]]


def expert_outputs(
    rows: Rows,
    bank: ExpertBank,
    groups: Groups | None = None,
    lora: LoraChoice | None = ALL_RANKS,
) -> torch.Tensor:
    """down(f(gate x, up x)) in float32, f the bank's activation; ``lora`` None: without LoRA.

    ``groups`` cut ``rows`` [m, hidden_size] in order, without gaps: [m, h]. Without them ``rows``
    are [n, m, hidden_size], as many as there are experts: [n, m, h].
    """
    both = _multiply(rows, bank.gate_up, bank.gate_up_scale, groups)
    gate, up = both.chunk(2, -1) if bank.has_gate else (None, both)
    if bank.input_a is not None and lora is not None:
        shrunk = _shrink(rows, bank.input_a, lora.input, groups)
        if gate is not None:
            _expand(gate, shrunk, bank.gate_b, 0, groups)
        _expand(up, shrunk, bank.up_b, bank.up_first, groups)
    _add_bias(both, bank.gate_up_bias, groups)
    codes = torch.bfloat16 if rows.codes is None else rows.codes.dtype
    inner = make_rows(bank.activation(gate, up), bank.down_scale is not None, codes)
    out = _multiply(inner, bank.down, bank.down_scale, groups)
    if bank.down_a is not None and lora is not None:
        shrunk = _shrink(inner, bank.down_a, lora.down, groups)
        _expand(out, shrunk, bank.down_b, 0, groups)
    _add_bias(out, bank.down_bias, groups)
    return out


def _multiply(
    rows: Rows, weights: torch.Tensor, scale: torch.Tensor | None, groups: Groups | None
) -> torch.Tensor:
    if scale is None or rows.codes is None or rows.scale is None:
        return _product(rows.values, weights, groups)
    if groups is None:
        return (rows.scale * scale[:, None]) * integer_product(rows.codes, weights)
    # Elementwise work on all groups at once would need the scales spread over the rows.
    out = rows.scale.new_empty(rows.codes.shape[0], weights.shape[1])
    for index, at in groups:
        target = torch.mul(rows.scale[at], scale[index], out=out[at])
        target *= _integers(rows.codes[at], weights[index])
    return out


def _product(a: torch.Tensor, w: torch.Tensor, groups: Groups | None) -> torch.Tensor:
    if groups is None:
        return _dot(a, w)
    out = torch.empty(a.shape[0], w.shape[1], device=a.device)
    for index, at in groups:
        _dot(a[at], w[index], out[at])
    return out


def _shrink(
    rows: Rows, a: torch.Tensor, mask: RankMask | None, groups: Groups | None
) -> torch.Tensor:
    shrunk = _product(rows.values, a, groups).to(torch.bfloat16)
    return shrunk if mask is None else mask(shrunk)


def _expand(
    target: torch.Tensor,
    shrunk: torch.Tensor,
    b: torch.Tensor | None,
    first: int,
    groups: Groups | None,
) -> None:
    if b is not None:
        target += _product(shrunk[..., first : first + b.shape[-1]], b, groups)


def _add_bias(target: torch.Tensor, bias: torch.Tensor | None, groups: Groups | None) -> None:
    if bias is None:
        return
    if groups is None:
        target += bias[:, None]
        return
    for index, at in groups:
        target[at] += bias[index]


def integer_product(codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums of products of integers up to 127 in magnitude, rounded to float32 once: codes
    [..., m, k] and weights [..., n, k], each in int8 or bfloat16."""
    return _integers(codes, weights).float()


def _integers(codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same in int32, or rounded to float32."""
    if codes.dtype == weights.dtype == torch.int8 and codes.dim() == 2 and len(codes) > _INT8_ROWS:
        return torch._int_mm(codes, weights.mT)
    pieces = [
        _dot(left, right)
        for left, right in zip(
            codes.to(torch.bfloat16).split(_EXACT_TERMS, -1),
            weights.to(torch.bfloat16).split(_EXACT_TERMS, -1),
            strict=True,
        )
    ]
    if len(pieces) == 1:
        return pieces[0]
    if len(pieces) == 2:
        return pieces[0] + pieces[1]  # both are exact: this is the one rounding
    total = pieces[0].to(torch.int32)
    for piece in pieces[1:]:
        total += piece.to(torch.int32)
    return total


def _dot(a: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a · wᵀ with float32 sums of exact products: [..., m, k] and [..., n, k], both bfloat16; with
    two dimensions in ``out``, if that is given."""
    if a.is_cuda and _keeps_float32(a.device):
        if out is not None:
            return torch.mm(a, w.mT, out_dtype=torch.float32, out=out)
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return multiply(a, w.mT, out_dtype=torch.float32)
    # Products of bfloat16 values are exact in float32, and in TF32 too.
    return torch.matmul(a.float(), w.float().mT, out=out)


@cache
def _keeps_float32(device: torch.device) -> bool:
    """Whether GEMMs of bfloat16 can return their float32 sums (torch 2.8); asked for before any
    graph is captured."""
    # Eleven times a third rounded to bfloat16 does not fit into bfloat16.
    sample = (torch.arange(16, device=device) < 11).to(torch.bfloat16).repeat(16, 1)
    third = torch.ones(16, 16, dtype=torch.bfloat16, device=device) / 3
    try:
        result = torch.empty(16, 16, device=device)
        torch.mm(sample, third.mT, out_dtype=torch.float32, out=result)
        batched = torch.bmm(sample[None], third.mT[None], out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    expected = torch.full_like(result, 11 * float(third[0, 0]))
    return torch.equal(result, expected) and torch.equal(batched[0], expected)


@cache
def _multiplies_int8(device: torch.device) -> bool:
    """Whether GEMMs of INT8 codes return their int32 sums, for numbers of rows that are not
    round."""
    left = torch.full((_INT8_ROWS + 3, 32), 127, dtype=torch.int8, device=device)
    right = torch.full((32, 32), -127, dtype=torch.int8, device=device)
    try:
        result = torch._int_mm(left, right.mT)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((result == -32 * 127 * 127).all())


def warm_up(device: torch.device) -> None:
    """Settles what must not be asked during a graph capture."""
    if device.type == "cuda":
        _keeps_float32(device)
        _multiplies_int8(device)
