"""Reads an adapter folder: adapter_config.json and the tensors, checked for damage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ktrt.adapter.files.find import (
    CONFIG_NAME,
    find_weight_files,
    is_pickle,
)
from ktrt.adapter.files.manifest import check_manifest
from ktrt.adapter.files.names import parse_names
from ktrt.adapter.tensors import AdapterFiles, AdapterTensor, Idle, put_once
from ktrt.errors import AdapterError
from ktrt.utils.json_files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.files.find import WeightFiles


def read_adapter(folder: Path) -> AdapterFiles:
    """Reads configuration and tensors.

    Raises ``AdapterError`` for a missing or damaged file, for a folder that contradicts its
    manifest, and for NaN or infinite values.
    """
    config = _read_config(folder / CONFIG_NAME)
    found = find_weight_files(folder)
    manifest = check_manifest(folder, config, found.files)
    read = {file: _read_tensors(file) for file in found.files}
    _check_index(found, read)
    tensors: list[AdapterTensor] = []
    originals: list[AdapterTensor] = []
    for file, values in read.items():
        for key, name in parse_names(file, values).items():
            tensor = AdapterTensor(key, name.module, name.part, values[key], file)
            (originals if name.is_original else tensors).append(tensor)
    tensors, idle = _without_originals(tensors, originals)
    if not tensors:
        raise AdapterError(f"{found.files[0]} holds no tensors.")
    for tensor in tensors:
        _check_values(tensor)
    expert_format = manifest.expert_weight_format if manifest else None
    base = manifest.base if manifest else None
    return AdapterFiles(
        folder, found.files[0], config, _without_copies(tensors), idle, expert_format, base
    )


def _without_originals(
    tensors: list[AdapterTensor], originals: list[AdapterTensor]
) -> tuple[list[AdapterTensor], list[Idle]]:
    """Makes PEFT's copies of untrained modules idle if the trained module is there; otherwise keeps
    their name, which is refused later."""
    trained = {(tensor.module, tensor.part) for tensor in tensors}
    idle = []
    for tensor in originals:
        if (tensor.module, tensor.part) in trained:
            idle.append(Idle(tensor, "the base's own weights, which training replaced"))
        else:
            module = f"{tensor.module}.original_module"
            tensors.append(
                AdapterTensor(tensor.key, module, tensor.part, tensor.value, tensor.file)
            )
    return tensors, idle


def _check_index(found: WeightFiles, read: dict[Path, dict[str, torch.Tensor]]) -> None:
    held = {key: file.name for file, values in read.items() for key in values}
    for key in sorted(set(held) | set(found.index)) if found.index else ():
        if held.get(key) != found.index.get(key):
            raise AdapterError(
                f"{found.files[0].parent}: {key} is in {held.get(key, 'none of the shards')}, by "
                f"the index in {found.index.get(key, 'none of them')}. The folder holds files of "
                "two adapters, or is incomplete: copy it again from where it was trained."
            )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_symlink() and not file.exists():
        raise AdapterError(
            f"{file} is missing: {file.parent} is not a PEFT adapter folder. "
            "adapter_name_or_path must name the folder that training saved."
        )
    config = read_json(file, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds {type(config).__name__}, expected an object.")
    return config


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        # safetensors reports "No such file" for any file that it cannot open.
        file.open("rb").close()
        if is_pickle(file):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(file)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{file} is a link to a missing file: an interrupted download?"
        ) from error
    except (PermissionError, IsADirectoryError) as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}.") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise AdapterError(
            f"{file} is damaged or incomplete ({error}; {file.stat().st_size} bytes). Copy it "
            "again from where it was trained."
        ) from error
    except Exception as error:
        # pickle.UnpicklingError and any other exception of a hostile or foreign pickle.
        raise AdapterError(
            f"{file} is not a plain file of tensors ({_refused(error)}), and ktrt unpickles "
            "nothing else. Save it as safetensors where it was trained."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise AdapterError(f"{file} does not hold a dictionary of tensors.")
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise AdapterError(f"{file}: {key} is no plain dense tensor ({value.layout}).")
    # torch supports few operations on one-byte floats.
    return {
        key: value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value
        for key, value in tensors.items()
    }


def _check_values(tensor: AdapterTensor) -> None:
    value = tensor.value
    if not value.is_floating_point():
        raise AdapterError(f"{tensor.where} has dtype {value.dtype}, expected floats.")
    # NaN and infinity show in minimum and maximum, which are fast to find.
    if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
        bad = value.numel() - int(torch.isfinite(value).sum())
        raise AdapterError(
            f"{tensor.where} holds {bad} NaN or infinite values of {value.numel()}. The "
            "training diverged or the file is damaged; this adapter cannot be used."
        )


def _without_copies(tensors: list[AdapterTensor]) -> list[AdapterTensor]:
    """Refuses two tensors for one place; merges equal copies under two names."""
    places: dict[tuple[str, str], AdapterTensor] = {}
    for tensor in tensors:
        put_once(places, (tensor.module, tensor.part), tensor)
    return list(places.values())


def _refused(error: Exception) -> str:
    """Returns torch's reason in one line, without its advice to unpickle the file anyway."""
    found = re.search(r"unsupported (global: )?\w+ \S+", str(error), re.IGNORECASE)
    return found[0] if found else type(error).__name__
