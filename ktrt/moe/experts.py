"""The module that stands where routed experts were, and hands their work to the engine."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

    from ktrt._core import MoeLayer
    from ktrt.moe.gpu_experts import GpuLayer

# Classes are replaced in transformers' modules, which the whole process shares.
_PATCH_LOCK = threading.Lock()


class KTExperts(nn.Module):
    """Routed experts without parameters: ``forward`` runs them in the C++ engine.

    Takes the arguments of the class it replaces and keeps none of them; ``attach`` supplies the
    packed layer once the weights are loaded.
    """

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()
        # transformers' own initialisation would look for the parameters of the replaced class.
        self._is_hf_initialized = True
        self._layer: MoeLayer | None = None
        self._max_qlen = 0
        # What the GPU does of this layer, if anything.
        self.gpu: GpuLayer | None = None

    def attach(self, layer: MoeLayer, max_qlen: int) -> None:
        """Binds the packed experts; ``max_qlen`` is the most tokens of one engine call."""
        self._layer = layer
        self._max_qlen = max_qlen

    @property
    def layer(self) -> MoeLayer:
        """The engine's layer. ``KtrtError`` before ``attach``."""
        if self._layer is None:
            raise KtrtError("the experts of this layer were never loaded into the engine")
        return self._layer

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden_size] in float32, float16 or bfloat16 on any device;
        top_k_index (integers) and top_k_weights [tokens, k]. Returns the shape, dtype and device
        of hidden_states."""
        if self.gpu is not None and self.gpu.streams(hidden_states.shape[0]):
            return self.gpu.forward_streamed(hidden_states, top_k_index, top_k_weights)
        if self.gpu is not None and self.gpu.resident:
            return self._forward_shared(self.gpu, hidden_states, top_k_index, top_k_weights)
        return self._forward_engine(hidden_states, top_k_index, top_k_weights)

    def _forward_shared(
        self,
        gpu: GpuLayer,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The engine's experts and the GPU's, in float32: rounded once."""
        ids = gpu.cpu_ids(top_k_index)
        if gpu.complete:
            total = gpu.forward_resident(hidden_states, top_k_index, top_k_weights)
            return total.to(hidden_states.dtype)
        # The engine first: where it answers later, the GPU computes meanwhile.
        others = self._forward_engine(hidden_states.float(), ids, top_k_weights)
        total = gpu.forward_resident(hidden_states, top_k_index, top_k_weights) + others
        return total.to(hidden_states.dtype)

    def _forward_engine(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        layer = self.layer
        states = hidden_states.to("cpu").contiguous()
        index = top_k_index.to("cpu").contiguous()
        weights = top_k_weights.to("cpu").contiguous()
        out = torch.empty_like(states)
        for start in range(0, states.shape[0], self._max_qlen):
            part = slice(start, start + self._max_qlen)
            layer.forward(states[part], index[part], weights[part], out[part])
        return out.to(hidden_states.device)

    def extra_repr(self) -> str:
        if self._layer is None:
            return "not attached"
        layer = self._layer
        return (
            f"num_experts={layer.num_experts}, top_k={layer.top_k}, "
            f"hidden_size={layer.hidden_size}, intermediate_size={layer.intermediate_size}, "
            f"weight_format={layer.weight_format}"
        )


@contextmanager
def experts_replaced(class_names: Iterable[str]) -> Iterator[None]:
    """Within the block, models that transformers builds get ``KTExperts`` for these classes.

    One load at a time, process-wide; the classes come back on failure too. The modelling files must
    have been imported.

    The library's own patch mapping does the same, but also visits its lazy modules, which fail to
    import where torchvision is missing (transformers 5.17).
    """
    with _PATCH_LOCK:
        originals = list(_library_classes(sorted(set(class_names))))
        for module, name, _ in originals:
            setattr(module, name, KTExperts)
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)


def _library_classes(names: list[str]) -> Iterator[tuple[ModuleType, str, type]]:
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers"):
            for name in names:
                if isinstance(original := vars(module).get(name), type):
                    yield module, name, original
