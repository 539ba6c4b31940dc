"""What decoding one token reads from the CPU's memory: the bound of its speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Parameter

from ktrt.experts import KTExperts
from ktrt.layers.linear import int8_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ktrt.engine import MoeLayer


def bytes_per_token(model: nn.Module) -> int | None:
    """Bytes of weights that one token reads from the CPU's memory: of the routed experts those that
    act on it, everything else whole, LoRA as it is switched now; the KV cache is not counted.

    None where experts live on a GPU too: which of them a token needs is then the router's choice.
    """
    total = 0.0
    for module in model.modules():
        if isinstance(module, KTExperts):
            if module.gpu is not None and module.gpu.resident:
                return None
            total += _expert_bytes(module.layer)
    return round(total) + _other_bytes(model)


def _expert_bytes(layer: MoeLayer) -> float:
    held = layer.packed_bytes
    if (lora := layer.packed_lora()) is not None:
        arrays = (lora.input.a, lora.intermediate.a, lora.gate.b, lora.up.b, lora.down.b)
        held += sum(array.nbytes for array in arrays if array is not None)
    return held * layer.top_k / layer.num_experts


def _other_bytes(model: Any) -> int:
    """Of the embedding table a row is read, unless it is the head too; of a layer in INT8 what the
    engine has packed."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    idle = set(_idle_parameters(model))
    packed = int8_bytes(model)
    total = sum(packed.values())
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and id(parameter) not in idle:
            one_row = parameter is table and (not tied or id(table) in packed)
            if one_row or id(parameter) not in packed:
                rows = parameter.shape[0] if one_row else 1
                total += parameter.numel() * parameter.element_size() // rows
    return total


def _idle_parameters(model: nn.Module) -> Iterator[int]:
    """The ids of PEFT's parameters that belong to adapters that do not act."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            active = [] if module.disable_adapters else module.active_adapters
            for kind in module.adapter_layer_names:
                for name, part in getattr(module, kind).items():
                    if name not in active:
                        parameters = [part] if isinstance(part, Parameter) else part.parameters()
                        yield from map(id, parameters)
