"""Where in a folder the adapter lies: in it, one folder deeper, or in its newest checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ktrt.errors import AdapterError
from ktrt.folders.kinds import describe_folder, names_in

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_NAME = "adapter_config.json"
# Everything that PEFT, KTransformers and LLaMA-Factory call an adapter's tensors.
_WEIGHTS = re.compile(
    r"adapter_model(-\d{5}-of-\d{5})?\.(safetensors|bin|pt)"
    r"|fused_expert_lora\.safetensors|lora_experts\.safetensors"
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# How deep an error looks for adapters to name.
_DEPTH = 3
_NAMED = 8


def holds_adapter(folder: Path) -> bool:
    """Whether the files of an adapter lie directly in ``folder``, complete or not."""
    names = names_in(folder)
    return CONFIG_NAME in names or any(map(_WEIGHTS.fullmatch, names))


def find_adapter_folder(path: Path) -> tuple[Path, str | None]:
    """The folder that holds the adapter ``path`` means, and a line for the log if it is another.

    In this order: ``path`` itself; the newest complete ``checkpoint-N`` of a training's output
    folder; the only adapter one folder deeper.

    ``AdapterError``: several adapters to choose from (all named), or none (what lies there instead,
    and where deeper adapters are).
    """
    if holds_adapter(path):
        return path, None
    found = [folder for folder in _subfolders(path) if holds_adapter(folder)]
    checkpoints = sorted((folder for folder in found if _step(folder) >= 0), key=_step)
    if found and len(checkpoints) == len(found):
        return _newest(path, checkpoints)
    if len(found) == 1:
        return found[0], f"{path} holds no adapter itself; taking the one in {found[0]}"
    if found:
        raise AdapterError(
            f"{path} holds no adapter itself, but {len(found)} folders with one: "
            f"{_listed(found)}. Name one of them as adapter_name_or_path."
        )
    deeper = _deeper(path, _DEPTH)
    if deeper:
        raise AdapterError(
            f"{path} holds no {CONFIG_NAME} and no adapter_model.safetensors. Adapters lie in "
            f"{_listed(deeper)}. Name one of them as adapter_name_or_path."
        )
    raise AdapterError(
        f"{path} is not a PEFT adapter folder: expected {CONFIG_NAME} and "
        f"adapter_model.safetensors, found {describe_folder(path)}. adapter_name_or_path must name "
        "the folder that training saved."
    )


def _newest(path: Path, checkpoints: list[Path]) -> tuple[Path, str]:
    """The last checkpoint whose saving was not interrupted; the last one if that holds for none."""
    whole = [folder for folder in checkpoints if _is_complete(folder)]
    newest = (whole or checkpoints)[-1]
    note = f"{path} holds no adapter itself; taking its newest checkpoint, {newest.name}"
    later = [folder.name for folder in checkpoints if _step(folder) > _step(newest)]
    if later:
        note += f" (incomplete: {', '.join(later)})"
    return newest, note


def _is_complete(folder: Path) -> bool:
    names = names_in(folder)
    weights = [folder / name for name in names if _WEIGHTS.fullmatch(name)]
    sizes = [file.stat().st_size if file.is_file() else 0 for file in weights]
    return CONFIG_NAME in names and bool(sizes) and all(sizes)


def _step(folder: Path) -> int:
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _deeper(path: Path, depth: int) -> list[Path]:
    if depth == 0:
        return []
    return [
        found
        for folder in _subfolders(path)
        for found in ([folder] if holds_adapter(folder) else _deeper(folder, depth - 1))
    ]


def _subfolders(path: Path) -> list[Path]:
    return [path / name for name in names_in(path) if (path / name).is_dir()]


def _listed(folders: list[Path]) -> str:
    more = f" and {len(folders) - _NAMED} more" if len(folders) > _NAMED else ""
    return ", ".join(str(folder) for folder in folders[:_NAMED]) + more
