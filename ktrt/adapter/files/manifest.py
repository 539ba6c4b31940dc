"""Checks ``kt_adapter_manifest.json``, KTransformers' checksums of an adapter folder."""

from __future__ import annotations

import hashlib
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ktrt.errors import AdapterError
from ktrt.utils.json_files import JsonObject, read_json_as, shown

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_NAME = "kt_adapter_manifest.json"
_VERSION, _STATUS = 1, "ready"


class Manifest(JsonObject):
    """The keys that are read; each is checked separately, to name it in errors."""

    version: Any = None
    status: Any = None
    expert_weight_format: str | None = None
    base: Any = None
    lora: Any = None
    artifacts: Any = None


def check_manifest(folder: Path, config: dict[str, Any], files: list[Path]) -> Manifest | None:
    """Checks the folder against its manifest: version, status, rank and alpha, size and SHA-256 of
    every artifact, names, shapes and dtypes of listed tensors. Returns the manifest, None without
    one.

    ``config`` is adapter_config.json, ``files`` are the files to read. The manifest's path of the
    base, valid only on the training machine, is not checked. Raises ``AdapterError`` with the file,
    the finding and the expectation.
    """
    manifest = folder / MANIFEST_NAME
    if not manifest.is_symlink() and not manifest.exists():
        return None
    content = read_json_as(manifest, Manifest, AdapterError)
    for key, expected in (("version", _VERSION), ("status", _STATUS)):
        if getattr(content, key) != expected:
            raise AdapterError(
                f"{manifest}: {key} is {shown(getattr(content, key))}, expected {expected!r}. The "
                "adapter was not saved completely, or a later version of KTransformers wrote it."
            )
    _check_lora(manifest, content.lora, config)
    artifacts = content.artifacts
    if not isinstance(artifacts, dict):
        raise AdapterError(f"{manifest}: artifacts is {shown(artifacts)}, expected an object.")
    for name, record in artifacts.items():
        _check_artifact(manifest, name, record)
    for file in files:
        if file.name not in artifacts:
            raise AdapterError(
                f"{manifest} does not list {file.name}, but {folder} holds it; expected one of "
                f"{sorted(artifacts)}. Remove the file if it belongs to another adapter."
            )
    return content


def _check_lora(manifest: Path, lora: Any, config: dict[str, Any]) -> None:
    if not isinstance(lora, dict):
        raise AdapterError(f"{manifest}: lora is {shown(lora)}, expected rank and alpha.")
    for key, name in (("rank", "r"), ("alpha", "lora_alpha")):
        if lora.get(key) != config.get(name):
            raise AdapterError(
                f"{manifest}: lora.{key} is {lora.get(key)!r}, but adapter_config.json says {name} "
                f"{config.get(name)!r}; expected the same."
            )


def _check_artifact(manifest: Path, name: str, record: Any) -> None:
    file = manifest.parent / name
    if not isinstance(record, dict) or PurePath(name).name != name:
        raise AdapterError(f"{manifest}: the entry {name!r} does not describe a file next to it.")
    if not file.is_file():
        raise AdapterError(f"{file} is missing; {manifest.name} lists it.")
    size = file.stat().st_size
    if record.get("size") != size:
        raise AdapterError(
            f"{file} has {size} bytes, expected {record.get('size')!r} by {manifest.name}. Copy it "
            "again from where it was trained."
        )
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if record.get("sha256") != digest:
        raise AdapterError(
            f"{file} has SHA-256 {digest}, expected {record.get('sha256')!r} by {manifest.name}. "
            "Copy it again from where it was trained."
        )
    if "tensors" in record or "tensor_count" in record:
        _check_tensors(manifest, file, record)


def _check_tensors(manifest: Path, file: Path, record: dict[str, Any]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            found = {
                key: {"shape": list(each.get_shape()), "dtype": each.get_dtype()}
                for key, each in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged or incomplete ({error}).") from error
    expected = record.get("tensors", found)
    if not isinstance(expected, dict):
        raise AdapterError(f"{manifest}: tensors of {file.name} is no object.")
    for key in sorted(set(found) | set(expected)):
        if found.get(key) != expected.get(key):
            raise AdapterError(
                f"{file}: {key} is {found.get(key, 'missing')}, expected "
                f"{expected.get(key, 'none of that name')} by {manifest.name}."
            )
    if record.get("tensor_count", len(found)) != len(found):
        raise AdapterError(
            f"{file} holds {len(found)} tensors, expected {record['tensor_count']!r} by "
            f"{manifest.name}."
        )
