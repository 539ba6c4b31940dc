"""Rewrite the adapter that PEFT saved (layout b, stacked experts) per expert (layout a).

Layout b holds, for a layer of E experts with intermediate size I, hidden size H and rank r:
``experts.base_layer.lora_A`` [E·r, H] and ``lora_B`` [2·I, r·E] for gate_up_proj,
``experts.lora_A`` [E·r, I] and ``experts.lora_B`` [H, r·E] for down_proj. A is expert-major (rows
e·r … e·r + r), B is rank-major (columns e, e + E, e + 2·E …), see ``ParamWrapper.get_delta_weight``
in ``peft/tuners/lora/layer.py``. Gate and up share A; the upper I rows of B are gate's, the lower I
rows up's. The result is the same function.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

from .train_adapter import ATTENTION, MLP

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STACKED = re.compile(r"(?P<layer>.*\.mlp\.experts)\.(?P<gate_up>base_layer\.)?lora_A\.weight")


def to_per_expert(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Convert layout b to layout a; tensors outside the routed experts pass unchanged."""
    converted = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for name, stacked_a in tensors.items():
        match = STACKED.fullmatch(name)
        if match is None:
            continue
        stacked_b = tensors[name.replace("lora_A", "lora_B")]
        experts = stacked_a.shape[0] // rank
        for e in range(experts):
            a, b = stacked_a[e * rank : (e + 1) * rank], stacked_b[:, e::experts]
            halves = (
                zip(("gate_proj", "up_proj"), b.chunk(2), strict=True)
                if match["gate_up"]
                else (("down_proj", b),)
            )
            for projection, rows in halves:
                prefix = f"{match['layer']}.{e}.{projection}"
                converted[f"{prefix}.lora_A.weight"] = a.clone()
                converted[f"{prefix}.lora_B.weight"] = rows.contiguous()
    return converted


def convert(source: Path, target: Path) -> None:
    """Write the layout-a twin of the layout-b adapter in ``source`` to ``target``."""
    config = json.loads((source / CONFIG).read_text("utf-8"))
    tensors = to_per_expert(load_file(source / WEIGHTS), config["r"])
    config["target_modules"] = sorted((*ATTENTION, *MLP))
    config["target_parameters"] = None
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _delta(tensors: dict[str, Tensor], module: str, scaling: float) -> Tensor:
    prefix = f"base_model.model.{module}"
    return scaling * (tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"])


def check(base: Path, layout_a: Path, layout_b: Path) -> int:
    """Merge both adapters into the base in float32; return how many weights were compared.

    Layout b is merged by PEFT itself, layout a by W + alpha/r·B·A on the base's per-expert tensors.
    Raises ValueError naming the first weight that differs in any bit.
    """
    config = json.loads((layout_a / CONFIG).read_text("utf-8"))
    tensors = load_file(layout_a / WEIGHTS)
    scaling = config["lora_alpha"] / config["r"]
    core = DeepseekV2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(core, layout_b).merge_and_unload().state_dict()
    compared = 0
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if f"base_model.model.{module}.lora_A.weight" not in tensors:
            continue
        expected = weight.float() + _delta(tensors, module, scaling)
        if not torch.equal(expected, _stacked_slice(merged, module)):
            raise ValueError(
                f"{name}: the merge of {layout_a} differs from PEFT's merge of {layout_b}"
            )
        compared += 1
    if 2 * compared != len(tensors):
        raise ValueError(
            f"{layout_a}: {len(tensors)} tensors, but only {compared} weights of {base} use them"
        )
    return compared


def _stacked_slice(merged: dict[str, Tensor], module: str) -> Tensor:
    """Return the weight of ``module`` (checkpoint name) in a state dict with stacked experts."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)", module)
    if match is None:
        return merged[f"{module}.weight"]
    experts, e, projection = match[1], int(match[2]), match[3]
    if projection == "down_proj":
        return merged[f"{experts}.down_proj"][e]
    return merged[f"{experts}.gate_up_proj"][e].chunk(2)[projection == "up_proj"]
