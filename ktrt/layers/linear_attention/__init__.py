"""Linear attention, state-space layers and short convolutions: their forwards stay transformers',
the functions that they call are replaced.

transformers' references for these functions loop over tokens or chunks in Python and pass several
times over the state. Of one token of a layer of Qwen3-Next (32 heads of 128 × 128) they take 2.4 ms
of a CPU, of a prompt of 4,096 tokens 5.2 s. On the CPU the engine computes them, tokens of a step
and of a prompt alike, so that a token's bits do not depend on how its prompt was cut. On a GPU a
function is one Triton kernel, or flash-linear-attention's for prompts where that is installed.

A layer's own forward gets the functions, by a copy with other globals: other models of the process,
and transformers' modules, stay as they are.
"""

from __future__ import annotations

import inspect
import logging
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from ktrt.layers.linear_attention.families import FAMILIES, PARAMETERS
from ktrt.layers.linear_attention.gated_norm import GatedNormInBlocks, is_gated_norm

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from ktrt.engine import Engine
    from ktrt.layers.linear_attention.functions import Functions
    from ktrt.utils.patches import Patches

logger = logging.getLogger(__name__)


def accelerate_linear_attention(model: nn.Module, engine: Engine, patches: Patches) -> int:
    """Replaces what the layers of the known families call; returns the number of layers. A call
    that a replacement does not take (dtypes, packed sequences, gradients) goes to the original."""
    kinds = {type(module) for module in model.modules()}
    called = {kind: names for kind in kinds if (names := _called(kind))}
    if not called:
        return 0
    # Models without such layers do without their operators.
    from ktrt.layers.linear_attention.functions import Functions
    from ktrt.layers.linear_attention.gpu_step import DeltaRuleStep

    functions = Functions(engine)
    forwards = {kind: _with_functions(kind, called[kind], functions) for kind in called}
    count = 0
    for module in model.modules():
        if type(module) in called and "forward" not in vars(module):
            forward: Any = MethodType(forwards[type(module)], module)
            if _has_gpu_step(module):
                forward = DeltaRuleStep(module, forward)
            patches.set(module, "forward", forward)
            for norm in filter(is_gated_norm, module.children()):
                patches.set(norm, "forward", GatedNormInBlocks(norm.forward))
            count += 1
    if count:
        _log(model, count)
    return count


def _has_gpu_step(module: Any) -> bool:
    from ktrt.layers.linear_attention import gpu_operators, gpu_step

    parameter = next(module.parameters())
    cuda = parameter.device.type == "cuda" and gpu_operators.available()
    return cuda and gpu_step.has_step(module)


def _log(model: Any, count: int) -> None:
    device: torch.device = next(model.parameters()).device
    if device.type != "cuda":
        logger.info("Linear attention and short convolutions of %d layers: the engine", count)
        return
    prompts = "prompts too, which `pip install flash-linear-attention` may make faster"
    if find_spec("fla"):
        prompts = "flash-linear-attention for prompts"
    logger.info(
        "Linear attention and short convolutions of %d layers: Triton kernels for steps, %s", count,
        prompts,
    )  # fmt: skip


def _called(kind: Any) -> tuple[str, ...]:
    """The names of the functions that the forward of a layer's class calls."""
    parts = kind.__module__.split(".")
    names = FAMILIES.get(parts[2], ()) if parts[:2] == ["transformers", "models"] else ()
    if not names or "forward" not in vars(kind):
        return ()
    plain = inspect.unwrap(kind.forward)
    called = tuple(name for name in names if name in plain.__code__.co_names)
    for name in called:
        given = tuple(inspect.signature(inspect.unwrap(plain.__globals__[name])).parameters)
        if given != PARAMETERS[name]:
            logger.warning(
                "%s of transformers' %s takes (%s), expected (%s): it stays as it is, and slow",
                name, parts[2], ", ".join(given), ", ".join(PARAMETERS[name]),
            )  # fmt: skip
            return ()
    return called


def _with_functions(kind: Any, names: tuple[str, ...], functions: Functions) -> Callable[..., Any]:
    """The forward of a layer's class, with other functions under these names."""
    plain = inspect.unwrap(kind.forward)
    replaced = {name: functions.function(name, plain.__globals__[name]) for name in names}
    made = FunctionType(
        plain.__code__, {**plain.__globals__, **replaced}, plain.__name__, plain.__defaults__,
        plain.__closure__,
    )  # fmt: skip
    made.__kwdefaults__ = plain.__kwdefaults__
    return made
