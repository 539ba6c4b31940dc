"""The linear layers that ``quantization_bit: 8`` makes INT8 on the CPU, and their memory.

All BF16 ``nn.Linear`` of attention, shared experts, dense MLP and head. Routers and other gates
stay as they are: a small change sends a token to other experts, and they are small. So does the
projection that latent attention splits by heads in a decode step (``ktrt.layers.latent``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from ktrt.engine.formats import format_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Parts of a module's path. PEFT's matrices are LoRA, which is exact.
_EXEMPT = re.compile(r"(?:^|\.)(?:gate|router|\w+_gate|kv_b_proj|lora_\w+)(?:\.|$)")
# Each output has codes, a scale, and the sum of its codes.
INT8 = format_named("int8")
# Longer rows could overflow the engine's int32 sums.
_MAX_IN = 65536


def is_int8(path: str, module: nn.Module) -> bool:
    """Whether the layer of this name is one of them; its dtype and device are not looked at."""
    return (
        type(module) is nn.Linear
        and _EXEMPT.search(path) is None
        and 0 < module.in_features <= _MAX_IN
    )


def int8_bytes(linear: nn.Linear) -> int:
    """Memory that the layer takes in INT8, which is also what one token reads of it."""
    rows, columns = linear.out_features, linear.in_features
    sizes = (INT8.code_bytes, INT8.scale_bytes, INT8.sum_bytes)
    return sum(size(rows, columns) for size in sizes)


def int8_layers(
    skeleton: nn.Module, expert_paths: Iterable[str], dtype: torch.dtype | None
) -> Iterator[nn.Linear]:
    """Yields the linear layers that INT8 applies to, of a model on the meta device. ``dtype`` None
    keeps each parameter's own; the routed experts at ``expert_paths`` are left out."""
    inside = tuple(f"{path}." for path in expert_paths)
    for path, module in skeleton.named_modules():
        if not isinstance(module, nn.Linear) or path.startswith(inside):
            continue
        if is_int8(path, module) and (dtype or module.weight.dtype) == torch.bfloat16:
            yield module
