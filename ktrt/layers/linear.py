"""Linear layers on the CPU through the engine: their forward, never their parameters.

For one token, torch's BF16 linear reaches about half of the memory's bandwidth on two cores, and on
processors without BF16 instructions far less; PEFT adds two more linears in float32, with casts.
The engine reads the same weights where they lie, and adds LoRA before the one rounding. BF16 is
therefore the dtype on every processor: its bytes bound decoding, float32 has twice as many.

INT8 (``quantization_bit: 8``) halves them again, in a packed copy. The BF16 parameters remain, but
nothing reads them; if they are mapped from the checkpoint the kernel reclaims their pages.
"""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.recording import active
from ktrt.engine.step_rows import RunningStep
from ktrt.engine.torch_threads import set_torch_threads
from ktrt.errors import CheckpointError
from ktrt.layers.around import Around
from ktrt.layers.coded import CodedLinear
from ktrt.layers.forward import DenseForward, LoraForward, Shared
from ktrt.layers.int8 import is_int8
from ktrt.layers.row_lora import RowLora
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.engine import Engine

logger = logging.getLogger(__name__)

# Tokens in the KV cache up to which a decode step leaves torch one thread.
_SHORT_CONTEXT = 2048
# Tokens of a step of several sequences up to which it leaves torch one thread.
_FEW_TOKENS = 64


def accelerate(
    model: nn.Module,
    engine: Engine,
    active_set: ActiveSet | None = None,
    patches: Patches | None = None,
    *,
    int8: bool = False,
    running: RunningStep | None = None,
) -> int:
    """Runs the ``nn.Linear`` layers of ``model`` whose weights are BF16 on the CPU in the engine,
    and PEFT's LoRA layers on them; returns how many. Modules that ``active_set`` announces later
    are taken at once. The engine must stay open until ``patches`` are undone.

    ``running``: the model's step, whose tokens may have different adapters.

    Parameters, names and ``peft_config`` stay as they are. What the engine does not compute (DoRA,
    LoRA with a bias, dropout while training, gradients, other dtypes, PEFT's adapters by sample)
    takes the ordinary path, call by call. A change of adapters is followed when the version of
    ``active_set`` changes; whoever calls PEFT's methods directly calls ``refresh`` afterwards.

    ``int8``: quantises the layers that ``layers.int8`` names, by their present numbers; LoRA stays
    exact. Gradients and other dtypes go through the parameters in BF16. ``ValueError``: NaN or
    infinity in a weight; of a coded one, ``CheckpointError``.
    """
    running = RunningStep() if running is None else running
    shared = Shared(engine, ActiveSet() if active_set is None else active_set, running)
    patches = Patches() if patches is None else patches
    count = _take(model, shared, patches, int8=int8)
    # At once, not in the next forward: recorded steps run without one.
    patches.add(shared.active_set.on_modules(partial(_take, model, shared, patches, int8=int8)))
    if count:
        _decode_on_one_thread(model, running, patches)
    return count


def _take(model: nn.Module, shared: Shared, patches: Patches, *, int8: bool) -> int:
    """Takes the layers that do not run in the engine yet, and adapters that have come or gone in
    the others; returns how many layers."""
    lora_linear = _peft_linear()
    count = 0
    each: Any
    for path, each in model.named_modules():
        is_lora = type(each) is lora_linear
        base = each.base_layer if is_lora else each
        if is_lora and not _fits(base):
            _take_rows(each, shared, patches)
        if not _fits(base):
            continue
        inner = _forward_of(base)
        if inner is None:
            inner = _dense_forward(path, base, shared, int8=int8 and is_int8(path, base))
            patches.set(base, "forward", inner)
            count += 1
        if is_lora and (forward := _forward_of(each)) is not None:
            forward.load()
        elif is_lora:
            patches.set(each, "forward", LoraForward(each, inner))
    if count:
        logger.debug("%d BF16 linear layers run in the engine", count)
    return count


def _dense_forward(path: str, base: nn.Linear, shared: Shared, *, int8: bool) -> DenseForward:
    try:
        return DenseForward(base, shared, int8=int8)
    except ValueError as error:
        if not isinstance(base, CodedLinear):
            raise
        raise CheckpointError(
            f"{base.origin or path}: {error}. Download or copy the model's files again."
        ) from error


def _take_rows(module: Any, shared: Shared, patches: Patches) -> None:
    """Has a LoRA layer that torch computes follow the rows of a step."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, RowLora):
        forward.load()
    elif module.weight.device.type == "cpu":
        patches.set(module, "forward", RowLora(module, shared))


def _decode_on_one_thread(model: nn.Module, running: RunningStep, patches: Patches) -> None:
    """Gives torch one thread in decode steps: its share of them is so small that waking threads
    takes longer, and they would compete with the engine's. Long conversations have attention to
    share out, except in a step of many sequences, whose attention is the engine's."""
    weights = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.in_features * m.out_features > 1 << 20
    ]
    if _forward_of(model) is not None or any(_forward_of(each) is None for each in weights):
        return

    def is_small(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        step = running.rows
        if step is not None and step.decode:
            return step.tokens <= _FEW_TOKENS
        ids = kwargs.get("input_ids", args[0] if args else None)
        past = kwargs.get("cache", kwargs.get("past_key_values"))
        return ids is not None and ids.numel() == 1 and _length(past) < _SHORT_CONTEXT

    @contextmanager
    def on_one_thread(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        threads = torch.get_num_threads()
        if active() is not None or is_small(args, kwargs):
            set_torch_threads(1)
        try:
            yield
        finally:
            set_torch_threads(threads)

    patches.set(model, "forward", Around(model.forward, on_one_thread))


def _length(cache: Any) -> int:
    """Tokens in a KV cache; of one that cannot tell (hybrids), as many as there could be."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return sys.maxsize


def refresh(model: nn.Module) -> None:
    """Reads the LoRA of all layers again: for callers of PEFT's own methods, and after an adapter's
    numbers were changed in place. ``Adapters.refresh`` is the same for a loaded model, with its KV
    caches and recorded steps.
    """
    for forward in _forwards(model):
        forward.refresh()


def int8_bytes(model: nn.Module) -> dict[int, int]:
    """By the id of its parameter in BF16: bytes of every weight that the engine has in INT8."""
    return {
        id(forward.base.weight): forward.packed_bytes
        for forward in _forwards(model)
        if forward.weight_format == "int8"
    }


def packed_bytes(module: nn.Module) -> int:
    """Returns the bytes that the engine has of this layer's weight; 0 where there is no copy."""
    forward = _forward_of(module)
    return 0 if forward is None else forward.packed_bytes


def lora_bytes(model: nn.Module) -> int:
    """Returns the engine's memory of all resident adapters on linear layers."""
    found = (module.__dict__.get("forward") for module in model.modules())
    return sum(each.loras.bytes_held for each in found if isinstance(each, LoraForward))


def _forwards(model: nn.Module) -> Iterator[DenseForward]:
    for module in model.modules():
        if (forward := _forward_of(module)) is not None:
            yield forward


def _forward_of(module: nn.Module) -> DenseForward | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, DenseForward) else None


def _peft_linear() -> type | None:
    """PEFT's layer around a linear, if PEFT is in use at all (its import takes a while)."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    found: type | None = getattr(layer, "Linear", None)
    return found


def _fits(module: Any) -> bool:
    if isinstance(module, CodedLinear):
        return module.on_cpu
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
        and module.weight.numel() > 0
    )
