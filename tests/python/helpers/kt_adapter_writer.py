"""Runs kt_kernel's own writer, reader and converter of adapters in separate processes.

kt_kernel has threads and scratch memory that neither tests nor other calls should inherit.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers.forks import KT_KERNEL
from safetensors.torch import load_file

EXTRA_INPUT = "extra_input.safetensors"
_NAMES = [f"{projection}_lora_{letter}" for projection in ("gate", "up", "down") for letter in "ab"]


def why_unavailable() -> str | None:
    """Returns the reason why kt_kernel cannot run here; None if it can."""
    if importlib.util.find_spec("kt_kernel") is None:
        return "kt_kernel is not installed (it has wheels for Python 3.11 and 3.12)"
    return None


def run_kt(task: str, folder: Path, rank: int, alpha: float, out: Path | None = None) -> None:
    """Runs a ``task``: "save" rewrites fused_expert_lora.safetensors of ``folder`` (and extra
    experts from ``EXTRA_INPUT``, layers.L.i.{gate,up,down}) with a manifest; "load" checks and
    loads the folder; "convert" writes an adapter for sglang to ``out``.

    Raises ``AssertionError`` with kt_kernel's message if it fails.
    """
    code = "import sys; from helpers.kt_adapter_writer import main; main(*sys.argv[1:])"
    arguments = [task, str(folder), str(rank), str(alpha), str(out)]
    done = KT_KERNEL.run(code, *arguments, errors_too=True)
    assert done.returncode == 0, done.stdout[-2000:]


def _wrappers(folder: Path, rank: int, alpha: float) -> list[Any]:
    """Returns stand-ins for kt_kernel's training layers, with the fields that its writer uses."""
    tensors = load_file(folder / "fused_expert_lora.safetensors")
    layers = sorted({int(key.split(".")[1]) for key in tensors})
    extra = _extra_experts(folder)
    return [
        SimpleNamespace(
            layer_idx=layer,
            _lora_rank=rank,
            _lora_alpha=alpha,
            _fused_expert_lora_params=[
                torch.nn.Parameter(tensors[f"layers.{layer}.experts.{name}"]) for name in _NAMES
            ],
            lora_experts=extra.get(layer),
        )
        for layer in layers
    ]


def _extra_experts(folder: Path) -> dict[int, Any]:
    from kt_kernel.sft.lora import LoRAExperts

    if not (folder / EXTRA_INPUT).is_file():
        return {}
    layers: dict[int, dict[int, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, value in load_file(folder / EXTRA_INPUT).items():
        match = re.fullmatch(r"layers\.(\d+)\.(\d+)\.(gate|up|down)", key)
        assert match is not None
        layers[int(match[1])][int(match[2])][match[3]] = value
    modules = {}
    for layer, mlps in layers.items():
        size, hidden = mlps[0]["gate"].shape
        modules[layer] = LoRAExperts(len(mlps), hidden, size, "cpu", torch.float32)
        for i, mlp in mlps.items():
            for name, value in mlp.items():
                getattr(modules[layer].experts[i], f"le_{name}").weight.data.copy_(value)
    return modules


def main(task: str, path: str, rank: str, alpha: str, out: str) -> None:
    """Runs a task in this process."""
    from kt_kernel.sft import artifacts
    from kt_kernel.sft.convert_kt_to_sglang_adapter import convert_kt_to_sglang_adapter

    folder = Path(path)
    if task == "convert":
        convert_kt_to_sglang_adapter(folder, Path(out), base_model_name_or_path="/somewhere")
        return
    model = SimpleNamespace(
        _kt_wrappers=_wrappers(folder, int(rank), float(alpha)),
        config=SimpleNamespace(_name_or_path="/somewhere/else"),
    )
    if task == "save":
        (folder / "fused_expert_lora.safetensors").unlink()
        (folder / EXTRA_INPUT).unlink(missing_ok=True)
        artifacts.save_kt_adapter_artifacts(model, folder)
        return
    expected = [p.clone() for w in model._kt_wrappers for p in w._fused_expert_lora_params]
    for wrapper in model._kt_wrappers:
        for parameter in wrapper._fused_expert_lora_params:
            parameter.data.zero_()
    assert artifacts.load_kt_adapter_artifacts(model, folder) is not None
    found = [p for w in model._kt_wrappers for p in w._fused_expert_lora_params]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
