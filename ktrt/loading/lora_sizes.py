"""The memory of an adapter, before it is loaded: in the engine, by operator, and in torch.

The engine holds every resident adapter, under its number, in each operator that computes with it:
the experts, the linear layers, and latent attention, whose decode step has ``kv_b_proj``'s once
more. PEFT's parameters stay next to the engine's copies.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine import DenseLinear
from ktrt.engine.formats import STRIP_ROWS, round_up
from ktrt.layers.int8 import is_int8

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

_BLOCK_RANKS = 16


@dataclass(frozen=True)
class LoraSize:
    """An adapter's numbers on the routed experts and elsewhere, of the latter on routers, and the
    engine's bytes for the experts, padding included. ``linears``: the ranks of the linear layers by
    path, where LoRA is all that the adapter does. ``active``: it acts after loading."""

    expert_values: int
    values: int
    router_values: int
    expert_bytes: int
    linears: Mapping[str, int] = field(default_factory=dict)
    active: bool = True


def linear_lora_bytes(
    model: nn.Module,
    ranks: Mapping[str, int],
    dtype: torch.dtype | None,
    *,
    int8: bool,
    coded: Container[str] = (),
) -> int:
    """Returns the engine's bytes for LoRA of these ranks on linear layers of ``model``, by path,
    without a GPU. ``dtype`` None keeps each parameter's own; ``int8``: ``quantization_bit: 8``;
    ``coded``: the layers that keep the checkpoint's codes."""
    total = 0
    for path, rank in ranks.items():
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear or (dtype or layer.weight.dtype) != torch.bfloat16:
            continue
        if rank > DenseLinear.max_rank:
            continue
        packed = path in coded or (int8 and is_int8(path, layer))
        total += (_packed if packed else _dense)(rank, layer.out_features, layer.in_features)
        if _is_latent(model, path):
            total += _latent(rank, layer.out_features, layer.in_features, model, path)
    return total


def _dense(rank: int, rows: int, columns: int) -> int:
    """A [rank][in], B [pairs of ranks][out][2]; csrc/linear/dense_linear.h."""
    return _pages(2 * rank * columns) + _pages(2 * round_up(rank, 2) * rows)


def _packed(rank: int, rows: int, columns: int) -> int:
    """The layout of an expert's LoRA; csrc/lora/expert_lora.h."""
    a = 2 * round_up(rank, _BLOCK_RANKS) * round_up(columns, STRIP_ROWS)
    return _pages(a) + _pages(2 * round_up(rank, 2) * round_up(rows, STRIP_ROWS))


def _latent(rank: int, rows: int, columns: int, model: nn.Module, path: str) -> int:
    """A [rank][latent], B of keys and of values [heads][rank][size]; csrc/attention."""
    attention: Any = model.get_submodule(path.rpartition(".")[0])
    values = attention.num_heads * attention.v_head_dim
    return sum(_pages(2 * rank * size) for size in (columns, rows - values, values))


def _is_latent(model: nn.Module, path: str) -> bool:
    """Whether a decode step takes this layer apart (``layers.latent``)."""
    parent, _, name = path.rpartition(".")
    implementation = getattr(model.config, "_attn_implementation", None)
    attention = model.get_submodule(parent)
    return name == "kv_b_proj" and implementation == "sdpa" and hasattr(attention, "expand_kv")


def _pages(size: int) -> int:
    """Every array has its own pages."""
    return round_up(size, mmap.PAGESIZE)
