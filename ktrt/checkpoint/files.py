"""Finds the weight files of a model folder: the ones that transformers takes, and the ignored
ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.errors import CheckpointError
from ktrt.utils.json_files import JsonObject, read_json_as

if TYPE_CHECKING:
    from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_INDEX_SUFFIX = ".index.json"
# Folders in which publishers put a second copy of the weights, in the layout of other software.
_COPIES = ("original", "metal")


class _Index(JsonObject):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class WeightFiles:
    """``weight_map``: tensor → file, by the index; None for the single file ``main``.
    ``ignored``: unused files and folders with weights; ``doubtful``: they may be the wanted
    weights."""

    main: Path
    weight_map: dict[str, Path] | None
    ignored: list[str]
    doubtful: bool

    @property
    def sharded(self) -> bool:
        """Returns whether an index maps tensors to files."""
        return self.weight_map is not None


def find_weights(folder: Path, chosen: str | None = None) -> WeightFiles:
    """Finds the weight files. As in transformers, the single file takes precedence over an index,
    and ``chosen`` (config.json's transformers_weights) over both.

    Raises ``CheckpointError`` for a folder without safetensors, and for an index that is damaged or
    names a file that is missing or outside the folder.
    """
    main = folder / chosen if chosen else folder / SINGLE_NAME
    if chosen and not _is_inside(folder, main):
        raise CheckpointError(
            f"{folder}/config.json: transformers_weights: found {chosen!r}, expected a safetensors "
            "file, or the index of several, in the model folder."
        )
    if not chosen and not main.is_file():
        main = folder / INDEX_NAME
    if not main.is_file():
        raise CheckpointError(_no_weights(folder, main, chosen))
    weight_map = _weight_map(folder, main) if main.name.endswith(_INDEX_SUFFIX) else None
    used = {main, *(weight_map or {}).values()}
    doubtful = weight_map is None and main.name == SINGLE_NAME and (folder / INDEX_NAME).is_file()
    return WeightFiles(main, weight_map, _ignored(folder, used), doubtful)


def _weight_map(folder: Path, index: Path) -> dict[str, Path]:
    advice = "Download or copy the model folder again."
    found = read_json_as(index, _Index, CheckpointError, advice).weight_map
    if not found:
        raise CheckpointError(f"{index}: weight_map is empty; expected tensor names and files.")
    paths = {file: index.parent / file for file in set(found.values())}
    for name, file in found.items():
        path = paths[file]
        if not _is_inside(folder, path):
            raise CheckpointError(
                f"{index}: {name} is in {file!r}, expected a safetensors file of the folder. "
                f"{advice}"
            )
    for file, path in paths.items():
        if not path.is_file():
            name = next(name for name, of in found.items() if of == file)
            broken = f" (a link to {path.readlink()})" if path.is_symlink() else ""
            raise CheckpointError(
                f"{path} is missing{broken}: {index.name} says that it holds {name}. {advice}"
            )
    return {name: paths[file] for name, file in found.items()}


def _is_inside(folder: Path, path: Path) -> bool:
    """Judges the path's words only, since the hub's folders consist of links to other folders."""
    relative = path.relative_to(folder) if path.is_relative_to(folder) else None
    named = path.name.endswith((".safetensors", f".safetensors{_INDEX_SUFFIX}"))
    return named and relative is not None and ".." not in relative.parts


def _ignored(folder: Path, used: set[Path]) -> list[str]:
    """Returns unused files with weights (an older index, shards that no index names, consolidated
    files, variants) and copies in subfolders."""
    found = sorted(path for path in _weight_like(folder) if path not in used)
    names = [path.name for path in found[:3]]
    if len(found) > len(names):
        names.append(f"{len(found) - len(names)} more")
    return names + [f"{name}/" for name in _COPIES if _weight_like(folder / name)]


def _weight_like(folder: Path) -> list[Path]:
    patterns = ("*.safetensors", f"*.safetensors{_INDEX_SUFFIX}")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _no_weights(folder: Path, main: Path, chosen: str | None) -> str:
    for link in (main, folder / SINGLE_NAME):
        if link.is_symlink():
            return (
                f"{link} is a link to {link.readlink()}, which is not there (an interrupted "
                "download?). Download the folder again."
            )
    if chosen:
        return f"{main} is missing, which config.json names in transformers_weights."
    if others := _ignored(folder, set()):
        return (
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}, but {', '.join(others)}: "
            "neither transformers nor ktrt takes them for the model's weights. Rename them if they "
            "are the whole model by transformers' names, or download the folder again."
        )
    if not any(folder.glob("*.bin")):
        return f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}: not a model folder."
    return (
        f"{folder} holds weights only as .bin (pickle) files; ktrt reads safetensors. Convert once:"
        f' python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        " and copy the tokenizer files into the new folder."
    )
