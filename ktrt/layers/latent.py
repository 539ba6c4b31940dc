"""Multi-head latent attention: latents stay as they are until attention has to expand them.

transformers keeps latents c [1, 1, L, kv_lora_rank] in the KV cache, and expands them by kv_b_proj
into keys and values of all heads in every step: work that grows with the conversation. For one
query, q · (U c) = (q U) · c and Σ p (V c) = V (Σ p c): U and V, the halves of kv_b_proj, are read
once, and the latents are used as they are: on the CPU in the engine, in bfloat16, and on a GPU as
``gpu.latent`` says. Everything else is expanded, by the module's own function: longer inputs as
before, and in a forward of many sequences (``engine.step_rows``) each one's own positions. On the
CPU, values are padded to the keys' width for torch, which computes attention of different widths in
float32, with copies.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine.recording import active
from ktrt.engine.step_rows import RunningStep, StepRows
from ktrt.layers.attention import NAME as PLAIN
from ktrt.layers.attention import attention as plain_attention
from ktrt.layers.attention import prompts_of
from ktrt.layers.attention_calls import why_other
from ktrt.layers.causal_mask import mask_of_last, mask_or_none
from ktrt.layers.form import form_of
from ktrt.layers.forward import DenseForward
from ktrt.layers.gpu.decode import runs_kernels
from ktrt.layers.gpu.latent import AbsorbedLatents
from ktrt.layers.gpu.prefill import prefill_attention
from ktrt.layers.latent_decoder import LatentDecoder
from ktrt.layers.step_attention import attend, places

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ktrt.engine import Engine
    from ktrt.layers.engine_attention import EngineAttention
    from ktrt.layers.form import AttentionForm
    from ktrt.utils.patches import Patches

# Its name in transformers.
NAME = "ktrt_latent"


def use_latents(
    model: nn.Module, engine: Engine, patches: Patches, running: RunningStep | None = None
) -> int:
    """Leaves the latents of every latent attention of ``model`` unexpanded up to its attention
    function, on any device; returns how many layers decode on them.

    Call it after ``accelerate_attention`` and, on the CPU, ``linear.accelerate``: only layers whose
    ``expand_kv`` does what is undone here decode on latents, and on the CPU only those whose
    kv_b_proj the engine computes.
    """
    config: Any = model.config
    if getattr(config, "_attn_implementation", None) not in ("sdpa", PLAIN):
        return 0
    running = RunningStep() if running is None else running
    found: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    if any(why_other(kind) is not None for kind in {type(module) for module in found}):
        return 0  # an indexer, which under another name than sdpa's leaves its choice to others
    decoding = 0
    for module in found:
        latents = Latents(module.expand_kv, None, running)
        latents.prompts = prompts_of(module)
        device = next(module.parameters()).device.type
        if device == "cuda" and _splits_by_head(module):
            latents.absorbed = AbsorbedLatents(module)
        elif device == "cpu" and _is_the_engines(module) and _splits_by_head(module):
            latents.decoder = LatentDecoder(module, engine)
        for name in ("kt_latent", "expand_kv"):
            patches.set(module, name, latents)
        decoding += latents.decoder is not None or latents.absorbed is not None
    if found:
        _register(patches)
        patches.set(config, "_attn_implementation", NAME)
    return decoding


def _register(patches: Patches) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    patches.entry(AttentionInterface._global_mapping, NAME, attention)
    patches.entry(AttentionMaskInterface._global_mapping, NAME, mask_or_none())


def _is_the_engines(module: Any) -> bool:
    forward = getattr(getattr(module, "kv_b_proj", None), "forward", None)
    return isinstance(forward, DenseForward) and forward.base.bias is None


def _splits_by_head(module: Any) -> bool:
    """Whether the module's ``expand_kv`` is kv_b_proj, halves split by head, positions appended."""
    try:
        heads, nope, width = module.num_heads, module.qk_nope_head_dim, module.v_head_dim
        rank, rope = module.kv_lora_rank, module.qk_rope_head_dim
    except AttributeError:
        return False
    like = next(module.kv_b_proj.parameters(), None)
    dtype = torch.bfloat16 if like is None or not like.is_floating_point() else like.dtype
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        latents, positions = (
            torch.randn(1, 1, 2, size, generator=generator).to(device, dtype)
            for size in (rank, rope)
        )
        both = module.kv_b_proj(latents)[0]
        if both.shape[-1] != heads * (nope + width):
            return False
        key, value = module.expand_kv(latents, positions)
        both = both.view(2, heads, nope + width).transpose(0, 1)
        expected = torch.cat([both[..., :nope], positions[0].expand(heads, -1, -1)], -1)
        return torch.equal(key[0], expected) and torch.equal(value[0], both[..., nope:])


class Latents:
    """Stands in for the ``expand_kv`` of one layer; ``attention`` expands latents, if it has to."""

    def __init__(
        self,
        expand_kv: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        decoder: LatentDecoder | None,
        running: RunningStep,
    ) -> None:
        self.decoder, self.running, self._expand = decoder, running, expand_kv
        # A GPU's.
        self.absorbed: AbsorbedLatents | None = None
        self.prompts: EngineAttention | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied module has no engine, and its step runs elsewhere: it expands for itself."""
        return copy.deepcopy(self._expand, memo)

    def __call__(
        self, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return latents, positions

    def expand(
        self, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values [1, heads, tokens, size] of latents [1, 1, tokens, rank], with
        the adapter of the sequence that the forward is of."""
        rows = self.running.rows
        if rows is None or rows.batch:  # kv_b_proj itself knows a batch's sequences
            return self._expand(latents, positions)
        return self.expand_with(int(rows.adapters[0]), latents, positions)

    def expand_with(
        self, adapter: int | None, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with an adapter by number; None: the active ones."""
        if adapter is None:
            return self._expand(latents, positions)
        # kv_b_proj's tokens are not the step's.
        with self._tokens_of(adapter, latents.shape[2], latents.device):
            return self._expand(latents, positions)

    def last(
        self, adapter: int, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor,
        form: AttentionForm,
    ) -> torch.Tensor:  # fmt: skip
        """``prefill_attention`` of one sequence's latents, with an adapter by number."""
        if self.absorbed is not None:
            with self._tokens_of(adapter, query.shape[2], query.device):
                found = self.absorbed.last(query, latents, positions, form)
            if found is not None:
                return found
        return prefill_attention(query, *self.expand_with(adapter, latents, positions), form)

    def _tokens_of(
        self, adapter: int, count: int, device: torch.device
    ) -> AbstractContextManager[None]:
        tokens = StepRows(count, 0, device)
        tokens.adapters.fill_(adapter)
        if tokens.device_adapters is not None:
            tokens.device_adapters.fill_(adapter)
        return self.running.running(tokens)


class HeldLatents:
    """Latents and positions of all slots, for ``step_attention``."""

    def __init__(
        self, owner: Latents, latents: torch.Tensor, positions: torch.Tensor, value_size: int,
        scaling: float,
    ) -> None:  # fmt: skip
        self._owner, self._scaling, self.value_size = owner, scaling, value_size
        self._latents, self._positions = latents, positions

    @property
    def prompts(self) -> EngineAttention | None:
        return self._owner.prompts

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._latents, self._positions

    def bind(
        self, query: torch.Tensor, rows: StepRows, out: torch.Tensor
    ) -> Callable[[], None] | None:
        decoder = self._owner.decoder
        if decoder is None or not decoder.takes_rows(query):
            return None
        latents, at = self._latents, self._positions
        return decoder.bind_rows(query, latents, at, out, rows, self._scaling)

    def sequence(
        self, slot: int, length: int, adapter: int, room: int, _first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latents, positions = (each[slot : slot + 1, :, :length] for each in self.tensors)
        key, value = self._owner.expand_with(adapter, latents, positions)
        if (more := room - length) > 0:
            key, value = (nn.functional.pad(each, (0, 0, 0, more)) for each in (key, value))
        return key, value

    def last(
        self, query: torch.Tensor, slot: int, length: int, adapter: int, form: AttentionForm
    ) -> torch.Tensor:
        latents, positions = (each[slot : slot + 1, :, :length] for each in self.tensors)
        return self._owner.last(adapter, query, latents, positions, form)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: latents as ``Latents`` left them, or keys and values
    as in ``sdpa``. Without a mask, the queries are the last positions."""
    latents = getattr(module, "kt_latent", None)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(latents, Latents):
        if (rows := places(latents.running)) is not None:
            held = HeldLatents(latents, key, value, int(module.v_head_dim), factor)
            return attend(rows, query, held, factor, options), None
        how = _decode if latents.absorbed is None else _on_gpu
        found = how(latents, query, key, value, attention_mask, factor, options)
        if found is not None:
            return found, None
        key, value = latents.expand(key, value)
    return _expanded(module, query, key, value, attention_mask, factor, options), None


def _expanded(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, scaling: float, options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    width, (tokens, total) = value.shape[-1], (query.shape[2], key.shape[2])
    on_cpu = query.device.type == "cpu"
    if mask is None and not on_cpu and not query.requires_grad:
        if (form := form_of(query, scaling, options)) is not None:
            return prefill_attention(query, key, value, form)
        mask = mask_of_last(tokens, total, query.device)
    # The engine's attention takes values as they are, of one sequence.
    by_torch = prompts_of(module) is None or query.shape[0] > 1
    pad = key.shape[-1] - width if on_cpu and tokens > 1 and by_torch else 0
    if pad > 0:
        value = nn.functional.pad(value, (0, pad))
    found: tuple[torch.Tensor, None] = plain_attention(
        module, query, key, value, mask, scaling=scaling, **options
    )
    return found[0][..., :width] if pad > 0 else found[0]


def _on_gpu(
    latents: Latents, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, scaling: float, options: dict[str, Any],
) -> torch.Tensor | None:  # fmt: skip
    """Computes the last positions of sequences; None: kv_b_proj has to expand their latents."""
    absorbed, lengths = latents.absorbed, latents.running.lengths
    form = form_of(query, scaling, options)
    if absorbed is None or form is None or query.requires_grad:
        return None
    if lengths is None:
        return None if mask is not None else absorbed.last(query, key, value, form)
    factors = absorbed.factors()
    if factors is None:
        return None
    latents.running.attended += runs_kernels(query)
    slots = latents.running.slots
    return absorbed.decode(factors, query, key, value, lengths, form, slots)


def _decode(
    latents: Latents, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, scaling: float, options: dict[str, Any],
) -> torch.Tensor | None:  # fmt: skip
    """Computes one token in the engine; None: it does not take it."""
    decoder, recorder, rows = latents.decoder, active(), latents.running.rows
    if decoder is None or rows is not None:
        return None
    if recorder is None:
        taken = decoder.takes(query, mask, options)
        return decoder.decode(query, key, value, scaling) if taken else None
    length = recorder.length_behind(mask)
    if length is None or not decoder.takes(query, None, options):
        return None
    return decoder.record(recorder, length, query, key, value, scaling)
