"""Layouts of expert LoRA that are recognised but cannot be applied yet, with the reason for each.

Written by KTransformers: fused files with a manifest (c), the 2025 fine-tuning with
``.orig_module`` in its names (d), and whole extra experts (e).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.read import AdapterFiles

_FUSED_FILES = ("fused_expert_lora.safetensors", "kt_adapter_manifest.json")
_EXTRA_EXPERTS_FILE = "lora_experts.safetensors"


def refuse_other_files(folder: Path) -> None:
    """``AdapterError`` for a folder with files of another layout; checked before reading it."""
    for name in _FUSED_FILES:
        if (folder / name).is_file():
            raise AdapterError(
                f"{folder / name}: expert LoRA in KTransformers' fused layout cannot be read yet. "
                "Convert it with kt_kernel.sft.convert_kt_to_sglang_adapter and use the result."
            )
    if (folder / _EXTRA_EXPERTS_FILE).is_file():
        raise AdapterError(
            f"{folder / _EXTRA_EXPERTS_FILE}: extra experts (kt_use_lora_experts) cannot be "
            "applied yet."
        )


def refuse_other_keys(files: AdapterFiles) -> None:
    """``AdapterError`` naming a tensor of another layout."""
    for tensor in files.tensors:
        if "orig_module" in tensor.key.split("."):
            raise AdapterError(
                f"{files.file}: {tensor.key}: names with .orig_module (KTransformers' fine-tuning "
                "of 2025) cannot be read yet."
            )
        if "lora_experts" in tensor.key.split("."):
            raise AdapterError(
                f"{files.file}: {tensor.key}: extra experts (kt_use_lora_experts) cannot be "
                "applied yet."
            )
