"""Reads an adapter folder: adapter_config.json and the tensors, checked for damage."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ktrt.adapter.layout import put_once
from ktrt.adapter.manifest import check_manifest
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# What KTransformers writes beside them: LoRA of routed experts, and extra experts.
_FURTHER_NAMES = ("fused_expert_lora.safetensors", "lora_experts.safetensors")

_INFIXES = ("original_moe", "orig_module")
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.(?P<leaf>weight|bias))?"
)


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of ``file``.

    ``key`` is its name there; ``module`` the adapted module's name as PEFT saw it; ``part`` is
    ``lora_A``, ``lora_B``, … or the parameter's own name for a weight saved whole.
    """

    key: str
    module: str
    part: str
    value: torch.Tensor
    file: Path

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.key}"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder as read: ``config`` is adapter_config.json; ``file`` holds ``tensors``, but
    for those in KTransformers' files beside it."""

    folder: Path
    file: Path
    config: dict[str, Any]
    tensors: list[AdapterTensor]


def read_adapter(folder: Path) -> AdapterFiles:
    """Raises ``AdapterError`` for a missing or damaged file, for a folder that is not as its
    manifest says, and for NaN or infinite values."""
    config = _read_config(folder / CONFIG_NAME)
    files = [folder / name for name in _FURTHER_NAMES if _is_there(folder / name)]
    file = folder / WEIGHTS_NAME
    if not _is_there(file) and _is_there(folder / PICKLE_NAME):
        file = folder / PICKLE_NAME
    if _is_there(file) or not files:
        files.insert(0, file)
    check_manifest(folder, config, files)
    tensors = [
        parse_key(key, value, file) for file in files for key, value in _read_tensors(file).items()
    ]
    if not tensors:
        raise AdapterError(f"{files[0]} holds no tensors.")
    for tensor in tensors:
        _check_values(tensor)
    _warn_of_zeros(files[0], tensors)
    return AdapterFiles(folder, files[0], config, _without_copies(tensors))


def _is_there(path: Path) -> bool:
    """Also what then cannot be read: a broken link, a directory."""
    return path.is_symlink() or path.exists()


def parse_key(key: str, value: torch.Tensor, file: Path) -> AdapterTensor:
    """Splits a key into module and part. What does not count: PEFT's outer names; the original_moe
    infix that LLaMA-Factory wrote around 2026-01 (layout a'); orig_module, which KTransformers'
    fine-tuning of 2025 put after any name (layout d)."""
    words = key.removeprefix("base_model.model.").split(".")
    name = ".".join(word for word in words if word not in _INFIXES)
    if match := _LORA_KEY.fullmatch(name):
        part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
        return AdapterTensor(key, match["module"], part, value, file)
    module, _, part = name.rpartition(".")
    return AdapterTensor(key, module, part, value, file)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{file} is missing: {file.parent} is not a PEFT adapter folder. "
            "adapter_name_or_path must name the folder that training saved."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds {type(config).__name__}, expected an object.")
    return config


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.name == PICKLE_NAME:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(file)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{file} is missing; expected {WEIGHTS_NAME} or {PICKLE_NAME} beside {CONFIG_NAME}."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise AdapterError(
            f"{file} is damaged or incomplete ({error}; {file.stat().st_size} bytes). Copy it "
            "again from where it was trained."
        ) from error
    except Exception as error:
        # pickle.UnpicklingError and whatever else a hostile or foreign pickle raises.
        raise AdapterError(f"{file} is not a plain file of tensors ({error}).") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise AdapterError(f"{file} does not hold a dictionary of tensors.")
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise AdapterError(f"{file}: {key} is no plain dense tensor ({value.layout}).")
    # torch computes hardly anything with floats of one byte.
    return {
        key: value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value
        for key, value in tensors.items()
    }


def _check_values(tensor: AdapterTensor) -> None:
    value = tensor.value
    if not value.is_floating_point():
        raise AdapterError(f"{tensor.where} has dtype {value.dtype}, expected floats.")
    # NaN and infinity show at the ends, which are found faster.
    if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
        bad = value.numel() - int(torch.isfinite(value).sum())
        raise AdapterError(
            f"{tensor.where} holds {bad} NaN or infinite values of {value.numel()}. The "
            "training diverged or the file is damaged; this adapter cannot be used."
        )


def _is_second(tensor: AdapterTensor) -> bool:
    fused = re.fullmatch(r"(gate|up|down)_lora_b", tensor.part)
    return tensor.part == "lora_B" or fused is not None


def _warn_of_zeros(file: Path, tensors: list[AdapterTensor]) -> None:
    """LoRA starts with B = 0: where it still is, training never reached it."""
    second = [tensor for tensor in tensors if _is_second(tensor)]
    zero = [tensor.key for tensor in second if not tensor.value.any()]
    if zero:
        logger.warning(
            "%s: %d of %d lora_B tensors are all zero (first %s): this adapter changes nothing "
            "there", file, len(zero), len(second), zero[0],
        )  # fmt: skip


def _without_copies(tensors: list[AdapterTensor]) -> list[AdapterTensor]:
    """Refuses two tensors for one place; equal copies under two names are one tensor."""
    places: dict[tuple[str, str], AdapterTensor] = {}
    for tensor in tensors:
        put_once(places, (tensor.module, tensor.part), tensor)
    return list(places.values())
