"""Layout e: LoRA-Experts (``kt_use_lora_experts``), small MLPs in addition to the routed experts.

Keys ``…mlp.lora_experts.i.{gate,up,down}_proj.weight`` or ``{le_gate,le_up,le_down}``, gate and up
[I, H], down [H, I] with a separate I, in adapter_model or in ``lora_experts.safetensors``. As in
kt_kernel.sft, the mean over i of down(silu(gate x) * up x) is added to the MoE block's output, for
any activation of the routed experts. Every MoE layer has the same number of MLPs of one size.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ktrt.adapter.audit import AuditRow
from ktrt.adapter.layouts.interface import Mlp, Part
from ktrt.adapter.tensors import put_once
from ktrt.errors import AdapterError
from ktrt.experts.spec import PROJECTIONS, Projection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.adapter.files.settings import LoraSettings
    from ktrt.adapter.internal import BaseModel
    from ktrt.adapter.tensors import AdapterTensor
    from ktrt.experts.spec import ExpertsSpec

TITLE = "extra experts"
PROVIDES = "extra experts"
# Name of the module added to the MoE block.
MODULE_NAME = "lora_experts"

_MODULE = re.compile(rf"(?P<block>.+)\.{MODULE_NAME}\.(?P<index>\d+)\.(?P<leaf>\w+)")
_LEAVES: dict[str, Projection] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "le_gate": "gate", "le_up": "up", "le_down": "down",
}  # fmt: skip


@dataclass(frozen=True)
class ExtraSlot:
    """One matrix of extra expert ``index`` of the MoE block at ``block``."""

    block: str
    index: int
    projection: Projection


def claim(tensor: AdapterTensor, base: BaseModel) -> ExtraSlot | None:
    """Returns the tensor's matrix; None for other tensors. Raises ``AdapterError`` if the base has
    no MoE block there."""
    match = _MODULE.fullmatch(tensor.module)
    projection = _LEAVES.get(match["leaf"]) if match else None
    if match is None or projection is None or tensor.part != "weight":
        return None
    for block in (match["block"], _renamed(match["block"], base)):
        if any(_block(site) == block for site in base.experts):
            return ExtraSlot(block, int(match["index"]), projection)
    raise AdapterError(
        f"{tensor.where} is an extra expert of {match['block']}, which is no MoE block of the "
        f"base; {base.summary()}. The adapter was trained on another base model."
    )


def _block(site: ExpertsSpec) -> str:
    return site.path.rpartition(".")[0]


def _renamed(block: str, base: BaseModel) -> str:
    experts = base.names.target(f"{block}.experts.down_proj").name.removesuffix(".down_proj")
    return experts.rpartition(".")[0]


def collect(
    claimed: Sequence[tuple[AdapterTensor, ExtraSlot]], base: BaseModel, _settings: LoraSettings
) -> Part:
    """Returns the MLPs of each block, in the order of their numbers.

    Raises ``AdapterError`` with tensor, finding and expectation for a wrong shape, a missing matrix
    or number, and MoE layers with fewer MLPs.
    """
    found: dict[ExtraSlot, AdapterTensor] = {}
    rows = []
    layers = {_block(site): site for site in base.experts}
    first, slot = claimed[0]
    size = first.value.shape[slot.projection == "down"] if first.value.ndim == 2 else 0
    for tensor, slot in claimed:
        hidden = layers[slot.block].hidden_size
        expected = (hidden, size) if slot.projection == "down" else (size, hidden)
        if tuple(tensor.value.shape) != expected:
            raise AdapterError(
                f"{tensor.where} has shape {list(tensor.value.shape)}, expected {list(expected)}: "
                f"hidden_size {hidden}, and {size} as in {first.key}."
            )
        put_once(found, slot, tensor)
        acts_on = f"{slot.block}.{MODULE_NAME}.{slot.index}.{slot.projection}_proj"
        layer = layers[slot.block].layer
        rows.append(AuditRow(tensor.key, acts_on, tensor.part, layer, None, None))
    count = 1 + max(slot.index for slot in found)
    return Part(extra={block: _mlps(found, block, count) for block in layers}, rows=rows)


def _mlps(found: Mapping[ExtraSlot, AdapterTensor], block: str, count: int) -> list[Mlp]:
    """Returns the ``count`` MLPs of one block."""
    mlps = []
    for index in range(count):
        matrices = {}
        for projection in PROJECTIONS:
            tensor = found.get(ExtraSlot(block, index, projection))
            if tensor is None:
                raise AdapterError(
                    f"{next(iter(found.values())).file}: {block}.{MODULE_NAME}.{index}."
                    f"{projection}_proj is missing; expected {count} whole extra experts in every "
                    "MoE layer. The file is incomplete."
                )
            matrices[projection] = tensor.value
        mlps.append((matrices["gate"], matrices["up"], matrices["down"]))
    return mlps


class ExtraExperts(nn.Module):
    """``scale`` times the mean of SiLU-gated MLPs: x [..., hidden_size] → the same shape."""

    def __init__(self, mlps: Sequence[Mlp], like: torch.Tensor) -> None:
        """Takes dtype and device from ``like``."""
        super().__init__()
        self.scale = 1.0

        def parameters(which: int) -> nn.ParameterList:
            placed = (mlp[which].to(like.device, like.dtype) for mlp in mlps)
            return nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in placed)

        self.gate, self.up, self.down = parameters(0), parameters(1), parameters(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            out = out + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return self.scale * out / len(self.gate)


class ExtraExpertsSwitch:
    """One adapter's extra experts in one MoE block, added to its output; off until weighed."""

    def __init__(self, block: nn.Module, experts: ExtraExperts) -> None:
        numbers = itertools.count(1)
        self._block, self._experts, self._name = block, experts, MODULE_NAME
        while hasattr(block, self._name):
            self._name = f"{MODULE_NAME}_{next(numbers)}"
        experts.scale = 0.0
        block.add_module(self._name, experts)
        add = functools.partial(_add_extra_experts, experts)
        self._hook = block.register_forward_hook(add, with_kwargs=True)

    def weigh(self, weight: float) -> None:
        """Multiplies the output by ``weight`` from the next forward on; 0 is off."""
        self._experts.scale = weight

    def remove(self) -> None:
        """Removes the experts from the block."""
        self._hook.remove()
        delattr(self._block, self._name)


def apply_extra_experts(
    extra: Mapping[str, Sequence[Mlp]], model: nn.Module
) -> list[ExtraExpertsSwitch]:
    """Gives each MoE block of the loaded ``model`` its ``ExtraExperts``."""
    whole: Any = model
    like = whole.get_input_embeddings().weight
    return [
        ExtraExpertsSwitch(model.get_submodule(path), ExtraExperts(mlps, like))
        for path, mlps in extra.items()
    ]


def _add_extra_experts(
    experts: ExtraExperts,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """Forward hook. Some blocks return a tuple; the hidden states come first."""
    if experts.scale == 0:
        return output
    states = args[0] if args else kwargs["hidden_states"]
    added = experts(states)
    if isinstance(output, tuple):
        return (output[0] + added.view_as(output[0]), *output[1:])
    return output + added.view_as(output)
