"""What one token makes a model read and compute, and how fast a machine can do that at best."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.formats import BACKENDS
from ktrt.layers.int8 import int8_bytes, int8_layers
from ktrt.loading.memory import kv_bytes_per_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ktrt.experts import ExpertsSpec

_ATTENTION = re.compile(r"attn|attention|mixer|ssm|mamba")


@dataclass(frozen=True)
class ModelWork:
    """Of decoding one token: numbers of weights that are read and multiplied once each.

    ``experts``: of the routed experts that a token meets, with ``expert_rows`` output rows;
    ``experts_held``: of all of them; ``expert_lora``: of the adapter on those experts, ``lora``: on
    the rest. ``attention``, ``head`` and ``other`` (dense and shared MLP, routers, norms) take
    ``other_bytes`` bytes per weight, on average; ``other_format``: what multiplies most of them.
    ``kv_token_bytes``: of the KV cache, read for every token before.
    """

    experts: int
    expert_rows: int
    experts_held: int
    expert_lora: int
    lora: int
    attention: int
    head: int
    other: int
    other_bytes: float
    kv_token_bytes: int
    other_format: str = "bf16"

    def bytes_by_part(self, kt_backend: str, context: int = 0) -> dict[str, float]:
        """Bytes that decoding one token reads, after ``context`` others."""
        row = BACKENDS[kt_backend]
        scales = row.scale_bytes * self.expert_rows
        return {
            "routed experts": self.experts * row.bits / 8 + scales,
            # The engine keeps LoRA in bfloat16, PEFT in float32.
            "LoRA of the experts": 2.0 * self.expert_lora,
            "attention": self.attention * self.other_bytes,
            "dense and shared MLP, routers": self.other * self.other_bytes,
            "head": self.head * self.other_bytes,
            "LoRA elsewhere": 4.0 * self.lora,
            f"KV cache of {context} tokens": float(context * self.kv_token_bytes),
        }

    def expert_bytes_held(self, kt_backend: str) -> float:
        """Bytes of all routed experts."""
        token = self.bytes_by_part(kt_backend)["routed experts"]
        return token * self.experts_held / self.experts

    def decode_seconds(
        self, kt_backend: str, cpu_rate: float, gpu_rate: float | None = None, context: int = 0
    ) -> float:
        """The least time of a token: every byte is read once, experts and their LoRA from the CPU's
        memory, the rest from the GPU's if there is one. Rates in bytes per second."""
        parts = self.bytes_by_part(kt_backend, context)
        experts = parts.pop("routed experts") + parts.pop("LoRA of the experts")
        return experts / cpu_rate + sum(parts.values()) / (gpu_rate or cpu_rate)

    def prefill_seconds(
        self,
        kt_backend: str,
        tokens: int,
        cpu_rate: float,
        expert_peak: float,
        other_peak: float | None,
    ) -> float:
        """The least time of a prompt of ``tokens``: what is larger, arithmetic at its peak
        (operations per second; None: on a GPU, which takes no time beside the CPU) or one read of
        the weights. Attention's own products, which grow with the square, are left out."""
        operations = 2.0 * tokens * (self.experts + self.expert_lora)
        # Tokens that are routed evenly meet so many of the experts together.
        met = 1 - (1 - self.experts / self.experts_held) ** tokens
        size = met * self.expert_bytes_held(kt_backend)
        seconds = max(operations / expert_peak, size / cpu_rate)
        if other_peak is not None:
            others = self.attention + self.other + self.lora
            operations = 2.0 * (tokens * others + self.head)
            size = (others + self.head) * self.other_bytes
            seconds += max(operations / other_peak, size / cpu_rate)
        return seconds


def model_work(
    skeleton: nn.Module,
    specs: Sequence[ExpertsSpec],
    infer_dtype: str,
    lora: tuple[int, int] = (0, 0),
    *,
    int8: bool = False,
) -> ModelWork:
    """Counted on the meta device. ``lora``: values of the adapter on routed experts (all of them)
    and elsewhere. ``int8``: the linear layers of ``ktrt.layers.int8`` are."""
    dtype = None if infer_dtype == "auto" else getattr(torch, infer_dtype)
    experts = rows = held = 0
    for spec in specs:
        experts += spec.num_weights // spec.num_experts * spec.top_k
        held += spec.num_weights
        rows += spec.top_k * sum(size_out for size_out, _ in spec.parameters.values())
    paths = [spec.path for spec in specs]
    counts, size = _other_weights(skeleton, paths, dtype)
    if int8:
        for linear in int8_layers(skeleton, paths, dtype):
            size += int8_bytes(linear) - linear.weight.numel() * torch.bfloat16.itemsize
    total = sum(counts.values())
    return ModelWork(
        experts=experts,
        expert_rows=rows,
        experts_held=held,
        expert_lora=round(lora[0] * experts / held) if held else 0,
        lora=lora[1],
        attention=counts["attention"],
        head=counts["head"],
        other=counts["other"],
        other_bytes=size / total if total else 0.0,
        kv_token_bytes=kv_bytes_per_token(skeleton, paths, dtype),
        other_format="int8" if int8 else "bf16",
    )


def _other_weights(
    skeleton: nn.Module, expert_paths: Sequence[str], dtype: torch.dtype | None
) -> tuple[dict[str, int], int]:
    """Weights that decoding a token reads, by part, and their bytes. Of the embeddings it reads one
    row, unless they are the head too."""
    model: Any = skeleton
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head_weight = getattr(head, "weight", None)
    paths = tuple(f"{path}." for path in expert_paths)
    counts = {"attention": 0, "head": 0, "other": 0}
    size = 0
    for name, weight in skeleton.named_parameters():
        if weight is head_weight:
            part = "head"
        elif weight is getattr(embeddings, "weight", None) or name.startswith(paths):
            continue
        else:
            part = "attention" if _ATTENTION.search(name) else "other"
        counts[part] += weight.numel()
        size += weight.numel() * (dtype or weight.dtype).itemsize
    return counts, size
