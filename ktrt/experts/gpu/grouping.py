"""Routed tokens by expert, and their sums."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ktrt.experts.gpu import fused
from ktrt.experts.gpu.arithmetic import ALL_RANKS, expert_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.experts.gpu.arithmetic import ExpertBank, LoraChoice, Rows

# Rows of a grouped computation by torch, to bound its memory: a dozen arrays have this many.
_MOST_ROWS = 8192


class Grouping:
    """The (token, slot) pairs of one forward by expert, and their sums, which take float32
    [tokens, hidden_size] and no more, however many slots a token has.

    ids [tokens, k] integers, weights [tokens, k] float; ids outside [0, num_experts) contribute
    nothing. One host synchronisation, to know how many rows every expert has. ``order``: all
    experts, as they will be added; None: ascending.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        num_experts: int,
        hidden_size: int,
        order: Sequence[int] | None = None,
    ) -> None:
        tokens, slots = ids.shape
        self._order = list(range(num_experts) if order is None else order)
        inside = (ids >= 0) & (ids < num_experts)
        keys = torch.where(inside, ids, num_experts).flatten()
        if order is not None:
            place = torch.full((num_experts + 1,), num_experts)
            place[self._order] = torch.arange(num_experts)
            keys = place.to(ids.device)[keys]
        keys, self._positions = keys.sort(stable=True)
        limits = torch.arange(num_experts + 1, device=ids.device, dtype=keys.dtype)
        self._bounds: list[int] = torch.searchsorted(keys, limits).tolist()
        self._added, self._slots = 0, slots
        self._tokens = self._positions.div(slots, rounding_mode="floor")
        self._weights = weights.float().flatten()[self._positions][:, None]
        self._total = torch.zeros(tokens, hidden_size, device=ids.device)
        # Now: the copy of its table waits for what the stream waits for, such as the next experts.
        self._tiles = self._make_tiles() if fused.on_device(ids) else None

    def sizes(self) -> list[int]:
        """How many pairs each expert has, by its id."""
        counts = [end - begin for begin, end in pairwise(self._bounds)]
        return [count for _, count in sorted(zip(self._order, counts, strict=True))]

    def add(
        self,
        experts: Sequence[int],
        bank: ExpertBank,
        rows: Rows,
        lora: LoraChoice | None = ALL_RANKS,
    ) -> None:
        """Adds what the experts of ``bank`` owe, one expert after the other as the engine does;
        ``experts``: their ids, the next ones of the order, in the bank's order.

        ``rows`` and ``lora`` (None: without): of all tokens.
        """
        first, end = self._added, self._added + len(experts)
        assert self._order[first:end] == list(experts), "experts come in another order"
        self._added = end
        if self._tiles is not None and fused.runs_kernels(bank, rows):
            fused.add_experts(self._total, self._tiles, range(first, end), bank, rows, lora)
            return
        pieces: list[tuple[int, int, int]] = []
        for index, (begin, stop) in enumerate(pairwise(self._bounds[first : end + 1])):
            # Even pieces: a few rows at the end would cost another GEMM.
            count = -(-(stop - begin) // _MOST_ROWS)
            cuts = [begin + (stop - begin) * cut // max(count, 1) for cut in range(count + 1)]
            pieces += [(index, *limits) for limits in pairwise(cuts)]
        while pieces:
            taken, size = 0, 0
            while taken < len(pieces) and size + pieces[taken][2] - pieces[taken][1] <= _MOST_ROWS:
                size += pieces[taken][2] - pieces[taken][1]
                taken += 1
            self._compute(pieces[:taken], bank, rows, lora)
            del pieces[:taken]

    def _make_tiles(self) -> fused.Tiles:
        places = torch.empty_like(self._positions, dtype=torch.int32)
        count = len(self._positions)
        places[self._positions] = torch.arange(count, dtype=torch.int32, device=places.device)
        return fused.make_tiles(
            self._bounds, self._tokens, self._weights, places.view(-1, self._slots)
        )

    def _compute(
        self,
        pieces: Sequence[tuple[int, int, int]],
        bank: ExpertBank,
        rows: Rows,
        lora: LoraChoice | None,
    ) -> None:
        """(index in the bank, first row, end) of pieces whose rows fit into memory together."""
        groups, at = [], 0
        for index, begin, end in pieces:
            groups.append((index, slice(at, at + end - begin)))
            at += end - begin
        taken = [slice(begin, end) for _, begin, end in pieces]
        tokens = torch.cat([self._tokens[each] for each in taken])
        own = None if lora is None else lora.take(tokens)
        out = expert_outputs(rows.take(tokens), bank, groups, own)[:, : self._total.shape[1]]
        out *= torch.cat([self._weights[each] for each in taken])
        for _, own_rows in groups:
            # A token is here once: in whatever order rows are added, the sums are the same.
            self._total.index_add_(0, tokens[own_rows], out[own_rows])

    def total(self) -> torch.Tensor:
        """The weighted sums, float32 [tokens, hidden_size]."""
        return self._total
