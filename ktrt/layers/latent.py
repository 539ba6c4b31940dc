"""Multi-head latent attention on the CPU: a decode step that leaves the cached latents as they are.

transformers keeps latents c [1, 1, L, kv_lora_rank] in the KV cache, and expands them by kv_b_proj
into keys and values of all heads in every step: work that grows with the conversation. For one
query, q · (U c) = (q U) · c and Σ p (V c) = V (Σ p c): U and V, the halves of kv_b_proj, are read
once, and the latents are used as they are, in the engine. Longer inputs are expanded as before,
their values padded to the keys' width: torch computes attention of different widths in float32,
with copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine import LatentAttention
from ktrt.engine.recording import active
from ktrt.layers.attention import head_array
from ktrt.layers.forward import DenseForward

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder
    from ktrt.utils.patches import Patches

# Its name in transformers. Arguments that only some models pass to an attention, and that change
# its result.
NAME = "ktrt_latent"
_UNUSUAL = ("s_aux", "softcap", "sliding_window", "position_bias", "cache")


def use_latents(model: nn.Module, engine: Engine, patches: Patches) -> int:
    """Gives every latent attention of ``model`` a decode step on its latents; returns how many.

    Call it after ``linear.accelerate``: it takes only layers whose kv_b_proj runs in the engine and
    whose ``expand_kv`` computes what is undone here. Others stay as they are.
    """
    config: Any = model.config
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return 0
    found = [module for module in model.modules() if _is_latent(module)]
    for module in found:
        latent = LatentDecoder(module, engine)
        patches.set(module, "kt_latent", latent)
        patches.set(module, "expand_kv", latent.keep)
    if found:
        _register(patches)
        patches.set(config, "_attn_implementation", NAME)
    return len(found)


def _register(patches: Patches) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    patches.entry(AttentionInterface._global_mapping, NAME, attention)
    patches.entry(AttentionMaskInterface._global_mapping, NAME, sdpa_mask)


def _is_latent(module: Any) -> bool:
    """Whether the module's ``expand_kv`` is kv_b_proj, halves split by head, positions appended."""
    forward = getattr(getattr(module, "kv_b_proj", None), "forward", None)
    if not isinstance(forward, DenseForward) or not hasattr(module, "expand_kv"):
        return False
    heads, nope, width = module.num_heads, module.qk_nope_head_dim, module.v_head_dim
    if forward.base.weight.shape[0] != heads * (nope + width) or forward.base.bias is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        latents, positions = (
            torch.randn(1, 1, 2, size, generator=generator).to(torch.bfloat16)
            for size in (forward.base.in_features, module.qk_rope_head_dim)
        )
        key, value = module.expand_kv(latents, positions)
        both = module.kv_b_proj(latents)[0].view(2, heads, nope + width).transpose(0, 1)
        expected = torch.cat([both[..., :nope], positions[0].expand(heads, -1, -1)], -1)
        return torch.equal(key[0], expected) and torch.equal(value[0], both[..., nope:])


class LatentDecoder:
    """One layer's kv_b_proj [heads · (nope + v), kv_lora_rank] as its halves."""

    def __init__(self, module: Any, engine: Engine) -> None:
        forward: DenseForward = module.kv_b_proj.forward
        self.expand_kv = module.expand_kv
        self._module = module
        self.heads = int(module.num_heads)
        self.nope, self.value = int(module.qk_nope_head_dim), int(module.v_head_dim)
        self.rank = forward.base.in_features
        weight = forward.base.weight.detach().view(self.heads, -1, self.rank)
        self._address = forward.base.weight.data_ptr()
        # U of every head, transposed: each of the products below is then one of rows of a weight.
        self._keys = weight[:, : self.nope].transpose(1, 2).reshape(-1, self.nope).contiguous()
        self._values = weight[:, self.nope :].reshape(-1, self.rank).contiguous()
        self._engine, self._steps = engine, dict[float, _Step]()

    @property
    def _projection(self) -> DenseForward | None:
        """The present one: adapters that are loaded later put PEFT's layer in its place."""
        forward = self._module.kv_b_proj.__dict__.get("forward")
        return forward if isinstance(forward, DenseForward) else None

    def keep(
        self, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands in for ``expand_kv``: ``attention`` expands them, if it has to."""
        return latents, positions

    def takes(self, query: torch.Tensor, mask: torch.Tensor | None, options: Any) -> bool:
        projection = self._projection
        if projection is not None:
            projection.follow()
        return (
            query.shape[0] == 1
            and query.shape[2] == 1
            and mask is None
            and query.dtype == torch.bfloat16
            and projection is not None
            and self._holds(projection)
            and projection.usual
            and not torch.is_grad_enabled()
            and not any(options.get(name) is not None for name in _UNUSUAL)
        )

    def decode(
        self, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """query [1, heads, 1, nope + rope], latents [1, 1, L, rank], positions [1, 1, L, rope];
        returns [1, 1, heads, v]."""
        out = query.new_empty(1, 1, self.heads, self.value)
        self.bind(query.view(self.heads, -1), latents[0, 0], positions[0, 0], out[0, 0], scaling)(
            latents.shape[2]
        )
        return out

    def record(
        self,
        recorder: Recorder,
        length: Callable[[], int],
        query: torch.Tensor,
        latents: torch.Tensor,
        positions: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """``decode`` over as many tokens as ``length`` says whenever the step runs."""

        def bind(out: torch.Tensor) -> Callable[[], None]:
            step = self.bind(
                query.view(self.heads, -1), latents[0, 0], positions[0, 0], out[0, 0], scaling
            )
            return lambda: step(length())

        shape = 1, 1, self.heads, self.value
        return recorder.call(shape, (query, latents, positions), bind)

    def bind(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        scaling: float,
    ) -> Callable[[int], None]:
        """A function of ``length``, which fills ``out`` [heads, v], contiguous, with the attention
        of ``query`` [heads, nope + rope] over the first ``length`` of latents [capacity, rank] and
        positions [capacity, rope], all bfloat16, as they are when it is called.

        The tensors are kept, and must stay where they are; kv_b_proj's LoRA is that of the call,
        which raises ``RuntimeError`` where ``takes`` would say no. ``ValueError``: shapes, dtypes,
        layouts.
        """
        if out.shape != (self.heads, self.value) or not out.is_contiguous():
            raise ValueError(
                f"out is {[*out.shape]}, expected [{self.heads}, {self.value}], contiguous"
            )
        step = self._step(scaling, query.shape[1] - self.nope)
        first, last = head_array(query[:, None]), head_array(out[:, None])
        cached = head_array(latents[None]), head_array(positions[None])
        tensors = query, latents, positions, out

        def attend(length: int, _kept: object = tensors) -> None:
            step.follow(self._lora())
            step.attention.forward(first, *cached, last, length)

        return attend

    def _lora(self) -> Lora | None:
        projection = self._projection
        if projection is not None:
            projection.follow()
        if projection is None or not projection.usual or not self._holds(projection):
            raise RuntimeError(
                "kv_b_proj has other weights, or an adapter that the engine does not compute: this "
                "step was made for what it had before"
            )
        return projection.lora

    def _holds(self, projection: DenseForward) -> bool:
        return projection.base.weight.data_ptr() == self._address

    def _step(self, scaling: float, rope: int) -> _Step:
        if scaling not in self._steps:
            self._steps[scaling] = _Step(
                LatentAttention(
                    self._engine, self._keys, self._values, heads=self.heads, rope=rope,
                    scaling=scaling,
                )
            )  # fmt: skip
        return self._steps[scaling]


class _Step:
    """The engine's attention, and the LoRA that it has been given."""

    def __init__(self, attention: LatentAttention) -> None:
        self.attention = attention
        self._lora: Lora | None = None

    def follow(self, lora: Lora | None) -> None:
        if lora is not self._lora:
            give_lora(self.attention, lora)
            self._lora = lora


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: latents as ``LatentDecoder.keep`` left them, or keys and
    values as in ``sdpa``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    latent: LatentDecoder | None = getattr(module, "kt_latent", None)
    if latent is not None:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        recorder = active()
        if recorder is None and latent.takes(query, attention_mask, options):
            return latent.decode(query, key, value, factor), None
        length = None if recorder is None else recorder.length_behind(attention_mask)
        if recorder is not None and length is not None and latent.takes(query, None, options):
            return latent.record(recorder, length, query, key, value, factor), None
        key, value = latent.expand_kv(key, value)
    width = value.shape[-1]
    pad = key.shape[-1] - width if query.shape[2] > 1 else 0
    if pad > 0:
        value = nn.functional.pad(value, (0, pad))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=factor, **options
    )
    return (out[..., :width] if pad > 0 else out), None
