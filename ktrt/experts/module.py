"""The module that stands where routed experts were, and hands their work to the engine."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ktrt.engine.recording import active
from ktrt.engine.step_rows import ACTIVE, RunningStep
from ktrt.errors import KtrtError
from ktrt.experts.handoff import Deferred
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import ModuleType

    from ktrt.engine import MoeLayer
    from ktrt.experts.gpu.residents import GpuLayer
    from ktrt.experts.handoff import HandOff

# Classes are replaced in transformers' modules, which the whole process shares.
_PATCH_LOCK = threading.Lock()


class KTExperts(nn.Module):
    """Routed experts without weights in torch: ``forward`` runs them in the C++ engine.

    Takes the arguments of the class it replaces, and keeps only a norm that follows each expert;
    ``attach`` supplies the packed layer once the weights are loaded.
    """

    # The class that a subclass of this one stands for.
    replaced: ClassVar[type[nn.Module] | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.post_expert_norm: nn.Module | None = None
        if self.replaced is not None:
            with torch.device("meta"):
                plain = self.replaced(*args, **kwargs)
            if getattr(plain, "has_post_expert_norm", False):
                self.post_expert_norm = plain.get_submodule("post_expert_norm")
        # transformers' initialisation would look for the parameters of the replaced class; some
        # families look for them from the surrounding block.
        self._is_hf_initialized = True
        self.gate_up_proj = self.down_proj = torch.empty(0)
        self._layer: MoeLayer | None = None
        self._max_qlen = 0
        self._hand_off: HandOff | None = None
        self._path = ""
        # The model's present step: each token's LoRA.
        self.running = RunningStep()
        # The GPU's share of this layer, if it has one.
        self.gpu: GpuLayer | None = None
        # The engine gets no expert ids: everything around the experts runs, see ``experts_muted``.
        self.muted = False

    def attach(
        self,
        layer: MoeLayer,
        max_qlen: int,
        hand_off: HandOff | None = None,
        path: str = "",
        running: RunningStep | None = None,
    ) -> None:
        """Binds the packed experts; ``max_qlen`` is the most tokens of one engine call. With
        ``hand_off`` the module takes tensors of that device only, and errors name its ``path``.
        ``running`` tells each token's LoRA; without it all tokens have the active ones."""
        self._layer = layer
        self._max_qlen = max_qlen
        self._hand_off = hand_off
        self._path = path
        if running is not None:
            self.running = running

    @property
    def layer(self) -> MoeLayer:
        """The engine's layer. ``KtrtError`` before ``attach``."""
        if self._layer is None:
            raise KtrtError("the experts of this layer were never loaded into the engine")
        return self._layer

    @property
    def unusual_form(self) -> list[str]:
        """How the module differs from SiLU-gated experts, in words."""
        norm = [] if self.post_expert_norm is None else ["a norm after each expert"]
        return [*self.layer.unusual_form, *norm]

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden_size] in float32, float16 or bfloat16 on any device;
        top_k_index (integers) and top_k_weights [tokens, k]. Returns the shape, dtype and device
        of hidden_states; through a hand-off, a tensor that the engine may still write."""
        if self.post_expert_norm is None:
            return self._forward(hidden_states, top_k_index, top_k_weights)
        # The norm needs every expert's whole output: each (token, slot) goes as a token.
        tokens, slots = top_k_index.shape
        states = hidden_states.repeat_interleave(slots, dim=0)
        ones = torch.ones(tokens * slots, 1, device=hidden_states.device)
        each = self.post_expert_norm(self._run_engine(states, top_k_index.reshape(-1, 1), ones))
        weighted = each.view(tokens, slots, -1) * top_k_weights[..., None]
        summed: torch.Tensor = weighted.sum(dim=1)
        return summed.to(hidden_states.dtype)

    def _forward(
        self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        gpu, adapters = self.gpu, self._adapters(states)
        if gpu is not None and gpu.streams(states.shape[0]) and not self.muted:
            return gpu.forward_streamed(states, index, weights, adapters)
        if gpu is None or not gpu.resident:
            return self._run_engine(states, index, weights)
        ids = gpu.cpu_ids(index)
        if gpu.complete:
            return gpu.forward_resident(states, index, weights, adapters).to(states.dtype)
        # The engine first: through a hand-off, the GPU computes its share meanwhile. The sum is
        # made in float32 and rounded once.
        others = self._run_engine(states.float(), ids, weights)
        share = gpu.forward_resident(states, index, weights, adapters)
        if isinstance(others, Deferred):
            return others.plus(share, states.dtype)
        return (share + others).to(states.dtype)

    def _adapters(self, states: torch.Tensor) -> torch.Tensor | None:
        """Returns the LoRA of each of the rows, on their device; None: the active ones for all."""
        rows = self.running.rows
        if rows is None:
            return None
        adapters = rows.adapters
        if rows.device_adapters is not None:
            # A conversation's decode step spares the stream a copy.
            if rows.tokens == 1 and int(adapters[0]) == ACTIVE:
                return None
            adapters = rows.device_adapters
        each, rest = divmod(states.shape[0], rows.tokens)
        if rest or not each:
            raise KtrtError(
                f"the experts of {self._path or 'a layer'} were given {states.shape[0]} rows in a "
                f"step of {rows.tokens} tokens"
            )
        return adapters if each == 1 else adapters[:, None].expand(-1, each).reshape(-1)

    def _run_engine(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.muted and self._layer is None:
            return torch.zeros_like(hidden_states)
        layer, adapters = self.layer, self._adapters(hidden_states)
        if self.muted:
            top_k_index = torch.full_like(top_k_index, -1)  # adds nothing and costs nothing
        if self._hand_off is not None:
            return self._hand_off.run(
                layer, hidden_states, top_k_index, top_k_weights, self._path, adapters
            )
        states = hidden_states.to("cpu").contiguous()
        reads = [states, top_k_index.to("cpu").contiguous(), top_k_weights.to("cpu").contiguous()]
        if adapters is not None:
            reads.append(adapters.to("cpu"))
        recorder = active()
        if recorder is not None and states.shape[0] <= self._max_qlen:
            # ``bind`` reads the adapters again at every run of the step.
            index, weights, *chosen = reads[1:]
            return recorder.call(
                states.shape, reads,
                lambda out: layer.bind(states, index, weights, out, *chosen).run,
            )  # fmt: skip
        out = torch.empty_like(states)
        for start in range(0, states.shape[0], self._max_qlen):
            part = slice(start, start + self._max_qlen)
            hidden, index, weights, *chosen = (each[part] for each in reads)
            layer.forward(hidden, index, weights, out[part], *chosen)
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


def chosen_share(modules: Sequence[KTExperts]) -> float:
    """Returns the share of the engine's experts that the last forward of these modules read."""
    read = sum(module.layer.last_experts for module in modules)
    return read / sum(module.layer.num_experts for module in modules)


@contextmanager
def experts_muted(model: nn.Module) -> Iterator[None]:
    """Within the block the routed experts of ``model`` add nothing to its results, and their
    weights are not read, nor need they be loaded: for forwards whose results nobody wants. Nothing
    is streamed to a GPU, and a GPU's counts of routed tokens are forgotten."""
    modules = [module for module in model.modules() if isinstance(module, KTExperts)]
    for module in modules:
        module.muted = True
    try:
        yield
    finally:
        for module in modules:
            module.muted = False
            if module.gpu is not None:
                module.gpu.forget_counts()


@contextmanager
def experts_replaced(class_names: Iterable[str]) -> Iterator[None]:
    """Within the block, models that transformers builds get ``KTExperts`` for these classes.

    One load at a time, process-wide; the classes come back on failure too. The modelling files must
    have been imported.

    The library's own patch mapping does the same, but also visits its lazy modules, which fail to
    import where torchvision is missing (transformers 5.17).
    """
    with _PATCH_LOCK, Patches() as patches:
        for module, name, original in list(_library_classes(sorted(set(class_names)))):
            patches.set(module, name, type(name, (KTExperts,), {"replaced": original}))
        yield


def _library_classes(names: list[str]) -> Iterator[tuple[ModuleType, str, type]]:
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers"):
            for name in names:
                if isinstance(original := vars(module).get(name), type):
                    yield module, name, original
