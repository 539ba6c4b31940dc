"""Verifies LoRA outside the routed experts: one torch module against y = Wx + s·B(Ax)."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktrt.reference import CannotVerifyError
from ktrt.reference.experts import to_bf16
from ktrt.verify_probes import Check, Limits, Outputs, Probe, compare

if TYPE_CHECKING:
    from torch import nn

    from ktrt.reference import Lora, RawCheckpoint
    from ktrt.reference.tensors import Float32

# The module's own parameters, rounded to the compute dtype when they were loaded, in float32. A
# router's weight is rounded with its LoRA in it.
_LIMITS = Limits(same=0.01, difference=0.03, noise=0.00001, float32=0.01)
_ROUTER = Limits(same=0.01, difference=0.03, noise=0.0005, float32=0.01)
_TOKENS = 16
# The MLP block's name differs between files and transformers' modules.
_BLOCK = re.compile(r"(?<=\.)(mlp|block_sparse_moe|feed_forward)(?=\.)")


def check_linear(model: nn.Module, name: str, base: RawCheckpoint, lora: Lora, seed: int) -> Check:
    """``name``: the module's for PEFT. ``CannotVerifyError`` if it is not found exactly once."""
    module = _find(model, name)
    weight = base.read(base.weight_of(name))
    if lora.a.shape != (lora.a.shape[0], weight.shape[1]) or lora.b.shape[0] != weight.shape[0]:
        raise CannotVerifyError(f"{name}: LoRA {lora.a.shape}, {lora.b.shape} on {weight.shape}.")
    rng = np.random.default_rng(seed)
    states = [rng.standard_normal((_TOKENS, weight.shape[1]), np.float32)]
    if lora.a.any():
        along = rng.standard_normal((_TOKENS, len(lora.a)), np.float32) @ lora.a
        length = np.float32(weight.shape[1] ** 0.5) / np.linalg.norm(along, axis=1)
        states.append(along * length[:, None])
    x = np.concatenate(states)
    y = x @ weight.T
    delta = x @ lora.a.T @ (np.float32(lora.scaling) * lora.b).T
    is_router = not isinstance(module, torch.nn.Linear) and not hasattr(module, "base_layer")
    if is_router and module.weight.dtype == torch.bfloat16:
        merged = weight + np.float32(lora.scaling) * (lora.b @ lora.a)
        delta = x @ to_bf16(merged).T - y
    found = _router_outputs(module, x) if is_router else _outputs(module, x)
    groups = {"": slice(0, _TOKENS)}
    if len(states) > 1:
        groups["input read by A"] = slice(_TOKENS, None)
    ones = np.ones((len(x), 1), np.float32)
    probe = Probe(x, ones.astype(np.int64), ones, groups)
    wanted = Outputs((y, y + delta), (y, y + delta))
    return compare(
        re.sub(r"^.*layers\.\d+\.", "", name),
        probe,
        wanted,
        found,
        _ROUTER if is_router else _LIMITS,
    )


def _find(model: nn.Module, name: str) -> Any:
    """The module of the loaded model that has this name, whatever stands before ``layers``."""
    tail = re.sub(r"^.*?(?=layers\.\d+\.)", "", name)
    block = "(?:mlp|block_sparse_moe|feed_forward)"
    pattern = _BLOCK.sub(block, re.escape(tail).replace(r"\.", "."))
    found = [m for n, m in model.named_modules() if re.fullmatch(rf"(?:.*\.)?{pattern}", n)]
    if len(found) != 1:
        raise CannotVerifyError(
            f"{name}: the loaded model has {len(found)} modules of this name; cannot verify it."
        )
    return found[0]


def _outputs(module: Any, x: Float32) -> tuple[Float32, Float32]:
    """Base and tuned, by the module's own parameters in float32."""
    module = copy.deepcopy(module).float().cpu()
    with torch.no_grad():
        states = torch.from_numpy(x)
        return getattr(module, "base_layer", module)(states).numpy(), module(states).numpy()


def _router_outputs(module: Any, x: Float32) -> tuple[Float32, Float32]:
    """The same where LoRA changes a bare weight."""
    tuned = module.weight
    parametrizations = getattr(module, "parametrizations", None)
    base = tuned if parametrizations is None else parametrizations.weight.original
    with torch.no_grad():
        weights = [weight.float().cpu().numpy() for weight in (base, tuned)]
    return x @ weights[0].T, x @ weights[1].T
