"""Runs kt_kernel's own writer, reader and converter of adapters in a separate process.

Started as a program, this file is that process: kt_kernel has threads and scratch memory that tests
should not inherit.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
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
    command = [sys.executable, __file__, task, str(folder), str(rank), str(alpha), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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


def main(task: str, folder: Path, rank: int, alpha: float, out: Path) -> None:
    from kt_kernel.sft import artifacts
    from kt_kernel.sft.convert_kt_to_sglang_adapter import convert_kt_to_sglang_adapter

    if task == "convert":
        convert_kt_to_sglang_adapter(folder, out, base_model_name_or_path="/somewhere")
        return
    model = SimpleNamespace(
        _kt_wrappers=_wrappers(folder, rank, alpha),
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]))
