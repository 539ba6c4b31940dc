"""Identifies a model folder's weight files without reading them whole.

Two files count as equal if name, size, time of modification, safetensors header and a few sampled
blocks are equal. The time alone reveals files that were edited or downloaded again. Header and
blocks reveal another checkpoint of the same sizes whose copy kept the time (`cp -p`, rsync).
Hashing everything would take as long as packing.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SAMPLES = 16
_SAMPLE_BYTES = 4096
# Larger headers do not exist: safetensors itself refuses more.
_MAX_HEADER_BYTES = 100_000_000

Fingerprint = list[dict[str, Any]]


def fingerprint(files: Iterable[Path]) -> Fingerprint:
    """Returns name, size, time of modification and sampled hash of every file, sorted by name.

    Raises ``CheckpointError`` for an unreadable file.
    """
    return [_fingerprint(path) for path in sorted(set(files))]


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        digest = _sampled_hash(path, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return {
        "name": path.name,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest,
    }


def _sampled_hash(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        digest.update(start)
        if path.suffix == ".safetensors":
            digest.update(file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES)))
        else:
            digest.update(file.read(_MAX_HEADER_BYTES))
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
