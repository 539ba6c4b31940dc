"""The manifest of a pack cache: the origin of its images, and their digests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from ktrt.errors import KtrtError
from ktrt.utils.json_files import parse_json, typed
from ktrt.utils.owned_folder import NotTrustedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt.utils.fingerprint import Fingerprint
    from ktrt.utils.owned_folder import OwnedFolder

MANIFEST = "manifest.json"
# An image has kt_kernel's layouts, then scales, then sums of codes, each at a multiple of 4096.
LAYOUT = "kt-0.7.2/image-1"
SCHEMA = 1
# The engine's search of scales for INT4 in groups, csrc/layout/encode_coded.cc: a search that finds
# others takes the next number, and caches of the last one are packed again.
INT4_SEARCH = 1


class CacheDamagedError(KtrtError):
    """A manifest that differs from what was written."""


DAMAGE = (OSError, ValueError, NotTrustedError, CacheDamagedError)


class Image(TypedDict):
    """A file: its size, and its digest as hexadecimal digits."""

    file: str
    bytes: int
    digest: str


class Key(TypedDict):
    """``CacheKey`` in a manifest."""

    source: str
    weight_format: str
    layers: dict[str, list[int]]
    files: list[dict[str, Any]]
    int4_search: NotRequired[int]


class Manifest(TypedDict):
    """``images`` has one per NUMA part, by layer."""

    schema: int
    layout: str
    created: str
    key: Key
    images: dict[str, list[Image]]


@dataclass(frozen=True)
class CacheKey:
    """The origin of a cache: the model folder, its files, and the way of packing.

    ``layers`` has the bytes of each image, one per NUMA part, by the experts module's path.
    ``int4_search``: ``INT4_SEARCH`` if scales of any layer were searched while packing, else 0.
    """

    source: str
    weight_format: str
    layers: dict[str, list[int]]
    files: Fingerprint
    int4_search: int = 0

    @property
    def parts(self) -> int:
        """NUMA parts of every layer."""
        return len(next(iter(self.layers.values())))

    @property
    def total_bytes(self) -> int:
        """Bytes of all images."""
        return sum(map(sum, self.layers.values()))

    def as_dict(self) -> dict[str, Any]:
        """Returns the key as a manifest has it."""
        values = asdict(self)
        if not self.int4_search:
            del values["int4_search"]
        return values

    def difference(self, found: Key) -> str | None:
        """Says how a manifest's key differs from this one; None if it does not."""
        expected = self.as_dict()
        if found == expected:
            return None
        old = {each.get("name"): each for each in found["files"]}
        new = {each["name"]: each for each in expected["files"]}
        changed = sorted(str(n) for n in old.keys() | new.keys() if old.get(n) != new.get(n))
        if changed:
            return f"changed since: {', '.join(changed[:3])}"
        search = found.get("int4_search", 0)
        if search != self.int4_search:
            return f"its INT4 scales are of search {search}, now {self.int4_search}"
        return "other sizes of experts"

    @property
    def folder_name(self) -> str:
        """A name for the model folder, format and number of parts, so that a new cache replaces an
        outdated one."""
        text = f"{self.source}\0{self.weight_format}\0{self.parts}"
        name = f"{Path(self.source).name}-{self.weight_format}"
        if self.parts > 1:
            name += f"-{self.parts}parts"
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_manifest(folder: OwnedFolder) -> Manifest:
    """Returns the manifest of a cache. Raises an error in ``DAMAGE`` if it is not as written."""
    manifest = parse_json(folder.read(MANIFEST), MANIFEST, CacheDamagedError)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CacheDamagedError(f"{MANIFEST} is not of schema {SCHEMA}")
    checksum = manifest.pop("sha256", None)
    if checksum != checksum_of(manifest):
        raise CacheDamagedError(f"{MANIFEST} has another checksum than it names")
    return typed(manifest, Manifest, MANIFEST, CacheDamagedError)


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
