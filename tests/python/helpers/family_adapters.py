"""Writes adapters with LoRA on routed experts only, for any family, in PEFT's layouts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from helpers.tiny_models import write_adapter
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from helpers.rounded_experts import Lora, Projection

RANK = 4
# Names of one expert's matrices on disk.
_PROJECTIONS: dict[str, Projection] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down", "fc1": "gate", "fc3": "up", "fc2": "down",
}  # fmt: skip
_SINGLE = re.compile(r"(?P<module>.*experts\.(?P<expert>\d+)\.(?P<leaf>\w+))\.weight")


def single_expert_modules(folder: Path) -> dict[str, tuple[int, int, Projection]]:
    """Returns module name on disk → (layer, expert, projection) of single routed experts."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                match = _SINGLE.fullmatch(name)
                if match and match["leaf"] in _PROJECTIONS:
                    layer = re.findall(r"\.(\d+)\.", f".{match['module']}")[0]
                    found[match["module"]] = (
                        int(layer), int(match["expert"]), _PROJECTIONS[match["leaf"]],
                    )  # fmt: skip
    return found


def layer_of(path: str) -> int:
    """Returns the layer of an experts module."""
    return int(re.findall(r"\.(\d+)\.", path)[-1])


def write_per_expert(folder: Path, model: Path, loras: dict[str, Lora]) -> Path:
    """Writes layout a: each expert's projections by their names on disk."""
    by_layer = {layer_of(path): lora for path, lora in loras.items()}
    tensors: dict[str, torch.Tensor] = {}
    modules = single_expert_modules(model)
    for module, (layer, expert, projection) in modules.items():
        a, b = by_layer[layer][projection]
        tensors[f"base_model.model.{module}.lora_A.weight"] = a[expert].contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b[expert].contiguous()
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    targets = rf".*experts\.\d+\.({'|'.join(leaves)})"
    return write_adapter(folder, tensors, _config(target_modules=targets))


def write_stacked(folder: Path, experts: dict[str, Any], loras: dict[str, Lora]) -> Path:
    """Writes layout b, ``target_parameters``: gate and up share A, B's columns are rank-major."""
    tensors: dict[str, torch.Tensor] = {}
    targets = []
    for path, lora in loras.items():
        module = experts[path]
        pairs = {"": lora["down"], ".base_layer": _first(module, lora)}
        for infix, (a, b) in pairs.items():
            name = f"base_model.model.{path}{infix}"
            tensors[f"{name}.lora_A.weight"] = a.reshape(-1, a.shape[-1]).contiguous()
            stacked = b.permute(1, 2, 0).reshape(b.shape[1], -1)
            tensors[f"{name}.lora_B.weight"] = stacked.contiguous()
        targets += [f"{path}.{'gate_up_proj' if module.has_gate else 'up_proj'}"]
        targets += [f"{path}.down_proj"]
    return write_adapter(folder, tensors, _config(target_parameters=targets))


def _first(module: Any, lora: Lora) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if not module.has_gate:
        return lora["up"]
    (a, gate), (_, up) = lora["gate"], lora["up"]
    if module.is_concatenated:
        return a, torch.cat([gate, up], dim=1)
    return a, torch.stack([gate, up], dim=2).flatten(1, 2)


def _config(**targets: Any) -> dict[str, Any]:
    # alpha / r is 1, so ΔW = B · A.
    return {
        "peft_type": "LORA", "peft_version": "0.21.0", "task_type": "CAUSAL_LM", "r": RANK,
        "lora_alpha": RANK, "target_modules": [], **targets,
    }  # fmt: skip
