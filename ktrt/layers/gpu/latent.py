"""Latent attention on a GPU, over latents as they lie in the cache.

With kv_b_proj's halves U and V of each head, q · (U c) = (q U) · c and Σ p (V c) = V (Σ p c): a
query of few tokens reads the latents once, for all heads. Its LoRA is absorbed in the same way, in
its factors, since each row of a step may have its own: q · (E A c) = ((q E) A) · c. A long prompt
expands keys and values, of as many heads at once as a bounded memory holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ktrt.engine.rank_masks import RankMask
from ktrt.layers.cuda_linear import Factors, factors_of
from ktrt.layers.gpu.decode import Operands, attend
from ktrt.layers.gpu.prefill import attend_prompt

if TYPE_CHECKING:
    from ktrt.layers.form import AttentionForm

# Expanded keys and values that a layer holds at once.
_EXPANDED_BYTES = 128 << 20
# How much faster a prompt's products run than a decode kernel's.
_PROMPT_GAIN = 2


class AbsorbedLatents:
    """The attention of one layer whose ``expand_kv`` is kv_b_proj, halves split by head, positions
    appended."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.heads = int(module.num_heads)
        self.nope, self.value = int(module.qk_nope_head_dim), int(module.v_head_dim)

    def factors(self) -> Factors | None:
        """Returns kv_b_proj's; None: it has to compute for itself."""
        return factors_of(self._module.kv_b_proj)

    def last(
        self, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor,
        form: AttentionForm,
    ) -> torch.Tensor | None:  # fmt: skip
        """``prefill_attention`` of latents [rows, 1, positions, rank] and their positions; None:
        kv_b_proj has to expand them."""
        factors, (rows, _, tokens, _), total = self.factors(), query.shape, latents.shape[2]
        if factors is None:
            return None
        if self._prefers_latents(tokens, latents.shape[-1]):
            lengths = torch.full((rows,), total, device=query.device)
            return self.decode(factors, query, latents, positions, lengths, form)
        return self.prompt(factors, query, latents, positions, form) if rows == 1 else None

    def _prefers_latents(self, tokens: int, rank: int) -> bool:
        """Whether the last ``tokens`` of a long context take less on latents, 2 · rank products for
        each position and head, than on keys and values that are first expanded."""
        width = self.nope + self.value
        return tokens * (2 * rank - width) * _PROMPT_GAIN <= rank * width

    def decode(
        self, factors: Factors, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor,
        lengths: torch.Tensor, form: AttentionForm, slots: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """query [rows, heads, n, nope + rope], latents [rows, 1, capacity, rank], positions [rows,
        1, capacity, rope] (with ``slots`` of all slots), as ``decode_attention``; returns [rows, n,
        heads, v]."""
        rows, heads, tokens, _ = query.shape
        nope, rest = query.split([self.nope, query.shape[-1] - self.nope], -1)
        keys, values = self._halves(factors.weight)
        each = nope.transpose(0, 1).reshape(heads, rows * tokens, -1)
        absorbed = torch.bmm(each, keys)
        if factors.a is not None and factors.expand is not None:
            expand = factors.expand.view(-1, heads, self.nope + self.value)
            shrunk = _own(factors, torch.bmm(each, expand[..., : self.nope].permute(1, 2, 0)))
            _add_product(absorbed, shrunk, factors.a)
        absorbed = absorbed.view(heads, rows, tokens, -1).transpose(0, 1)
        operands = Operands(absorbed, latents, latents, rest, positions)
        sums = attend(operands, lengths, form, slots=slots)
        return self._expand_sums(factors, sums.view(rows * tokens, heads, -1), values).view(
            rows, tokens, heads, -1
        )

    def _expand_sums(
        self, factors: Factors, sums: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Returns V times the sums [tokens, heads, rank] of latents: [tokens, heads, v]."""
        tokens, heads, rank = sums.shape
        each = sums.transpose(0, 1)
        out = torch.bmm(each, values.transpose(1, 2))
        if factors.a is not None and factors.expand is not None:
            expand = factors.expand.view(-1, heads, self.nope + self.value)
            shrunk = F.linear(sums.view(-1, rank), factors.a).view(tokens, heads, -1)
            shrunk = _own(factors, shrunk.transpose(0, 1))
            out.baddbmm_(shrunk, expand[..., self.nope :].transpose(0, 1))
        return out.transpose(0, 1).contiguous()

    def prompt(
        self, factors: Factors, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor,
        form: AttentionForm,
    ) -> torch.Tensor:  # fmt: skip
        """The same for the last n of all positions of one row, [1, heads, n, …], whose tokens have
        one adapter."""
        total, width = latents.shape[2], self.nope + self.value
        at_once = _EXPANDED_BYTES // (total * width * latents.element_size())
        at_once = max(1, min(self.heads, at_once))
        nope, rest = query.split([self.nope, query.shape[-1] - self.nope], -1)
        out = query.new_empty(1, query.shape[2], self.heads, self.value)
        held, weight = latents[0, 0], factors.weight
        shrunk = None
        if factors.a is not None:
            shrunk = F.linear(held, factors.a)
            if factors.mask is not None:
                shrunk = _first_token(factors.mask)(shrunk)
        for first in range(0, self.heads, at_once):
            last = min(first + at_once, self.heads)
            numbers, heads = slice(first * width, last * width), slice(first, last)
            both = F.linear(held, weight[numbers])
            if shrunk is not None and factors.expand is not None:
                both.addmm_(shrunk, factors.expand[:, numbers])
            key, value = (
                both.view(1, total, -1, width)
                .transpose(1, 2)
                .split([self.nope, self.value], -1)
            )  # fmt: skip
            operands = Operands(
                nope[:, heads], key, value, rest[:, heads],
                positions.expand(-1, last - first, -1, -1),
            )  # fmt: skip
            attend_prompt(operands, form, out[:, :, heads])
        return out

    def _halves(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views U [heads, nope, rank] and V [heads, v, rank]."""
        both = weight.view(self.heads, self.nope + self.value, -1)
        return both[:, : self.nope], both[:, self.nope :]


def _own(factors: Factors, shrunk: torch.Tensor) -> torch.Tensor:
    """``shrunk`` [heads, tokens, ranks] with zeros where a rank is not the token's."""
    return shrunk if factors.mask is None else factors.mask(shrunk)


def _first_token(mask: RankMask) -> RankMask:
    """The mask of a step whose tokens have one adapter, for any number of tokens."""
    return RankMask(mask.present[:1], None if mask.factors is None else mask.factors[:1])


def _add_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Adds x [heads, tokens, ranks] times weight [ranks, size] to ``out`` [heads, tokens, size]."""
    out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight)
