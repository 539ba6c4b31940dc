"""transformers' attention interface: one function for every model whose attention ``AttentionForm``
describes, also for those that have no ``sdpa`` (sinks).

A model's configuration names the function, and a mark on a layer says what it is. The function
computes steps of many sequences, which ``engine.step_rows`` describes (``step_attention``), single
tokens (on the CPU in the engine, on a GPU over what the step holds) and, on the CPU, prompts in
blocks. Everything else goes to the function that the model had before, with the mask that it had.
"""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.recording import active
from ktrt.errors import KtrtError
from ktrt.layers.attention_calls import why_other
from ktrt.layers.causal_mask import mask_of_last, mask_or_none
from ktrt.layers.engine_attention import EngineAttention, HeldKeys
from ktrt.layers.form import AttentionForm, form_of
from ktrt.layers.gpu.decode import decode_attention, runs_kernels
from ktrt.layers.gpu.prefill import prefill_attention
from ktrt.layers.one_token import one_token
from ktrt.layers.prompt_attention import attend_blocks
from ktrt.layers.step_attention import attend, places

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ktrt.engine import Engine
    from ktrt.engine.step_rows import RunningStep
    from ktrt.utils.patches import Patches

logger = logging.getLogger(__name__)

# The function's name in transformers.
NAME = "ktrt"
_MARK = "kt_attention"
# On the configuration, which a copied model has too: the name of the function before.
_BEFORE = "kt_attention_before"
_KNOWN = ("sdpa", "eager")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def accelerate_attention(
    model: nn.Module, engine: Engine, patches: Patches, running: RunningStep | None = None
) -> int:
    """Has the layers of ``model`` attend by this module's function while ``patches`` are in effect;
    returns how many there are. The engine must stay open as long. A model with another attention is
    left as it is, which a log line says.
    """
    whole: Any = model.config
    config = whole.get_text_config()
    if config._attn_implementation not in _KNOWN:
        return 0
    layers = [module for module in _text_modules(model, config) if _is_attention(module)]
    reasons = [why for kind in {type(layer): 0 for layer in layers} if (why := why_other(kind))]
    if reasons:
        logger.info("Attention stays transformers' %s: %s", config._attn_implementation, reasons[0])
        return 0
    attention, count = EngineAttention(engine, running), 0
    for module in layers:
        window = _window_of(module, config)
        if window is None:
            logger.info("The attention of layer %s stays transformers'", module.layer_idx)
        else:
            patches.set(module, _MARK, Layer(attention, window))
            count += 1
    if count:
        _register(patches)
        patches.set(config, _BEFORE, config._attn_implementation)
        patches.set(config, "_attn_implementation", NAME)
    return count


def _register(patches: Patches) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    patches.entry(AttentionInterface._global_mapping, NAME, attention)
    patches.entry(AttentionMaskInterface._global_mapping, NAME, mask_or_none())


def _text_modules(model: nn.Module, config: Any) -> list[Any]:
    """The modules whose configuration the name is written into."""
    return [module for module in model.modules() if getattr(module, "config", None) is config]


def _is_attention(module: Any) -> bool:
    return type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")


def _window_of(module: Any, config: Any) -> int | None:
    """Returns the window that the masks of a layer have, 0 for none; None: other masks."""
    each = getattr(config, "per_layer_config", None)
    own = config if each is None else each[module.layer_idx]
    window = getattr(own, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        chunks = getattr(own, "attention_chunk_size", None)
        return window or (0 if chunks is None else None)
    kind = kinds[module.layer_idx]
    return window if kind == _SLIDING else 0 if kind == _FULL else None


def prompts_of(module: Any) -> EngineAttention | None:
    """Returns what computes the prompts of an attention module on the CPU; None: torch."""
    layer: Layer | None = getattr(module, _MARK, None)
    return None if layer is None else layer.engine


@dataclass(frozen=True)
class Layer:
    """The facts of a layer that the function needs."""

    engine: EngineAttention
    window: int

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copied module has no engine, and its step runs elsewhere."""

    def form(
        self, query: torch.Tensor, scaling: float | None, options: dict[str, Any]
    ) -> AttentionForm | None:
        form = form_of(query, scaling, options)
        if form is None or form.window not in (0, self.window):
            return None
        return replace(form, window=self.window)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    """transformers' attention interface."""
    layer: Layer | None = getattr(module, _MARK, None)
    form = None if layer is None else layer.form(query, scaling, options)
    if layer is not None and form is not None:
        running = layer.engine.running
        if (rows := places(running)) is not None:
            held = HeldKeys(layer.engine, key, value, form)
            return attend(rows, query, held, form.scaling, options, form), None
        if (lengths := running.lengths) is not None and query.is_cuda:
            running.attended += runs_kernels(query)
            # The cache's layers with windows are rings: of one lap, position p lies at p.
            ring = key.shape[2] if form.window else 0
            slots = running.slots
            return decode_attention(query, key, value, lengths, form, ring=ring, slots=slots), None
        if not torch.is_grad_enabled():
            where = _on_cpu if query.device.type == "cpu" else _on_gpu
            found = where(layer.engine, query, key, value, attention_mask, form)
            if found is not None:
                return found, None
    return _original(module, query, key, value, attention_mask, scaling, options)


def _on_cpu(
    engine: EngineAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, form: AttentionForm,
) -> torch.Tensor | None:  # fmt: skip
    """[rows, tokens, heads, value size]; None: another mask than a causal one."""
    if query.shape[1] % key.shape[1]:
        return None
    if query.shape[2] == 1:
        return _one_token(engine, query, key, value, mask, form)
    count, end = query.shape[2], key.shape[2]
    causal = count == end if mask is None else _masks.is_causal(mask, form.window)
    if not causal or query.shape[0] != 1 or active() is not None:
        return None
    out = query.new_empty(1, count, query.shape[1], value.shape[-1])
    attend_blocks(query, key, value, form, out, start=end - count, engine=engine)
    return out


def _on_gpu(
    _engine: EngineAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, form: AttentionForm,
) -> torch.Tensor | None:  # fmt: skip
    """The same of a prompt; without a mask, its tokens are the last positions."""
    if query.shape[2] == 1 and mask is not None:
        return None  # a step that may be captured
    if mask is not None and not _masks.is_causal(mask, form.window):
        return None
    return prefill_attention(query, key, value, form)


def _one_token(
    engine: EngineAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, form: AttentionForm,
) -> torch.Tensor | None:  # fmt: skip
    if mask is not None and (mask.ndim != 4 or mask.shape[1:3] != (1, 1)):
        return None
    recorder = active()
    if recorder is None:
        if mask is not None and _masks.is_causal(mask, form.window):
            mask = None
        if engine.takes(query, key, value, mask):
            # A mask says the window too.
            form = form if mask is None else replace(form, window=0)
            return engine(query, key, value, mask, form)
    else:
        length = recorder.length_behind(mask)
        if length is not None and engine.takes(query, key, value, None):
            return engine.record(recorder, length, query, key, value, form)
        # The step's masks of windows say where a ring holds what is seen.
        if form.window and mask is None:
            raise KtrtError("the step cannot be recorded: it has no mask of a window")
    return one_token(query, key, value, mask, form)


class _Masks:
    """Tells causal masks from others; the layers of a forward share them."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[torch.Tensor], int, bool]] = []

    def is_causal(self, mask: torch.Tensor, window: int) -> bool:
        """Whether each of a mask's queries [.., queries, keys], the last ones, sees itself and what
        comes before it, ``window`` positions in all (0: any number), and nothing else."""
        for known, of, answer in self._known:
            if known() is mask and of == window:
                return answer
        answer = _is_causal(mask, window)
        self._known = [(weakref.ref(mask), window, answer), *self._known[:3]]
        return answer


_masks = _Masks()


def _is_causal(mask: torch.Tensor, window: int) -> bool:
    if mask.dtype != torch.bool or mask.ndim != 4:
        return False
    queries, keys = mask.shape[2:]
    at = torch.arange(keys, device=mask.device)
    own = at[keys - queries :, None]
    seen = at <= own
    if window:
        seen &= at > own - window
    return torch.equal(mask, seen.expand_as(mask))


def _original(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, scaling: float | None, options: dict[str, Any],
) -> Any:  # fmt: skip
    """Computes what the model did before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if getattr(getattr(module, "config", None), _BEFORE, _KNOWN[0]) != "eager":
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if mask is None and query.is_cuda:
            mask = mask_of_last(query.shape[2], key.shape[2], query.device)
    else:
        function = sys.modules[type(module).__module__].eager_attention_forward
        mask = _added(mask, query, key)
    if scaling is not None or "scaling" in inspect.signature(function).parameters:
        options = options | {"scaling": scaling}
    return function(module, query, key, value, mask, **options)


def _added(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask of an eager attention, which ``sdpa_mask`` leaves out where it says nothing new."""
    if mask is None:
        mask = mask_of_last(query.shape[2], key.shape[2], query.device)[None, None]
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, least)
