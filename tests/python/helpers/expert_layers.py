"""Small layers in the engine with random weights and LoRA, and their float32 reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from helpers.loras import apply_lora

from ktrt._core import Engine, MoeLayer

Ranks = tuple[int, int, int]  # gate, up, down; 0: none


@dataclass
class LayerCase:
    """One layer: weights [E, out, in], bfloat16 values in float32; LoRA with the scaling in B.

    ``share_a``: up uses gate's A.
    """

    num_experts: int
    top_k: int
    hidden: int
    inner: int
    ranks: Ranks = (0, 0, 0)
    share_a: bool = False
    seed: int = 0
    weights: dict[str, torch.Tensor] = field(init=False)
    lora: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.weights = {
            name: self._normal(out, size).bfloat16().float() for name, out, size in self._sizes()
        }
        self.lora = self.make_lora(self.ranks)

    def _sizes(self) -> list[tuple[str, int, int]]:
        up = (self.inner, self.hidden)
        return [("gate", *up), ("up", *up), ("down", self.hidden, self.inner)]

    def _normal(self, out: int, size: int) -> torch.Tensor:
        shape = (self.num_experts, out, size)
        values: torch.Tensor = torch.randn(shape, generator=self._generator) / size**0.5
        return values

    def make_lora(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Returns arguments of ``load_lora``; ΔW is as large as the weights."""
        lora = {}
        for (name, out, size), rank in zip(self._sizes(), ranks, strict=True):
            if rank:
                lora[f"{name}_a"] = self._normal(rank, size).bfloat16().float()
                lora[f"{name}_b"] = self._normal(out, rank).bfloat16().float()
        if self.share_a:
            del lora["up_a"]
        return lora

    def build(self, engine: Engine, weight_format: str) -> MoeLayer:
        layer = MoeLayer(
            engine,
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            weight_format=weight_format,  # type: ignore[arg-type]
        )
        for expert in range(self.num_experts):
            layer.load_expert(expert, *(weight[expert] for weight in self.weights.values()))
        if self.lora:
            apply_lora(layer, **self.lora)
        return layer

    def inputs(
        self, tokens: int, dtype: torch.dtype = torch.float32, *, outside: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns states, ids (with repetitions; ``outside``: some are no expert's), weights."""
        generator = torch.Generator().manual_seed(tokens)
        states = torch.randn(tokens, self.hidden, generator=generator).to(dtype)
        low, high = (-1, self.num_experts + 1) if outside else (0, self.num_experts)
        ids = torch.randint(low, high, (tokens, self.top_k), generator=generator)
        return states, ids, torch.rand(tokens, self.top_k, generator=generator)

    def reference(
        self, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes in float32, slot by slot, with the LoRA merged into the weights."""
        lora = dict(self.lora)
        if self.share_a:
            lora["up_a"] = lora["gate_a"]
        merged = {
            name: w + lora[f"{name}_b"] @ lora[f"{name}_a"] if f"{name}_a" in lora else w
            for name, w in self.weights.items()
        }
        out = torch.zeros(states.shape, dtype=torch.float32)
        for token, (row, slots) in enumerate(zip(ids.tolist(), weights, strict=True)):
            x = states[token].float()
            for expert, weight in zip(row, slots, strict=True):
                if 0 <= expert < self.num_experts:
                    gate, up, down = (w[expert] for w in merged.values())
                    inner = torch.nn.functional.silu(gate @ x) * (up @ x)
                    out[token] += weight * (down @ inner)
        return out


def run_engine(
    layer: MoeLayer, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Returns the engine's result for the same arguments."""
    out = torch.empty_like(states)
    layer.forward(states, ids, weights, out)
    return out


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the relative error in the Euclidean norm."""
    expected = expected.float().cpu()
    return float((found.float().cpu() - expected).norm() / expected.norm())
