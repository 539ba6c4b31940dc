"""Finds the adapter of a folder: in it, one folder deeper, or in its newest checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.errors import AdapterError
from ktrt.folders.kinds import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINT,
    describe_folder,
    holds_adapter,
    listed,
    names_in,
    subfolders,
)
from ktrt.folders.models import check_files, missing_links

if TYPE_CHECKING:
    from pathlib import Path

# How deep the search for adapters goes that an error names.
_DEPTH = 3
_NAMED = 8


def find_adapter_folder(path: Path) -> tuple[Path, str | None]:
    """Returns the folder that holds the adapter of ``path``, and a log line if it is another one.

    Search order: ``path`` itself; the newest complete ``checkpoint-N`` of a training's output
    folder; the only adapter one folder deeper.

    Raises ``AdapterError`` if there are several adapters (it names them) or none (it names the
    contents and deeper adapters).
    """
    folder, note = _find(path)
    check_files(folder, AdapterError)
    if dangling := missing_links(folder, filter(ADAPTER_WEIGHTS.fullmatch, names_in(folder))):
        raise AdapterError(
            f"{folder}: {listed(dangling)}: a link to nothing or an empty file. A download or a "
            "training's saving was interrupted; copy the adapter again from where it was trained."
        )
    return folder, note


def _find(path: Path) -> tuple[Path, str | None]:
    if holds_adapter(path):
        return path, None
    found = [folder for folder in subfolders(path) if holds_adapter(folder)]
    checkpoints = sorted((folder for folder in found if _step(folder) >= 0), key=_step)
    if found and len(checkpoints) == len(found):
        return _newest(path, checkpoints)
    if len(found) == 1:
        return found[0], f"{path} holds no adapter itself; taking the one in {found[0]}"
    if found:
        raise AdapterError(
            f"{path} holds no adapter itself, but {len(found)} folders with one: "
            f"{listed(found, _NAMED)}. Name one of them as adapter_name_or_path."
        )
    if deeper := _deeper(path, _DEPTH):
        raise AdapterError(
            f"{path} holds no {ADAPTER_CONFIG} and no adapter_model.safetensors. Adapters lie in "
            f"{listed(deeper, _NAMED)}. Name one of them as adapter_name_or_path."
        )
    raise AdapterError(
        f"{path} is not a PEFT adapter folder: expected {ADAPTER_CONFIG} and "
        f"adapter_model.safetensors, found {describe_folder(path)}. adapter_name_or_path must name "
        "the folder that training saved; a whole model is named as model_name_or_path."
    )


def _newest(path: Path, checkpoints: list[Path]) -> tuple[Path, str]:
    """Returns the last complete checkpoint; if none is complete, the last one."""
    whole = [folder for folder in checkpoints if _is_complete(folder)]
    newest = (whole or checkpoints)[-1]
    note = f"{path} holds no adapter itself; taking its newest checkpoint, {newest.name}"
    later = [folder.name for folder in checkpoints if _step(folder) > _step(newest)]
    if later:
        note += f" (incomplete: {', '.join(later)})"
    return newest, note


def _is_complete(folder: Path) -> bool:
    names = names_in(folder)
    weights = [folder / name for name in names if ADAPTER_WEIGHTS.fullmatch(name)]
    sizes = [file.stat().st_size if file.is_file() else 0 for file in weights]
    return ADAPTER_CONFIG in names and bool(sizes) and all(sizes)


def _step(folder: Path) -> int:
    match = CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _deeper(path: Path, depth: int) -> list[Path]:
    if depth == 0:
        return []
    return [
        found
        for folder in subfolders(path)
        for found in ([folder] if holds_adapter(folder) else _deeper(folder, depth - 1))
    ]
