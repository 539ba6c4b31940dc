"""Short calls of the engine's LoRA interface: one LoRA, as number 0, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktrt.engine import MoeLayer


def apply_lora(layer: MoeLayer, **arrays: Any) -> None:
    """Loads a LoRA and makes it the only active one."""
    layer.load_lora(0, **arrays)
    layer.activate_loras([0], [1.0])


def apply_no_lora(layer: MoeLayer) -> None:
    """Deactivates all LoRA: forwards compute the base."""
    layer.activate_loras([], [])


def enable_lora(layer: MoeLayer, *, enabled: bool) -> None:
    """Switches the LoRA that ``apply_lora`` loaded."""
    layer.activate_loras(*(([0], [1.0]) if enabled else ([], [])))
