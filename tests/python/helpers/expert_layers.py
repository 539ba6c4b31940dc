"""Small layers in the engine with random weights and LoRA, and their float32 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loras import apply_lora
from helpers.packed_formats import dequantized, random_matrix

from ktrt._core import Engine, MoeLayer

Ranks = tuple[int, int, int]  # gate, up, down; 0: none

# For tests that run with a GPU and without one.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@dataclass
class LayerCase:
    """One layer: weights [E, out, in], bfloat16 values in float32; LoRA with the scaling in B.

    ``share_a``: up uses gate's A. ``form``: further arguments of ``MoeLayer``; ``biased``: every
    projection has a bias.
    """

    num_experts: int
    top_k: int
    hidden: int
    inner: int
    ranks: Ranks = (0, 0, 0)
    share_a: bool = False
    seed: int = 0
    form: dict[str, Any] = field(default_factory=dict)
    biased: bool = False
    weights: dict[str, torch.Tensor] = field(init=False)
    lora: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.weights = {
            name: self._normal(out, size).bfloat16().float() for name, out, size in self._sizes()
        }
        self.lora = self.make_lora(self.ranks)
        self.biases = {}
        if self.biased:
            self.biases = {n: self._normal(out, 1)[..., 0] for n, out, _ in self._sizes()}

    def _sizes(self) -> list[tuple[str, int, int]]:
        up = (self.inner, self.hidden)
        sizes = [("gate", *up), ("up", *up), ("down", self.hidden, self.inner)]
        return sizes if self.form.get("has_gate", True) else sizes[1:]

    def _normal(self, out: int, size: int) -> torch.Tensor:
        shape = (self.num_experts, out, size)
        values: torch.Tensor = torch.randn(shape, generator=self._generator) / size**0.5
        return values

    def make_lora(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Returns arguments of ``load_lora``; ΔW is as large as the weights."""
        lora = {}
        by_name = dict(zip(("gate", "up", "down"), ranks, strict=True))
        for name, out, size in self._sizes():
            if rank := by_name[name]:
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
            **self.form,
        )
        self._load(layer)
        if self.biases:
            layer.set_biases(**self.biases)
        if self.lora:
            apply_lora(layer, **self.lora)
        return layer

    def _load(self, layer: MoeLayer) -> None:
        names = ("gate", "up", "down")
        for expert in range(self.num_experts):
            gate, up, down = (
                self.weights[name][expert] if name in self.weights else None for name in names
            )
            layer.load_expert(expert, gate, up, down)

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


@dataclass
class CodedCase(LayerCase):
    """A layer whose experts come as codes and scales; its weights are bf16(code · scale)."""

    coded: str = "fp8"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.codes = {}
        for number, (name, out, size) in enumerate(self._sizes()):
            each = [
                random_matrix(self.coded, out, size, 1000 * self.seed + 100 * number + expert)
                for expert in range(self.num_experts)
            ]
            self.codes[name] = each
            exact = np.stack([dequantized(*matrix, self.coded) for matrix in each])
            self.weights[name] = torch.from_numpy(exact).bfloat16().float()

    def _load(self, layer: MoeLayer) -> None:
        if layer.weight_format != self.coded:
            super()._load(layer)
            return
        for expert in range(self.num_experts):
            pairs = {name: self._arrays(each[expert]) for name, each in self.codes.items()}
            layer.load_coded_expert(expert, pairs.get("gate"), pairs["up"], pairs["down"])

    def _arrays(self, matrix: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = (torch.from_numpy(array) for array in matrix)
        return codes, scales.bfloat16() if self.coded.startswith("int4") else scales
