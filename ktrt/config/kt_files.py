"""Checks KTransformers' BF16 copy of a model's non-expert weights against the model.

ktrt reads these weights from the model itself, dequantised the same way. The copy is not needed,
but it must be a copy of this model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ktrt.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "kt_non_expert_manifest.json"
INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 22

# (dtype, shape, file, first byte, bytes) by name.
Tensors = dict[str, tuple[str, list[int], "Path", int, int]]


def check_non_experts(copy: Path, model: Path, where: str) -> str:
    """Checks that the copy is this model's; returns the reason why it is not read, for the log.

    Compares the SHA-256 of the model's config and index with KTransformers' manifest, or without
    one the tensors' bytes. ``ConfigError``: it is another model's copy, or cannot be compared.
    """
    key = f"{where}: kt_non_expert_weight_path {copy}"
    if copy.resolve() == model.resolve():
        return "it is the model itself"
    if (copy / MANIFEST).exists():
        _check_manifest(copy / MANIFEST, model, key)
        return f"its manifest names {model} as its source, from where the same weights are read"
    ours, theirs = _tensors(model, key), _tensors(copy, key)
    for name, (dtype, shape, file, start, size) in theirs.items():
        other = ours.get(name)
        if other is None:
            raise ConfigError(f"{key}: {name} is no tensor of {model}: a copy of another model")
        if other[:2] != (dtype, shape):
            raise ConfigError(
                f"{key}: {name} is {dtype} {shape} there and {other[0]} {other[1]} in {model}; "
                f"without {MANIFEST}, which KTransformers writes, ktrt cannot tell whether they "
                "are the same weights. Remove the key: they are read from the model itself"
            )
        if not _same(file, start, other[2], other[3], size):
            raise ConfigError(
                f"{key}: {name} differs from the model's own in {other[2]}: a copy of another "
                "model. Remove the key to use the model's own weights, or name the right model"
            )
    return f"its {len(theirs)} tensors equal the tensors of {model}, which are read"


def _check_manifest(file: Path, model: Path, key: str) -> None:
    import hashlib

    from ktrt.utils.json_files import read_json_as

    manifest = read_json_as(file, dict[str, Any], ConfigError)
    if manifest.get("status") != "ready":
        raise ConfigError(
            f"{key}: status in {file} is {manifest.get('status')!r}, expected 'ready'"
        )
    source = manifest.get("source")
    source = source if isinstance(source, dict) else {}
    for name, found in (("config_sha256", model / "config.json"), ("index_sha256", model / INDEX)):
        if (
            not found.is_file()
            or source.get(name) != hashlib.sha256(found.read_bytes()).hexdigest()
        ):
            raise ConfigError(
                f"{key}: made from {source.get('model_name_or_path')}, whose {found.name} is not "
                f"that of {model} ({name} in {file}). Name the right copy, or remove the key: the "
                "weights are read from the model itself"
            )


def _tensors(folder: Path, key: str) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, 1 << 27)))
            for name, each in header.items():
                if name != "__metadata__":
                    start, end = each["data_offsets"]
                    place = 8 + length + start, end - start
                    found[name] = (each["dtype"], each["shape"], file, *place)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{key}: {file} is no safetensors file ({error})") from error
    if not found:
        raise ConfigError(f"{key}: {folder} holds no *.safetensors")
    return found


def _same(file: Path, start: int, other: Path, other_start: int, size: int) -> bool:
    with file.open("rb") as one, other.open("rb") as two:
        one.seek(start)
        two.seek(other_start)
        for done in range(0, size, _CHUNK):
            count = min(_CHUNK, size - done)
            if one.read(count) != two.read(count):
                return False
    return True
