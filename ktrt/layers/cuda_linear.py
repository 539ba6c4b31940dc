"""LoRA of a GPU's Linears in one small kernel after the layer's GEMM, instead of four.

A's rows follow the base weight's in one matrix, so that one GEMM gives W x and A x; the expand,
scaling folded into B, is then added in place. PEFT's layer takes four kernels for that, and at one
token each costs its launch: on an H100, with LoRA on DeepSeek-V2-Lite's 189 Linears, 1.8 ms of a
decode step.

PEFT stays the owner of the adapters: before a forward of the model, ``FusedLora`` compares the
version of the active set, and after a change reads PEFT's layers again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ktrt.engine.active_set import ActiveSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.utils.patches import Patches

# Rows of the joint matrix are padded to this, so that every output row keeps 16-byte alignment.
_RANK_STEP = 8
# LoRA states of each layer whose matrices are kept ready.
_KNOWN_STATES = 4


class FusedLora:
    """The fused LoRA Linears of a model; all other layers keep PEFT's forward."""

    def __init__(
        self,
        model: nn.Module,
        active_set: ActiveSet | None = None,
        patches: Patches | None = None,
    ) -> None:
        """Takes over every Linear that PEFT has wrapped, now and later, until ``patches`` are
        undone. Weights move, in memory, one by one."""
        self._model = model
        self._active_set = ActiveSet() if active_set is None else active_set
        self._linears: dict[nn.Module, _FusedLinear] = {}
        self.find()
        if patches is not None:
            patches.add(self._give_back)
            patches.add(model.register_forward_pre_hook(lambda *_: self.follow()).remove)
            patches.add(self._active_set.on_modules(self.find))

    def follow(self) -> None:
        """Looks at the version of the active adapters; costs one comparison."""
        if self._changes != self._active_set.changes:
            self.refresh()

    def _give_back(self) -> None:
        for linear in self._linears.values():
            linear.give_back()

    def find(self) -> None:
        """Takes over the layers that PEFT has wrapped since."""
        found = [module for module in self._model.modules() if _is_peft_linear(module)]
        self._linears = {each: self._linears.get(each) or _FusedLinear(each) for each in found}
        self.refresh()
        if torch.cuda.is_available():
            # The weights' first places, which the allocator would keep for itself.
            torch.cuda.empty_cache()

    def refresh(self) -> None:
        """Reads PEFT's active adapters and their scaling. Captured CUDA graphs hold the old numbers
        and must be dropped."""
        self._changes = self._active_set.changes
        # No inference tensors, which could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for linear in self._linears.values():
                linear.refresh()


def _is_peft_linear(module: nn.Module) -> bool:
    if "lora_A" not in module._modules:
        return False
    from peft.tuners.lora.layer import Linear

    return isinstance(module, Linear)


@dataclass(frozen=True)
class _Lora:
    """Active adapters side by side: ``a`` [ranks, in]; ``expand`` [ranks, out], the scaling in it,
    rounded once. Ranks are padded with zeros."""

    a: torch.Tensor
    expand: torch.Tensor


class _FusedLinear:
    def __init__(self, layer: Any) -> None:
        """``layer``: a ``peft.tuners.lora.layer.Linear``."""
        self._layer = layer
        self._base: nn.Linear = layer.get_base_layer()
        self._peft_forward = layer.forward
        # [out + ranks, in] and, if the base has one, its bias followed by zeros.
        self._joint: torch.Tensor | None = None
        self._joint_bias: torch.Tensor | None = None
        self._expand: torch.Tensor | None = None
        self._state: tuple[object, ...] | None = None
        # The LoRA of the last states: switching back and forth copies only a few rows.
        self._known: dict[tuple[object, ...], _Lora] = {}

    def refresh(self) -> None:
        layer = self._layer
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if not active or not self._plain(active):
            layer.forward, self._state = self._peft_forward, None
            return
        weights = [part[name].weight for name in active for part in (layer.lora_A, layer.lora_B)]
        memory = [self._base.weight, self._base.bias, *weights]
        state = (
            *((name, layer.scaling[name]) for name in active),
            *((None if each is None else (each.data_ptr(), each._version)) for each in memory),
        )
        if state != self._state:
            self._take(self._lora(state, active))
            # The weight may have moved meanwhile.
            first = (self._base.weight.data_ptr(), self._base.weight._version)
            self._state = (*state[: len(active)], first, *state[len(active) + 1 :])
        layer.forward = self._forward

    def give_back(self) -> None:
        """Restores PEFT's forward; the weight keeps its place."""
        self._layer.__dict__.pop("forward", None)

    def _plain(self, active: Sequence[str]) -> bool:
        layer, base = self._layer, self._base
        dtypes = {base.weight.dtype, *(layer.lora_A[name].weight.dtype for name in active)}
        return (
            type(base) is nn.Linear
            and len(dtypes) == 1
            and not layer.disable_adapters
            and not layer.merged
            and not layer.fan_in_fan_out
            and not any(name in layer.lora_variant for name in active)
            and all(layer.lora_B[name].bias is None for name in active)
        )

    def _lora(self, state: tuple[object, ...], active: Sequence[str]) -> _Lora:
        key = (*state[: len(active)], *state[len(active) + 2 :])  # the base's memory is no part
        if key in self._known:
            return self._known[key]
        layer, dtype = self._layer, self._base.weight.dtype
        a = torch.cat([layer.lora_A[name].weight for name in active])
        scaled = [layer.lora_B[name].weight.float() * layer.scaling[name] for name in active]
        pad = -a.shape[0] % _RANK_STEP
        expand = F.pad(torch.cat(scaled, dim=1).T, (0, 0, 0, pad)).to(dtype).contiguous()
        while len(self._known) >= _KNOWN_STATES:
            del self._known[next(iter(self._known))]
        lora = self._known[key] = _Lora(F.pad(a, (0, 0, 0, pad)), expand)
        return lora

    def _take(self, lora: _Lora) -> None:
        """Appends A to the weight's rows."""
        weight, ranks = self._base.weight, lora.a.shape[0]
        size_out, size_in = weight.shape
        joint = self._joint
        moved = joint is None or weight.data_ptr() != joint.data_ptr()
        if joint is None or moved or joint.shape[0] != size_out + ranks:
            self._joint = joint = weight.new_empty(size_out + ranks, size_in)
            joint[:size_out] = weight
            weight.data = joint[:size_out]
        joint[size_out:] = lora.a
        self._expand = lora.expand
        bias = self._base.bias
        self._joint_bias = None if bias is None else F.pad(bias, (0, ranks))

    def _forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args or options:
            result: torch.Tensor = self._peft_forward(x, *args, **options)
            return result
        joint, expand = self._joint, self._expand
        assert joint is not None
        assert expand is not None
        size_out = expand.shape[1]
        if x.numel() == x.shape[-1]:
            both = F.linear(x, joint, self._joint_bias)
            y, shrunk = both[..., :size_out], both[..., size_out:]
        else:
            # Rows that lie apart are not what every model's views expect.
            y = F.linear(x, joint[:size_out], self._base.bias)
            shrunk = F.linear(x, joint[size_out:])
        y.view(-1, size_out).addmm_(shrunk.reshape(-1, expand.shape[0]), expand)
        return y
