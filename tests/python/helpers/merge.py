"""Merges an adapter into a checkpoint in float32 by the formula W + scaling · B · A.

An independent reference: it reads raw tensors of both files and shares no code with ktrt. Stacked
expert LoRA: A_e = A[e·r:(e+1)·r], B_e = B[:, e::E].
"""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

# The names of one expert's gate, up and down on disk.
_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ROUTED = re.compile(r"\.experts\.\d+\.")


def save_merged(
    folder: Path,
    model: Path,
    adapter: Path | None,
    dtype: torch.dtype = torch.float32,
    *,
    int4_experts: bool = False,
) -> Path:
    """Writes ``model`` with ``adapter`` merged in float32, rounded once to ``dtype``.

    ``int4_experts``: first rounds the base's routed experts to kt_kernel's INT4.
    """
    weights = load_weights(model)
    if int4_experts:
        for name in [name for name in weights if _ROUTED.search(name)]:
            weights[name] = rounded_to_int4(weights[name])
    if adapter is not None:
        merge(weights, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", folder)
    rounded = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors")
    return folder


def rounded_to_int4(w: torch.Tensor) -> torch.Tensor:
    """Rounds each row of w [out, in] to kt_kernel's INT4: first to multiples of max|w| / 112,
    halves to even, then to multiples of max|w| / 7, halves away from zero."""
    scale = (w.abs().amax(1, keepdim=True).double() / 112).float()
    fine = torch.round(w / scale)
    return scale * 16 * torch.sign(fine) * torch.floor(fine.abs() / 16 + 0.5)


def load_weights(model: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint in float32."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights.update({name: w.float() for name, w in load_file(file).items()})
    return weights


def merge(weights: dict[str, torch.Tensor], adapter: Path) -> None:
    """Adds every LoRA of the adapter to its weight. Raises ``KeyError`` if there is no weight."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {k: t.float() for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        module = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
        if module.endswith((".experts", ".experts.base_layer")):
            _merge_stacked(weights, module, a, b, config)
        else:
            weight = weights[f"{module}.weight"]
            weight += _scaling(config, module) * (b @ a)


def _merge_stacked(
    weights: dict[str, torch.Tensor],
    module: str,
    a: torch.Tensor,
    b: torch.Tensor,
    config: dict[str, Any],
) -> None:
    # With a single target, PEFT gives it the unprefixed name.
    targets = [target.rpartition(".")[2] for target in config["target_parameters"]]
    gate_up = module.endswith(".base_layer") or "down_proj" not in targets
    path = module.removesuffix(".base_layer")
    scaling = _scaling(config, f"{path}.{'gate_up_proj' if gate_up else 'down_proj'}")
    names = _expert_names(weights, path)
    count = len(names)
    rank = a.shape[0] // count
    for expert, (gate, up, down) in enumerate(names):
        delta = scaling * b[:, expert::count] @ a[expert * rank : (expert + 1) * rank]
        if gate_up:
            weights[gate] += delta[: delta.shape[0] // 2]
            weights[up] += delta[delta.shape[0] // 2 :]
        else:
            weights[down] += delta


def _expert_names(weights: dict[str, torch.Tensor], path: str) -> list[tuple[str, str, str]]:
    for on_disk in (path, path.replace(".mlp.", ".block_sparse_moe.")):
        for leaves in _LEAVES:
            names: list[tuple[str, str, str]] = []
            while f"{on_disk}.{len(names)}.{leaves[0]}.weight" in weights:
                gate, up, down = (f"{on_disk}.{len(names)}.{leaf}.weight" for leaf in leaves)
                names.append((gate, up, down))
            if names:
                return names
    raise KeyError(path)


def _scaling(config: dict[str, Any], module: str) -> float:
    rank, alpha = config["r"], config["lora_alpha"]
    for pattern, value in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            rank = value
            break
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
