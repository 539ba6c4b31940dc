"""Verifies LoRA outside the routed experts: one torch module against y = Wx + s·B(Ax)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktrt.audit.reference import CannotVerifyError
from ktrt.audit.reference.experts import int8_rows, to_bf16
from ktrt.audit.verify.probes import (
    Check,
    Limits,
    Outputs,
    Probe,
    compare,
)

if TYPE_CHECKING:
    from torch import nn

    from ktrt.audit.reference import Lora, RawCheckpoint
    from ktrt.audit.reference.tensors import Float32

# For the module's parameters, computed in float32: loading rounded them to the compute dtype, a
# router's weight after its LoRA was merged.
_PARAMETERS = Limits(same=0.01, difference=0.03, noise=0.00001, float32=0.01)
_ROUTER = Limits(same=0.01, difference=0.03, noise=0.0005, float32=0.01)
# For the module's own computation, in its dtype.
_RUN = Limits(same=0.02, difference=0.03, noise=0.01, float32=0.02)
# The same for a layer in INT8, against NumPy with the format's roundings.
_RUN_INT8 = Limits(same=0.02, difference=0.03, noise=0.01, float32=0.1)
_TOKENS = 16
# The MLP block's name differs between files and transformers' modules.
_BLOCK = re.compile(r"(?<=\.)(mlp|block_sparse_moe|feed_forward)(?=\.)")


def check_linear(model: nn.Module, name: str, base: RawCheckpoint, lora: Lora, seed: int) -> Check:
    """Checks a module by its name for PEFT. Raises ``CannotVerifyError`` unless it exists exactly
    once.

    Judges the parameters in float32, which shows the smallest adapter, and then the outputs of the
    module's current forward.
    """
    module = _find(model, name)
    weight, bias = base.linear(name)
    if lora.a.shape != (lora.a.shape[0], weight.shape[1]) or lora.b.shape[0] != weight.shape[0]:
        raise CannotVerifyError(f"{name}: LoRA {lora.a.shape}, {lora.b.shape} on {weight.shape}.")
    probe = _probe(lora, weight.shape[1], seed)
    x = probe.states
    y = x @ weight.T + bias
    delta = x @ lora.a.T @ (np.float32(lora.scaling) * lora.b).T
    is_router = not isinstance(module, torch.nn.Linear) and not hasattr(module, "base_layer")
    if is_router and module.weight.dtype == torch.bfloat16:
        merged = weight + np.float32(lora.scaling) * (lora.b @ lora.a)
        delta = x @ to_bf16(merged).T + bias - y
    wanted = Outputs((y, y + delta), (y, y + delta))
    short = re.sub(r"^.*layers\.\d+\.", "", name)
    if is_router:
        return compare(short, probe, wanted, _router_outputs(module, x), _ROUTER)
    check = compare(short, probe, wanted, _by_parameters(module, x), _PARAMETERS)
    # With adapters switched off, a replaced forward need not run at all.
    limits = _RUN
    if getattr(module.__dict__.get("forward"), "weight_format", "bf16") == "int8":
        y = int8_rows(x) @ int8_rows(to_bf16(weight)).T + bias
        wanted, limits = Outputs(wanted.exact, (y, y + delta)), _RUN_INT8
    run = compare(short, probe, wanted, (y, _run(module, x)), limits, may_be_small=True)
    check.tuned = run.tuned
    check.failures += [f"{text}, as it runs" for text in run.failures]
    return check


def _probe(lora: Lora, size_in: int, seed: int) -> Probe:
    """Returns random states, and random states in the row space of A."""
    rng = np.random.default_rng(seed)
    states = [rng.standard_normal((_TOKENS, size_in), np.float32)]
    groups = {"": slice(0, _TOKENS)}
    if lora.a.any():
        along = rng.standard_normal((_TOKENS, len(lora.a)), np.float32) @ lora.a
        length = np.float32(size_in**0.5) / np.linalg.norm(along, axis=1)
        states.append(along * length[:, None])
        groups["input read by A"] = slice(_TOKENS, None)
    x = to_bf16(np.concatenate(states))
    ones = np.ones((len(x), 1), np.float32)
    return Probe(x, ones.astype(np.int64), ones, groups)


def _find(model: nn.Module, name: str) -> Any:
    """Returns the loaded model's module of this name, or of this name with any prefix of
    ``layers``. Exact names come first: a tower's layers may have names with the same end."""
    if (exact := dict(model.named_modules()).get(name)) is not None:
        return exact
    tail = re.sub(r"^.*?(?=layers\.\d+\.)", "", name)
    block = "(?:mlp|block_sparse_moe|feed_forward)"
    pattern = _BLOCK.sub(block, re.escape(tail).replace(r"\.", "."))
    found = [m for n, m in model.named_modules() if re.fullmatch(rf"(?:.*\.)?{pattern}", n)]
    if len(found) != 1:
        raise CannotVerifyError(
            f"{name}: the loaded model has {len(found)} modules of this name; cannot verify it."
        )
    return found[0]


def _by_parameters(module: Any, x: Float32) -> tuple[Float32, Float32]:
    """Returns base and tuned outputs, from the module's parameters in float32."""
    linear = getattr(module, "base_layer", module)
    base = x @ _numbers(linear.weight).T
    if linear.bias is not None:
        base = base + _numbers(linear.bias)
    tuned = base.copy()
    active = [] if getattr(module, "disable_adapters", True) else module.active_adapters
    for adapter in active:
        if adapter in module.lora_A:
            a, b = (_numbers(half[adapter].weight) for half in (module.lora_A, module.lora_B))
            tuned += np.float32(module.scaling[adapter]) * (x @ a.T @ b.T)
    return base, tuned


def _numbers(parameter: torch.Tensor) -> Float32:
    values: Float32 = parameter.detach().float().cpu().numpy()
    return values


def _run(module: Any, x: Float32) -> Float32:
    weight = getattr(module, "base_layer", module).weight
    with torch.no_grad():
        return _numbers(module(torch.from_numpy(x).to(weight.device, weight.dtype)))


def _router_outputs(module: Any, x: Float32) -> tuple[Float32, Float32]:
    """Returns base and tuned outputs of a bare weight with LoRA."""
    tuned = module.weight
    parametrizations = getattr(module, "parametrizations", None)
    base = tuned if parametrizations is None else parametrizations.weight.original
    return x @ _numbers(base).T, x @ _numbers(tuned).T
