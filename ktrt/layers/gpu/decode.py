"""Attention of a few last tokens on a GPU, over keys and values as they lie in the cache.

Flash-decoding: the heads of a group share one read of its keys and values, and the context is split
over the GPU. The number of splits follows from the rows and the GPU, never from a length: lengths
are read on the device, and each row's own is divided there, so that a captured graph serves all of
them. What lies after a row's length is not read: its memory may not even be mapped. Without Triton
torch computes the same, slowly, and reads everything.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ktrt.layers.form import AttentionForm

logger = logging.getLogger(__name__)

_LOG2E = math.log2(math.e)
# Numbers of a merge's tile.
_MERGED = 4096
_MOST_SPLITS = 128


@functools.cache
def kernels() -> Any:
    """Returns the module of Triton kernels; None, which is logged once: there is no Triton."""
    try:
        return importlib.import_module("ktrt.layers.gpu.kernels")
    except ImportError as error:
        logger.warning(
            "Attention on the GPU runs in torch, slower with every token of context: Triton cannot "
            "be imported (%s)", error,
        )  # fmt: skip
        return None


def runs_kernels(query: torch.Tensor) -> bool:
    """Whether Triton computes queries like this, and reads nothing after a row's length: on a GPU,
    or anywhere in its interpreter."""
    if kernels() is None:
        return False
    return query.is_cuda or type(kernels().decode_kernel).__name__ == "InterpretedFunction"


@dataclass(frozen=True)
class Operands:
    """An attention's inputs: query [rows, heads, n, size], key [rows, groups, positions, size],
    value [rows, groups, positions, value size]; ``query_rest`` and ``key_rest``: further numbers of
    the same vectors. A value that is the key itself is read once."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_rest: torch.Tensor | None = None
    key_rest: torch.Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of a key's two parts (0: no second) and of a value."""
        rest = 0 if self.key_rest is None else self.key_rest.shape[-1]
        return self.key.shape[-1], rest, self.value.shape[-1]

    def halved(self) -> Operands:
        """The same with vectors cut to powers of two, which a kernel's tiles are."""
        size = self.key.shape[-1]
        first = 1 << (size.bit_length() - 1)
        if self.key_rest is not None or first == size or size < _LEAST_TILE:
            return self
        query, rest = self.query.split([first, size - first], -1)
        key, key_rest = self.key.split([first, size - first], -1)
        return Operands(query, key, self.value, rest, key_rest)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query, key and value in one part each."""
        if self.query_rest is None or self.key_rest is None:
            return self.query, self.key, self.value
        rest = self.key_rest.expand(*self.key.shape[:-1], -1)
        query = torch.cat([self.query, self.query_rest], -1)
        return query, torch.cat([self.key, rest], -1), self.value

    def arguments(self) -> tuple[list[torch.Tensor], list[int]]:
        """Returns the kernels' arrays Q, Q2, K, K2, V and their strides by row, head and token."""
        arrays = [
            self.query, self.query if self.query_rest is None else self.query_rest,
            self.key, self.key if self.key_rest is None else self.key_rest, self.value,
        ]  # fmt: skip
        for each in arrays:
            if each.stride(-1) != 1:
                raise ValueError(
                    f"a vector's numbers are {each.stride(-1)} elements apart, expected 1"
                )
        return arrays, [stride for each in arrays for stride in each.stride()[:3]]

    def constants(self) -> dict[str, Any]:
        """Returns the kernels' constants about vectors."""
        size, rest, wide = self.sizes
        blocks = zip(("BLOCK_D", "BLOCK_D2", "BLOCK_V"), map(tile_size, self.sizes), strict=True)
        # Three products of TF32 are as good as float32's, which would take minutes to compile.
        precision = "tf32x3" if self.query.dtype == torch.float32 else "tf32"
        return {"D": size, "D2": rest, "DV": wide, "PRECISION": precision, **dict(blocks)}


# The shortest side of a product of tiles.
_LEAST_TILE = 16


def tile_size(size: int) -> int:
    return max(_LEAST_TILE, 1 << (size - 1).bit_length())


def form_arguments(form: AttentionForm) -> tuple[list[float], dict[str, Any]]:
    """Returns the kernels' scaling, softcap and window, and the constants about them."""
    # Powers of two, unless a softcap comes between.
    scaling = form.scaling if form.softcap else form.scaling * _LOG2E
    constants = {
        "SOFTCAP": bool(form.softcap), "WINDOW": bool(form.window), "SINKS": form.sinks is not None,
    }  # fmt: skip
    return [scaling, float(form.softcap), form.window], constants


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    form: AttentionForm,
    *,
    ring: int = 0,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [rows, heads, n, d]; key [rows, groups, capacity, d] and value [rows, groups, capacity,
    dv], of which row i's first ``lengths[i]`` positions are read, the last n of them the queries'
    own; ``lengths`` [rows] int64 on the device; zeros for a row of length 0. ``ring``: position p
    lies at p % ring. ``slots`` [rows] int64 on the device: the rows', of all slots, which
    key and value then have. Returns [rows, n, heads, dv] in the query's dtype."""
    return attend(Operands(query, key, value), lengths, form, ring, slots)


def attend(
    operands: Operands, lengths: torch.Tensor, form: AttentionForm, ring: int = 0,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``decode_attention`` of operands in parts."""
    if runs_kernels(operands.query):
        return _by_kernels(operands.halved(), lengths, form, ring, slots)
    query, *held = operands.joined()
    key, value = held if slots is None else (each[slots] for each in held)
    return _by_torch(query, key, value, lengths, form, ring)


@dataclass(frozen=True)
class Blocks:
    """The tiles of one launch: M queries, N positions."""

    m: int
    n: int
    warps: int
    stages: int


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """Returns how many SMs the device has, and the bytes of shared memory of one block."""
    if device.type != "cuda":
        return 4, 100 << 10
    facts: Any = torch.cuda.get_device_properties(device)
    return facts.multi_processor_count, getattr(facts, "shared_memory_per_block_optin", 99 << 10)


def _blocks(operands: Operands, queries: int) -> Blocks:
    """Chooses tiles; ``queries``: tokens times heads of a group.

    On an H200, three stages of 32 KB are the best of 6 choices for each shape: groups of 128
    numbers at 32,768 positions take 25 us (with two stages 36), of 64 numbers 25 (blocks of 16 KB:
    32), latents of 16 heads 24, of 128 heads 60 (tiles of 32 heads: 101, of 16: 129).
    """
    size, rest, wide = (tile_size(n) if n else 0 for n in operands.sizes)
    _, room = device_facts(operands.query.device)
    bytes_of = operands.query.element_size()
    long = size + rest >= 512
    most = 64 if bytes_of < 4 else _LEAST_TILE  # products of float32 need more registers
    m = min(max(_LEAST_TILE, 1 << (queries - 1).bit_length()), most)
    position = (size + rest + (0 if operands.value is operands.key else wide)) * bytes_of
    n = min(128, max(_LEAST_TILE, 1 << ((40 << 10) // position).bit_length() - 1))
    for block, stages in ((n, 3), (n, 2), (n // 2, 2)):
        fits = m * (size + rest) * bytes_of + stages * block * position <= room
        if block >= _LEAST_TILE and fits:
            return Blocks(m, block, 8 if long else 4, stages)
    return Blocks(_LEAST_TILE, _LEAST_TILE, 4, 1)


def _splits(operands: Operands, blocks: Blocks, programs: int, form: AttentionForm) -> int:
    """Chooses how many programs share a row's context, for ``programs`` without a split."""
    sms, _ = device_facts(operands.query.device)
    positions = operands.key.shape[2]
    if form.window:
        positions = min(positions, form.window + operands.query.shape[2] - 1)
    # One program for each SM; two, where one would leave SMs without any.
    wanted = (sms if programs * 4 <= sms else 2 * sms) // programs
    return max(1, min(_MOST_SPLITS, wanted, -(-positions // blocks.n)))


def _by_kernels(
    operands: Operands, lengths: torch.Tensor, form: AttentionForm, ring: int,
    slots: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    query, (_, _, wide) = operands.query, operands.sizes
    (rows, heads, tokens, _), groups = query.shape, operands.key.shape[1]
    blocks = _blocks(operands, tokens * heads // groups)
    tiles = -(-tokens * heads // groups // blocks.m)
    splits = _splits(operands, blocks, tiles * rows * groups, form)
    out = query.new_empty(rows, tokens, heads, wide)
    partial, sums = out, out
    if splits > 1:
        partial = query.new_empty(rows, tokens, heads, splits, wide, dtype=torch.float32)
        sums = query.new_empty(rows, tokens, heads, splits, dtype=torch.float32)
    arrays, strides = operands.arguments()
    scalars, constants = form_arguments(form)
    sinks = out if form.sinks is None else form.sinks
    kernels().decode_kernel[tiles, splits, rows * groups](
        *arrays, lengths, lengths if slots is None else slots, sinks, out, partial, sums, *scalars,
        ring, tokens, heads // groups, groups, splits, *strides, M=blocks.m, N=blocks.n,
        SINGLE=splits == 1, RING=ring > 0, SHARED=operands.value is operands.key,
        PICKED=slots is not None, num_warps=blocks.warps, num_stages=blocks.stages,
        **operands.constants(), **constants,
    )  # fmt: skip
    if splits > 1:
        many = 1 << (splits - 1).bit_length()
        block = min(tile_size(wide), max(_LEAST_TILE, _MERGED // many))
        kernels().merge_kernel[rows * tokens * heads, -(-wide // block)](
            partial, sums, sinks, out, splits, heads, DV=wide, SPLITS=many, BLOCK=block,
            SINKS=form.sinks is not None,
        )  # fmt: skip
    return out


def _by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor,
    form: AttentionForm, ring: int,
) -> torch.Tensor:  # fmt: skip
    (rows, heads, tokens, size), (groups, capacity) = query.shape, key.shape[1:3]
    grouped = query.reshape(rows, groups, -1, size).float() * form.scaling
    scores = grouped @ key.float().transpose(-1, -2)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    ends = lengths[:, None] - torch.arange(tokens - 1, -1, -1, device=key.device)
    at = torch.arange(capacity, device=key.device)
    if ring:  # the last position that lies there
        at = (lengths[:, None] - 1 - (lengths[:, None] - 1 - at) % ring)[:, None]
    ends = ends[:, :, None]
    seen = (at >= 0) & (at < ends)
    if form.window:
        seen &= at >= ends - form.window
    some = seen.any(-1, keepdim=True)
    # [rows, 1, heads of a group * tokens, capacity]
    each = seen.repeat(1, heads // groups, 1)[:, None]
    scores = scores.masked_fill(~each, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.float().view(1, groups, -1, 1, 1).expand(rows, -1, -1, tokens, -1)
        scores = torch.cat([scores, sinks.reshape(rows, groups, -1, 1)], -1)
    weights = scores.softmax(-1)[..., :capacity].masked_fill(~each, 0)
    held = value.float().masked_fill(~seen.any(1)[:, None, :, None], 0)
    out = (weights @ held).view(rows, heads, tokens, -1) * some[:, None]
    return out.to(query.dtype).transpose(1, 2).contiguous()
