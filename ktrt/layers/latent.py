"""Multi-head latent attention: latents stay as they are until attention has to expand them.

transformers keeps latents c [1, 1, L, kv_lora_rank] in the KV cache, and expands them by kv_b_proj
into keys and values of all heads in every step: work that grows with the conversation. For one
query, q · (U c) = (q U) · c and Σ p (V c) = V (Σ p c): U and V, the halves of kv_b_proj, are read
once, and the latents are used as they are, in the engine: on the CPU, in bfloat16. Everything else
is expanded, by the module's own function: longer inputs as before, and in a forward of many
sequences (``engine.step_rows``) each one's own positions. On the CPU, values are padded to the
keys' width: torch computes attention of different widths in float32, with copies.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine import LatentAttention
from ktrt.engine.recording import active
from ktrt.engine.step_rows import RunningStep, StepRows
from ktrt.layers.attention import NAME as PLAIN
from ktrt.layers.attention import attention as plain_attention
from ktrt.layers.attention_calls import why_other
from ktrt.layers.engine_attention import head_array, slot_array, slot_rows
from ktrt.layers.forward import DenseForward, LoraForward
from ktrt.layers.step_attention import attend, places

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder
    from ktrt.utils.patches import Patches

# Its name in transformers, and arguments of some models that change an attention's result.
NAME = "ktrt_latent"
_UNUSUAL = ("s_aux", "softcap", "sliding_window", "position_bias", "cache")


def use_latents(
    model: nn.Module, engine: Engine, patches: Patches, running: RunningStep | None = None
) -> int:
    """Leaves the latents of every latent attention of ``model`` unexpanded up to its attention
    function, on any device; returns how many layers decode on them in the engine.

    Call it after ``accelerate_attention`` and, on the CPU, ``linear.accelerate``: the engine takes
    only layers whose kv_b_proj it computes and whose ``expand_kv`` does what is undone here.
    """
    config: Any = model.config
    if getattr(config, "_attn_implementation", None) not in ("sdpa", PLAIN):
        return 0
    running = RunningStep() if running is None else running
    found: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    if any(why_other(kind) is not None for kind in {type(module) for module in found}):
        return 0  # an indexer, which under another name than sdpa's leaves its choice to others
    decoders = 0
    for module in found:
        decoder = LatentDecoder(module, engine) if _is_plain(module) else None
        latents = Latents(module.expand_kv, decoder, running)
        for name in ("kt_latent", "expand_kv"):
            patches.set(module, name, latents)
        decoders += decoder is not None
    if found:
        _register(patches)
        patches.set(config, "_attn_implementation", NAME)
    return decoders


def _register(patches: Patches) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    patches.entry(AttentionInterface._global_mapping, NAME, attention)
    patches.entry(AttentionMaskInterface._global_mapping, NAME, sdpa_mask)


def _is_plain(module: Any) -> bool:
    """Whether the module's ``expand_kv`` is kv_b_proj, halves split by head, positions appended,
    and the engine computes kv_b_proj."""
    forward = getattr(getattr(module, "kv_b_proj", None), "forward", None)
    if not isinstance(forward, DenseForward):
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


class Latents:
    """Stands in for the ``expand_kv`` of one layer; ``attention`` expands latents, if it has to."""

    def __init__(
        self,
        expand_kv: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        decoder: LatentDecoder | None,
        running: RunningStep,
    ) -> None:
        self.decoder, self.running, self._expand = decoder, running, expand_kv

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
        tokens = StepRows(latents.shape[2], 0, latents.device)
        tokens.adapters.fill_(adapter)
        if tokens.device_adapters is not None:
            tokens.device_adapters.fill_(adapter)
        with self.running.running(tokens):
            return self._expand(latents, positions)


class LatentDecoder:
    """One layer's kv_b_proj [heads · (nope + v), kv_lora_rank] as its halves."""

    def __init__(self, module: Any, engine: Engine) -> None:
        forward: DenseForward = module.kv_b_proj.forward
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

    def takes(self, query: torch.Tensor, mask: torch.Tensor | None, options: Any) -> bool:
        """Whether this is one token's query, over all latents and of the present kv_b_proj."""
        return (
            query.shape[0] == 1
            and query.shape[2] == 1
            and mask is None
            and self.takes_rows(query)
            and not any(options.get(name) is not None for name in _UNUSUAL)
        )

    def takes_rows(self, query: torch.Tensor) -> bool:
        """Whether the engine computes queries of this kind."""
        projection = self._projection
        if projection is not None:
            projection.follow()
        return (
            query.dtype == torch.bfloat16
            and query.stride(-1) == 1
            and projection is not None
            and self._holds(projection)
            and projection.usual
            and not torch.is_grad_enabled()
        )

    def decode(
        self, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """query [1, heads, 1, nope + rope], latents [1, 1, L, rank], positions [1, 1, L, rope];
        returns [1, 1, heads, v]."""
        out = query.new_empty(1, 1, self.heads, self.value)
        places = latents[0, 0], positions[0, 0], out[0, 0]
        self.bind(query.view(self.heads, -1), *places, scaling)(latents.shape[2])
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

        def attend(length: int, _kept: object = (query, latents, positions, out)) -> None:
            step.follow(self._present())
            step.attention.forward(first, *cached, last, length)

        return attend

    def bind_rows(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        rows: StepRows,
        scaling: float,
    ) -> Callable[[], None]:
        """A function that fills ``out`` with the attention of ``rows``' decode rows, each over the
        first positions of its slot and with its own adapter, as ``rows`` and the arrays say when it
        is called.

        query [heads, rows, nope + rope], latents [slots, 1, capacity, rank], positions [slots, 1,
        capacity, rope], out [rows, heads, v]; the rest is as in ``bind``.
        """
        step = self._step(scaling, query.shape[2] - self.nope)
        arrays = head_array(query), slot_array(latents), slot_array(positions)
        last, sequences = head_array(out.transpose(0, 1)), slot_rows(rows, latents)
        active_set, forward = self._present().active_set, step.attention.forward_rows
        seen, ids = -1, 0

        def attend(_kept: object = (query, latents, positions, out, rows)) -> None:
            nonlocal seen, ids
            if seen != active_set.changes:
                projection = self._present()
                step.follow(projection)
                # Without adapters of kv_b_proj, none has a number there.
                ids = rows.adapters.data_ptr() if isinstance(projection, LoraForward) else 0
                seen = active_set.changes
            forward(*arrays, last, sequences, ids)

        return attend

    def _present(self) -> DenseForward:
        projection = self._projection
        if projection is not None:
            projection.follow()
        if projection is None or not projection.usual or not self._holds(projection):
            raise RuntimeError(
                "kv_b_proj has other weights, or an adapter that the engine does not compute: this "
                "step was made for what it had before"
            )
        return projection

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
    """The engine's attention, which has kv_b_proj's adapters."""

    def __init__(self, attention: LatentAttention) -> None:
        self.attention = attention
        self._projection: DenseForward | None = None

    def follow(self, projection: DenseForward) -> None:
        if projection is not self._projection:
            if isinstance(projection, LoraForward):
                projection.loras.add(self.attention)
            self._projection = projection


class HeldLatents:
    """Latents and positions of all slots, for ``step_attention``."""

    def __init__(
        self, owner: Latents, latents: torch.Tensor, positions: torch.Tensor, value_size: int,
        scaling: float,
    ) -> None:  # fmt: skip
        self._owner, self._scaling, self.value_size = owner, scaling, value_size
        self._latents, self._positions = latents, positions

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


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: latents as ``Latents`` left them, or keys and values
    as in ``sdpa``."""
    latents = getattr(module, "kt_latent", None)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(latents, Latents):
        if (rows := places(latents.running)) is not None:
            held = HeldLatents(latents, key, value, int(module.v_head_dim), factor)
            return attend(rows, query, held, factor, options), None
        found = _decode(latents, query, key, value, attention_mask, factor, options)
        if found is not None:
            return found, None
        key, value = latents.expand(key, value)
    width = value.shape[-1]
    on_cpu = query.device.type == "cpu"
    pad = key.shape[-1] - width if on_cpu and query.shape[2] > 1 else 0
    if pad > 0:
        value = nn.functional.pad(value, (0, pad))
    out, _ = plain_attention(module, query, key, value, attention_mask, scaling=factor, **options)
    return (out[..., :width] if pad > 0 else out), None


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
