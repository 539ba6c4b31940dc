"""Lower bounds of decoding and prefill times: the inventory's numbers at measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.layers.int8 import INT8
from ktrt.loading.inventory import (
    ATTENTION,
    EMBEDDINGS,
    EXPERT_BIASES,
    EXPERT_LORA,
    EXPERTS,
    HEAD,
    LORA,
    MLP,
    TABLES,
)

if TYPE_CHECKING:
    from ktrt.loading.inventory import Inventory


@dataclass(frozen=True)
class ModelWork:
    """The work of a model whose routed experts are all computed on the CPU. Rates are bytes,
    peaks operations per second."""

    inventory: Inventory

    @property
    def other_format(self) -> str:
        """The weight format of most products outside the routed experts."""
        rows = self.inventory.of(ATTENTION, MLP, HEAD)
        return INT8.name if any(row.form == INT8.name for row in rows) else "bf16"

    def bytes_by_part(self, kt_backend: str, context: int = 0) -> dict[str, float]:
        """Returns the bytes that decoding a token reads, after ``context`` others."""
        inventory = self.inventory
        return {
            EXPERTS: inventory.experts[kt_backend].read + inventory.read(EXPERT_BIASES),
            EXPERT_LORA: inventory.read(EXPERT_LORA),
            ATTENTION: inventory.read(ATTENTION),
            MLP: inventory.read(MLP, TABLES, EMBEDDINGS),
            HEAD: inventory.read(HEAD),
            LORA: inventory.read(LORA),
            f"KV cache of {context} tokens": float(inventory.kv.bytes_of(context)),
        }

    def decode_seconds(
        self, kt_backend: str, cpu_rate: float, gpu_rate: float | None = None, context: int = 0
    ) -> float:
        """Returns the lower bound for a token: every byte is read once, experts and their LoRA from
        the CPU's memory, the rest from the GPU's if there is one."""
        parts = self.bytes_by_part(kt_backend, context)
        experts = parts.pop(EXPERTS) + parts.pop(EXPERT_LORA)
        return experts / cpu_rate + sum(parts.values()) / (gpu_rate or cpu_rate)

    def prefill_seconds(
        self,
        kt_backend: str,
        tokens: int,
        cpu_rate: float,
        expert_peak: float,
        other_peak: float | None,
    ) -> float:
        """Returns the lower bound for a prompt of ``tokens``: the larger of the arithmetic at its
        peak and one read of the weights. ``other_peak`` None: the rest is on a GPU, which is taken
        to be faster. Leaves out attention's own products, which grow with the square."""
        experts = self.inventory.experts[kt_backend]
        operations = 2.0 * tokens * (experts.values + self.inventory.values(EXPERT_LORA))
        # Tokens that are routed evenly read this share of the experts.
        met = 1 - (1 - experts.share) ** tokens
        seconds = max(operations / expert_peak, met * experts.read / experts.share / cpu_rate)
        if other_peak is not None:
            values = tokens * self.inventory.values(ATTENTION, MLP, LORA)
            operations = 2.0 * (values + self.inventory.values(HEAD))
            size = self.inventory.read(ATTENTION, MLP, HEAD)
            seconds += max(operations / other_peak, size / cpu_rate)
        return seconds
