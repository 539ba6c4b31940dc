"""Attention of a forward of many sequences: decode rows, then spans of prefill tokens.

A decode row has the bits that it has alone. On the CPU, a span's queries go through torch in blocks
cut at multiples of 256 positions, with keys up to the block's end: what torch computes for a query
depends on the number of keys and, below about 30, of queries (by one part in 300 of a bfloat16
result, in 10⁶ of a float32 one), but not on which queries stand next to it. So neither chunks nor
other sequences change a token's bits. Blocks of 256 take no longer than 512 queries at once (one
thread, 16 heads of 192 numbers, 4,096 positions: 338 ms both; blocks of 128: 395 ms).
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack

from ktrt.engine.recording import active
from ktrt.errors import KtrtError
from ktrt.layers.form import is_nothing
from ktrt.layers.one_token import one_token, torch_threads_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ktrt.engine.step_rows import StepRows, TokenSpan

# Positions of a block of queries; a shorter block is filled up to a multiple of _QUERIES.
_BLOCK = 256
_QUERIES = 32
# Arguments that some models pass to an attention, and that change its result.
_UNUSUAL = (
    "dropout", "position_bias", "cache", "softcap", "output_attentions", "s_aux", "sliding_window",
)  # fmt: skip


class Held(Protocol):
    """A layer's keys and values of all slots."""

    value_size: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that the layer reads, for a recorder."""

    def bind(
        self, query: torch.Tensor, rows: StepRows, out: torch.Tensor
    ) -> Callable[[], None] | None:
        """Returns a function that computes the decode rows of ``query`` [heads, rows, size] into
        ``out`` [rows, heads, value size] in the engine, whose memory stays; None: by torch."""

    def sequence(
        self, slot: int, length: int, adapter: int, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys [1, groups, n, size] and values [1, groups, n, value size]: a slot's first
        ``length`` positions, then zeros up to ``room``, or up to the slot's end."""


def attend(
    rows: StepRows, query: torch.Tensor, held: Held, scaling: float | None,
    options: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    """query [1, heads, tokens, size]; returns [1, tokens, heads, value size]. ``KtrtError``: the
    model's attention is not a plain one over the step's tokens."""
    unusual = [name for name in _UNUSUAL if not is_nothing(options.get(name))]
    if unusual or query.shape[0] != 1 or query.shape[2] != rows.tokens:
        raise KtrtError(
            f"attention of {[*query.shape]} queries{''.join(' with ' + name for name in unusual)}, "
            f"expected a plain one of the step's {rows.tokens} tokens"
        )
    rows.attended += 1
    if (recorder := active()) is not None:
        if rows.spans:
            raise KtrtError("the step cannot be recorded: it has spans of prefill tokens")
        shape = 1, rows.decode, query.shape[1], held.value_size
        reads = (query, *held.tensors, rows.slots, rows.lengths, rows.adapters)

        def bind(out: torch.Tensor) -> Callable[[], None]:
            return _decode(rows, query, held, scaling, out)

        return recorder.call(shape, reads, bind)
    out = query.new_empty(1, rows.tokens, query.shape[1], held.value_size)
    if rows.decode:
        _decode(rows, query[:, :, : rows.decode], held, scaling, out[:, : rows.decode])()
    for span in rows.spans:
        places = slice(span.first, span.first + span.count)
        _prefill(rows, span, query[:, :, places], held, scaling, out[:, places])
    return out


def _decode(
    rows: StepRows, query: torch.Tensor, held: Held, scaling: float | None, out: torch.Tensor
) -> Callable[[], None]:
    """Returns a function that fills ``out`` by what ``rows`` says when it is called."""
    bound = held.bind(query[0], rows, out[0])
    return bound or _within_modes(functools.partial(_each_row, rows, query, held, scaling, out))


def _within_modes(call: Callable[[], None]) -> Callable[[], None]:
    """Returns ``call`` within the present function modes of torch: the model's forward enters
    them, and a recorded step runs without it."""
    modes = _get_current_function_mode_stack()

    def run() -> None:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            call()

    return run if modes else call


def _each_row(
    rows: StepRows, query: torch.Tensor, held: Held, scaling: float | None, out: torch.Tensor
) -> None:
    facts = rows.slots.tolist(), rows.lengths.tolist(), rows.adapters[: rows.decode].tolist()
    for row, (slot, length, adapter) in enumerate(zip(*facts, strict=True)):
        if length == 0:
            out[:, row] = 0
            continue
        key, value = held.sequence(slot, length, adapter, length)
        one = query[:, :, row : row + 1]
        if query.device.type == "cpu":
            # One thread, whether the step is recorded or not.
            with torch_threads_for(0):
                out[:, row] = one_token(one, key, value, None, scaling)[:, 0]
        else:
            out[:, row] = _by_torch(one, key, value, None, scaling)[:, :, 0]


def _prefill(
    rows: StepRows, span: TokenSpan, query: torch.Tensor, held: Held, scaling: float | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    end = span.start + span.count
    adapter = int(rows.adapters[span.first])
    if query.device.type != "cpu":
        key, value = held.sequence(span.slot, end, adapter, end)
        out.copy_(at_once(query, key, value, scaling))
        return
    key, value = held.sequence(span.slot, end, adapter, -(-end // _BLOCK) * _BLOCK)
    # torch computes values of another width without its fused kernel, in float32 and with copies.
    value = pad(value, (0, max(0, key.shape[-1] - value.shape[-1])))
    at = span.start
    while at < end:
        edge = (at // _BLOCK + 1) * _BLOCK
        keys, first, last = min(edge, key.shape[2]), at - span.start, min(edge, end) - span.start
        block = query[:, :, first:last]
        block = pad(block, (0, 0, 0, -block.shape[2] % _QUERIES))
        mask = _later_hidden(at, block.shape[2], keys, query.dtype, query.device)
        found = _by_torch(block, key[:, :, :keys], value[:, :, :keys], mask, scaling)
        out[:, first:last] = found[:, :, : last - first, : out.shape[-1]].transpose(1, 2)
        at = edge


def at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of the last positions of one sequence, as a GPU computes it: query [1, heads, n,
    size], key and value [1, groups, positions, …]; returns [1, n, heads, value size]."""
    heads, count, end = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    # With a mask and groups of heads, torch has no fused kernel there.
    key, value = (x.repeat_interleave(heads, 1) if heads > 1 else x for x in (key, value))
    mask = _later_hidden(end - count, count, end, query.dtype, query.device)
    return _by_torch(query, key, value, mask, scaling).transpose(1, 2)


def _by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    return scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


# The masks of a forward's blocks: every layer needs them again.
@functools.lru_cache(maxsize=8)
def _later_hidden(
    first: int, queries: int, keys: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Returns what is added to scores [queries, keys] of the positions from ``first`` on, so that
    each sees itself and what comes before it."""
    with torch.inference_mode(False):
        hidden = torch.full((queries, keys), float("-inf"), dtype=dtype, device=device)
        return hidden.triu_(first + 1)
