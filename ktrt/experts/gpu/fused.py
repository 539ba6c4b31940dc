"""The arithmetic of grouped experts by Triton's kernels, in place of ``arithmetic``'s dozen passes
over arrays of float32."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktrt.experts.gpu.arithmetic import RECIPROCAL, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.engine.rank_masks import RankMask
    from ktrt.experts.gpu.arithmetic import ExpertBank, LoraChoice

logger = logging.getLogger(__name__)

# Rows and outputs of a tile: 8 warps hold the sums of gate and up in registers.
TILE_ROWS = 128
_TILE_OUTPUTS = 128
_TILE_BYTES = 128  # of a row, in one step of a product
_LAUNCH = {"num_warps": 8, "num_stages": 3}
# Float32 results of one chunk, which are read again for the sums.
_CHUNK_BYTES = 128 << 20
_LEAST_OUTPUTS = 16


@functools.cache
def kernels() -> Any:
    """Returns the module of Triton kernels; None, which is logged once: there is no Triton."""
    try:
        return importlib.import_module("ktrt.experts.gpu.kernels")
    except ImportError as error:
        logger.warning(
            "Streamed experts are computed by torch, up to 2.7 times slower in long prompts: "
            "Triton cannot be imported (%s)", error,
        )  # fmt: skip
        return None


def on_device(tensor: torch.Tensor) -> bool:
    """Whether the kernels run where the tensor is: a GPU of Ampere or later, with Triton."""
    if not tensor.is_cuda or kernels() is None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def runs_kernels(bank: ExpertBank, rows: Rows) -> bool:
    """Whether the kernels compute these rows: of experts gated by SiLU, in bfloat16 or INT8."""
    if not bank.has_gate or bank.activation.activation != "silu":
        return False
    return rows.codes is None or rows.codes.dtype == bank.down.dtype


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 codes and scales [rows, 1] of bfloat16 rows, as ``arithmetic`` makes them."""
    count, columns = rows.shape
    codes = torch.empty(count, columns, dtype=torch.int8, device=rows.device)
    scales = torch.empty(count, 1, device=rows.device)
    if count:
        kernels().quantize_kernel[(count,)](
            rows, codes, scales, RECIPROCAL, K=columns, BLOCK=1 << (columns - 1).bit_length(),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales


@dataclass(frozen=True)
class Tiles:
    """Rows in the order of their experts, cut into tiles. ``table`` int32 [tiles, 3] on the device:
    (place of the expert in the order, first row, rows); ``firsts``: each expert's first tile, and
    the number of all; ``tokens`` and ``weights``: of the rows; ``places`` int32 [tokens, slots]:
    rows."""

    table: torch.Tensor
    firsts: Sequence[int]
    tokens: torch.Tensor
    weights: torch.Tensor
    places: torch.Tensor
    bounds: Sequence[int]

    def chunks(self, first: int, last: int, width: int) -> list[tuple[int, int, int, int]]:
        """(first tile, tiles, first row, end) of parts of the experts ``first`` … ``last`` - 1 that
        bound the memory of results of this width."""
        most = max(1, _CHUNK_BYTES // (4 * width * TILE_ROWS))
        found = []
        for tile in range(self.firsts[first], self.firsts[last], most):
            end = min(tile + most, self.firsts[last])
            found.append((tile, end - tile, self._row(tile), self._row(end)))
        return found

    def _row(self, tile: int) -> int:
        """The first row of a tile."""
        expert = int(np.searchsorted(self.firsts, tile, side="right")) - 1
        if expert >= len(self.bounds) - 1:
            return self.bounds[-1]
        return self.bounds[expert] + (tile - self.firsts[expert]) * TILE_ROWS


def make_tiles(
    bounds: Sequence[int], tokens: torch.Tensor, weights: torch.Tensor, places: torch.Tensor
) -> Tiles:
    """``bounds``: the first row of each expert, in order, and the end."""
    limits = np.asarray(bounds, dtype=np.int64)
    counts = -(-np.diff(limits) // TILE_ROWS)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    experts = np.repeat(np.arange(len(counts)), counts)
    rows = limits[experts] + (np.arange(firsts[-1]) - firsts[experts]) * TILE_ROWS
    sizes = np.minimum(limits[experts + 1] - rows, TILE_ROWS)
    table = np.stack([experts, rows, sizes], axis=1).astype(np.int32)
    on_device = torch.from_numpy(table).to(tokens.device)
    return Tiles(on_device, firsts.tolist(), tokens, weights, places, bounds)


def add_experts(
    total: torch.Tensor, tiles: Tiles, experts: range, bank: ExpertBank, rows: Rows,
    lora: LoraChoice | None,
) -> None:  # fmt: skip
    """Adds to ``total`` float32 [tokens, hidden_size] what the ``experts``, places in the order,
    owe by ``bank``; ``rows`` and ``lora``: of all tokens."""
    for chunk in tiles.chunks(experts.start, experts.stop, bank.down.shape[1]):
        out = _outputs(_Chunk(tiles, experts.start, *chunk), bank, rows, lora)
        block = min(1024, 1 << (total.shape[1] - 1).bit_length())
        grid = (total.shape[0], -(-total.shape[1] // block))
        kernels().sum_kernel[grid](
            out, tiles.places, total, chunk[2], chunk[3], out.shape[1], N=total.shape[1],
            SLOTS=tiles.places.shape[1], BLOCK=block,
        )  # fmt: skip


@dataclass(frozen=True)
class _Chunk:
    """Tiles ``first`` … ``first + count - 1``, of rows ``row`` … ``end - 1``."""

    tiles: Tiles
    expert: int
    first: int
    count: int
    row: int
    end: int

    def mask(self, mask: RankMask | None, shrunk: torch.Tensor) -> torch.Tensor:
        """The ranks that each row takes."""
        if mask is None:
            return shrunk
        return mask.take(self.tiles.tokens[self.row : self.end])(shrunk)

    def product(
        self, rows: Rows, w: torch.Tensor, scales: torch.Tensor | None = None, *,
        dtype: torch.dtype, taken: bool, bias: torch.Tensor | None = None,
        shrunk: torch.Tensor | None = None, b: torch.Tensor | None = None, weighted: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Rows times their experts' w; ``taken``: ``rows`` are of tokens, not of the chunk."""
        x, outputs, inputs = rows.values, w.shape[1], w.shape[2]
        if scales is not None and rows.codes is not None:
            x = rows.codes
        out = torch.empty(self.end - self.row, outputs, dtype=dtype, device=x.device)
        block = min(_TILE_OUTPUTS, max(_LEAST_OUTPUTS, 1 << (outputs - 1).bit_length()))
        tiles = self.tiles
        kernels().product_kernel[-(-outputs // block), self.count](
            x, _or(rows.scale, x), tiles.tokens, tiles.table, w, _or(scales, w), _or(bias, w),
            _or(shrunk, x), _or(b, w), tiles.weights, out, self.first, self.expert, self.row,
            x.stride(0), w.stride(0), w.stride(1), 0 if shrunk is None else shrunk.stride(0),
            0 if b is None else b.shape[2], K=inputs, N=outputs, M=TILE_ROWS, BLOCK_N=block,
            BLOCK_K=_TILE_BYTES // w.itemsize, QUANTIZED=scales is not None, LORA=b is not None,
            BIASED=bias is not None, TAKEN=taken, WEIGHTED=weighted, **_LAUNCH,
        )  # fmt: skip
        return out

    def gate_up(self, rows: Rows, bank: ExpertBank, shrunk: torch.Tensor | None) -> torch.Tensor:
        """The activations of the chunk's rows, bfloat16."""
        w, scales, bias, form = bank.gate_up, bank.gate_up_scale, bank.gate_up_bias, bank.activation
        x = rows.values if scales is None or rows.codes is None else rows.codes
        outputs = w.shape[1] // 2
        out = torch.empty(self.end - self.row, outputs, dtype=torch.bfloat16, device=x.device)
        gate_b, up_b = (None, None) if shrunk is None else (bank.gate_b, bank.up_b)
        tiles = self.tiles
        kernels().gate_up_kernel[-(-outputs // _TILE_OUTPUTS), self.count](
            x, _or(rows.scale, x), tiles.tokens, tiles.table, w, _or(scales, w), _or(bias, w),
            _or(shrunk, x), _or(gate_b, w), _or(up_b, w), out, self.first, self.expert, self.row,
            x.stride(0), w.stride(0), w.stride(1), 0 if shrunk is None else shrunk.stride(0),
            0 if gate_b is None else gate_b.shape[2], 0 if up_b is None else up_b.shape[2],
            bank.up_first, form.alpha, form.gate_limit, form.up_limit, form.up_offset,
            K=w.shape[2], N=outputs, M=TILE_ROWS, BLOCK_N=_TILE_OUTPUTS,
            BLOCK_K=_TILE_BYTES // w.itemsize, QUANTIZED=scales is not None,
            GATE_LORA=gate_b is not None, UP_LORA=up_b is not None, BIASED=bias is not None,
            LIMITED=not (math.isinf(form.gate_limit) and math.isinf(form.up_limit)),
            **_LAUNCH,
        )  # fmt: skip
        return out


def _outputs(chunk: _Chunk, bank: ExpertBank, rows: Rows, lora: LoraChoice | None) -> torch.Tensor:
    """The weighted outputs of the chunk's rows, float32."""
    shrunk = None
    if bank.input_a is not None and lora is not None:
        made = chunk.product(rows, bank.input_a, dtype=torch.bfloat16, taken=True)
        shrunk = chunk.mask(lora.input, made)
    inner = Rows(chunk.gate_up(rows, bank, shrunk))
    if bank.down_scale is not None:
        inner = Rows(inner.values, *quantize(inner.values))
    shrunk, b = None, None
    if bank.down_a is not None and lora is not None:
        made = chunk.product(inner, bank.down_a, dtype=torch.bfloat16, taken=False)
        shrunk, b = chunk.mask(lora.down, made), bank.down_b
    return chunk.product(
        inner, bank.down, bank.down_scale, dtype=torch.float32, taken=False, bias=bank.down_bias,
        shrunk=shrunk, b=b, weighted=True,
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A stand-in for what a kernel does not read."""
    return other if tensor is None else tensor
