"""Compares the base that an adapter was trained on, by KTransformers' manifest, with another one.

The manifest has a fingerprint of the base's folder: of RAWINT4 bases config.json, the index, and of
every shard the header and eight windows of its bytes; of others config.json and the index
(kt_kernel 0.7.2, ``kt_kernel.sft.artifacts``).
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ktrt.errors import AdapterError
from ktrt.utils.json_files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SAMPLED = "safetensors-sharded-sampled-v1"
_WINDOWS, _WINDOW_BYTES = 8, 64 << 10
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"


def difference(identity: Mapping[str, Any], folder: Path) -> str | None:
    """Returns how the model in ``folder`` differs from the base of a manifest; None if it does not,
    or if the manifest has no fingerprint."""
    trained, schema = identity.get("fingerprint"), identity.get("fingerprint_schema")
    if not isinstance(trained, str) or schema not in (None, _SAMPLED):
        return None
    if not (folder / _INDEX).is_file():
        return f"{folder} has no {_INDEX}"
    try:
        if schema is None:
            return _by_index(trained, folder)
        return _by_samples(identity, trained, folder)
    except (OSError, ValueError, AdapterError) as error:
        return f"{folder} cannot be compared: {error}"


def _by_index(trained: str, folder: Path) -> str | None:
    digests = [_sha256((folder / name).read_bytes()) for name in (_CONFIG, _INDEX)]
    found = hashlib.sha256("\0".join(["kt-source-checkpoint-v2", *digests]).encode()).hexdigest()
    return None if found == trained else f"{_CONFIG} or {_INDEX} of {folder} differs"


def _by_samples(identity: Mapping[str, Any], trained: str, folder: Path) -> str | None:
    index = read_json(folder / _INDEX, AdapterError)
    config = _sha256(_canonical(read_json(folder / _CONFIG, AdapterError)))
    digests = {"config_sha256": config, "index_sha256": _sha256(_canonical(index))}
    names = sorted({str(name) for name in index.get("weight_map", {}).values()})
    shards = {name: _shard(folder / name) for name in names}
    whole = hashlib.sha256(b"kt-rawint4-base-safetensors-v1\0")
    for part in (*digests.values(), *(_canonical(shard).decode() for shard in shards.values())):
        whole.update(part.encode() + b"\0")
    if whole.hexdigest() == trained:
        return None
    words = {"config_sha256": _CONFIG, "index_sha256": _INDEX}
    changed = [words[key] for key, digest in digests.items() if identity.get(key) != digest]
    saved = identity.get("shards")
    for each in saved if isinstance(saved, list) else []:
        own = shards.get(str(each.get("name"))) if isinstance(each, dict) else None
        if own is not None and any(each.get(key) != value for key, value in own.items()):
            changed.append(own["name"])
    return f"in {folder} differ: {', '.join(changed[:3]) or 'the names of its shards'}"


def _shard(file: Path) -> dict[str, Any]:
    """Returns the record of one safetensors file, as kt_kernel makes it."""
    with file.open("rb") as stream:
        size = file.stat().st_size
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        start = 8 + len(header)
        window = min(_WINDOW_BYTES, size - start)
        span = size - start - window
        samples = hashlib.sha256()
        for offset in sorted({span * i // (_WINDOWS - 1) for i in range(_WINDOWS)}):
            stream.seek(start + offset)
            samples.update(f"{offset}\0".encode() + stream.read(window))
    return {
        "header_sha256": _sha256(header), "name": file.name, "sample_sha256": samples.hexdigest(),
        "size": size,
    }  # fmt: skip


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
