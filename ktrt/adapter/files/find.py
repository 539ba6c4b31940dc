"""Finds the files of a folder that hold an adapter's tensors."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ktrt.errors import AdapterError
from ktrt.utils.json_files import JsonObject, read_json_as

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Pickled tensors, read without running code.
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_INDEX = "adapter_model.safetensors.index.json"
_SHARD = re.compile(r"adapter_model-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
# KTransformers' additional files: LoRA of routed experts, and extra experts.
_FURTHER_NAMES = ("fused_expert_lora.safetensors", "lora_experts.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """``files`` to read, the first one for messages. ``index``: tensor → file, if the adapter has
    several."""

    files: list[Path]
    index: dict[str, str] = field(default_factory=dict)


class _Index(JsonObject):
    weight_map: dict[str, str]


def find_weight_files(folder: Path) -> WeightFiles:
    """Finds, in this order: safetensors, its shards, pickles; plus KTransformers' files; else the
    files of the single subfolder with any. Raises ``AdapterError`` if there is nothing."""
    further = [folder / name for name in _FURTHER_NAMES if is_there(folder / name)]
    main = _main_files(folder) or (None if further else _in_subfolder(folder))
    if main is None and not further:
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise AdapterError(
            f"{folder / WEIGHTS_NAME} is missing; expected it, its shards, or {_PICKLES[0]} next "
            f"to {CONFIG_NAME}. The folder holds {', '.join(held[:12]) or 'nothing'}."
        )
    return WeightFiles([*(main.files if main else []), *further], main.index if main else {})


def is_there(path: Path) -> bool:
    """Returns whether anything is at ``path``, even a broken link or a directory."""
    return path.is_symlink() or path.exists()


def is_pickle(file: Path) -> bool:
    """Returns whether the file's name is torch's."""
    return file.name in _PICKLES


def _main_files(folder: Path) -> WeightFiles | None:
    single = [folder / name for name in (WEIGHTS_NAME, *_PICKLES) if is_there(folder / name)]
    shards = _shards(folder)
    if single:
        ignored = [path.name for path in (*single[1:], *(shards.files if shards else []))]
        if ignored:
            logger.warning("%s is read, %s ignored", single[0], ", ".join(ignored[:4]))
        return WeightFiles(single[:1])
    return shards


def _shards(folder: Path) -> WeightFiles | None:
    index, found = folder / _INDEX, {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _SHARD.fullmatch(path.name):
            found[int(match["number"])] = (path, int(match["count"]))
    where: dict[str, str] = {}
    if is_there(index):
        where = read_json_as(index, _Index, AdapterError).weight_map
        names = sorted(set(where.values()))
        if wrong := [name for name in names if not _SHARD.fullmatch(name)]:
            raise AdapterError(f"{index} names {wrong[0]!r}, expected a file of the same folder.")
        return WeightFiles(_all_there(folder, names, index.name), where) if names else None
    if not found:
        return None
    count = next(iter(found.values()))[1]
    names = [f"adapter_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return WeightFiles(_all_there(folder, names, "the shards' names"))


def _all_there(folder: Path, names: Iterable[str], source: str) -> list[Path]:
    files = [folder / name for name in names]
    if missing := [file for file in files if not is_there(file)]:
        raise AdapterError(
            f"{missing[0]} is missing ({len(missing)} of {len(files)} shards by {source}). Copy "
            "the folder again from the training machine."
        )
    return files


def _in_subfolder(folder: Path) -> WeightFiles | None:
    """Returns the only subfolder's files; a subfolder with a configuration is another adapter."""
    found = [
        (path, files)
        for path in sorted(folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and not is_there(path / CONFIG_NAME) and (files := _main_files(path))
    ]
    if len(found) != 1:
        return None
    path, files = found[0]
    logger.warning("%s holds no weights itself; reads the ones in %s", folder, path.name)
    return files
