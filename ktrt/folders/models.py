"""Checks whether a folder given as model is one, by names and a few headers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktrt.errors import CheckpointError
from ktrt.folders.kinds import (
    CONFIG,
    describe_folder,
    glance,
    holds_model,
    kind_of,
    listed,
    model_weights,
    names_in,
)
from ktrt.folders.schemes import named_scheme, refusal, unread_scheme

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LFS_MARK = b"version https://git-lfs"
# A pointer has three lines.
_LFS_SIZE = 1024
_LFS_FILES = re.compile(
    r".*\.(safetensors|index\.json|model|tiktoken)|(config|tokenizer|vocab|special_tokens|added_"
    r"|generation_config|chat_template|merges).*|adapter_(config|model).*"
)
_FILE_SUFFIXES = (".safetensors", ".json", ".model", ".tiktoken", ".jinja", ".bin", ".pt")
# Names of unfinished files: the hub's, aria2's, wget's and browsers', ModelScope's.
_UNFINISHED = re.compile(r".*\.(incomplete|aria2|part|crdownload)|\.____temp|.*\.safetensors_.*")
_LARGEST_HEADER = 100 << 20


def check_model_folder(folder: Path, *, experts_elsewhere: bool = False) -> None:
    """Raises ``CheckpointError``, with the finding and advice, if ktrt certainly cannot read the
    folder as a model. ``experts_elsewhere``: its experts are not used (kt_weight_path)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: expected the model's directory.")
    check_files(folder, CheckpointError)
    if not holds_model(folder):
        kind = kind_of(folder)
        if kind is None:
            found = describe_folder(folder)
            raise CheckpointError(
                f"{folder} is not a model folder: it has no {CONFIG}; found {found}. "
                "model_name_or_path must name the folder with config.json and *.safetensors."
            )
        raise CheckpointError(f"{folder} is {kind.what}. {_unfinished(folder)}{kind.advice}")
    _check_complete(folder)
    _check_scheme(folder, experts_elsewhere=experts_elsewhere)


def check_files(folder: Path, error: type[Exception]) -> None:
    """Raises ``error`` for entries that are no files of a model or an adapter in spite of their
    names: folders, pipes (reading one would block), devices, and Git LFS pointers."""
    names = [name for name in names_in(folder) if _LFS_FILES.fullmatch(name)]
    for name in names:
        file = folder / name
        if name.endswith(_FILE_SUFFIXES) and file.exists() and not file.is_file():
            raise error(f"{file} is no regular file. Copy or download the folder again.")
    found = [name for name in names if _is_pointer(folder / name)]
    if found:
        raise error(
            f"{folder}: {listed(found)}: Git LFS pointers, not the files themselves. Run "
            f"`git lfs install && git lfs pull` in {folder}, or download the folder again."
        )


def missing_links(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns the ``names`` of dangling links and empty files."""
    return [name for name in names if not _is_there(folder / name)]


def tokenizer_advice(folder: Path) -> str:
    """Returns advice for a tokenizer that cannot be loaded; empty if its files say nothing."""
    names = names_in(folder)
    if "tokenizer.json" in names:
        return ""
    if "tekken.json" in names:
        return (
            f"{folder} holds tekken.json, Mistral's own form, without tokenizer.json: copy "
            "tokenizer.json from the model's Hugging Face repository."
        )
    found = [
        name for name in names if name.endswith((".tiktoken", ".model")) or name == "vocab.json"
    ]
    if not found:
        return f"{folder} holds no tokenizer: expected tokenizer.json or tokenizer.model."
    package = "tiktoken" if any("tiktoken" in name for name in found) else "sentencepiece"
    return (
        f"{folder} holds {listed(found)} without a converted tokenizer.json: `pip install "
        f"{package}` lets transformers convert it."
    )


def _is_pointer(file: Path) -> bool:
    try:
        if file.stat().st_size > _LFS_SIZE:
            return False
        return file.read_bytes().startswith(_LFS_MARK)
    except OSError:
        return False


def _is_there(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def _unfinished(folder: Path) -> str:
    """Returns a sentence that names unfinished downloads; empty if there are none."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    found = [name for place in places for name in names_in(place) if _UNFINISHED.fullmatch(name)]
    return f"A download did not end ({listed(found, 2)}). " if found else ""


def _check_complete(folder: Path) -> None:
    names = names_in(folder)
    if _is_there(folder / SINGLE):
        # transformers takes the single file, even if there is an index.
        return
    missing = missing_links(folder, _expected(folder, names))
    if not missing:
        return
    links = (name for name in missing if (folder / name).is_symlink())
    if link := next(links, ""):
        link = f" ({link} is a link to {(folder / link).readlink()}, which is not there)"
    raise CheckpointError(
        f"{folder}: files of the model are missing or empty ({len(missing)}): {listed(missing)}"
        f"{link}. {_unfinished(folder)}Download the model again (`huggingface-cli download` "
        "continues where it stopped), or copy all of its files (`cp -L` for links)."
    )


def _expected(folder: Path, names: list[str]) -> list[str]:
    """Returns the files that config.json or the index names, or that the shards' names imply."""
    if isinstance(chosen := glance(folder / CONFIG).get("transformers_weights"), str):
        return [chosen]
    if INDEX in names:
        weight_map = glance(folder / INDEX).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        return [INDEX, *sorted({name for name in files if isinstance(name, str)})]
    shards = [match for name in model_weights(names) if (match := _SHARD.fullmatch(name))]
    if not shards:
        return [SINGLE]
    stem, total = shards[0][1], int(shards[0][3])
    return [INDEX, *(f"{stem}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1))]


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: tuple[int, ...]


def _check_scheme(folder: Path, *, experts_elsewhere: bool) -> None:
    """Checks names first: dtypes and shapes need the headers of all files."""
    if _is_there(folder / SINGLE):
        files = [SINGLE]
        names: Iterable[str] = _header(folder / SINGLE)
    else:
        weight_map = glance(folder / INDEX).get("weight_map")
        names = weight_map if isinstance(weight_map, dict) else {}
        files = sorted({f for f in dict(names).values() if isinstance(f, str)})
    names = [n for n in names if not (experts_elsewhere and ".experts." in n)]
    if named_scheme(names) is None:
        return
    headers = {
        name: _Header(str(entry.get("dtype")), tuple(entry.get("shape") or ()))
        for file in files
        for name, entry in _header(folder / file).items()
        if isinstance(entry, dict) and not (experts_elsewhere and ".experts." in name)
    }
    # Without headers the shards are damaged, which is reported when they are opened.
    if found := unread_scheme(headers) if headers else named_scheme(names, certain=True):
        raise CheckpointError(refusal(folder, *found, headers.get(found[1])))


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            content = json.loads(stream.read(size)) if size <= _LARGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
