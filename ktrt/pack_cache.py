"""Packed experts on disk: written once, mapped into memory by every later start.

A cache is a folder with one image file per layer and NUMA part and a manifest, which says what the
images were made from and how, and holds a digest of each. It is written under a temporary name and
renamed when complete. LoRA is never in it. What a manifest does not vouch for is never used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from ktrt import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ktrt.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Of the images: kt_kernel's layouts, then scales and sums of codes, each from a multiple of 4096.
LAYOUT = "kt-0.7.2/image-1"
_SCHEMA = 1
_TEMPORARY = ".tmp-"
# Beside the images; a file system without a reserve behaves badly when it is full.
_SPARE_BYTES = 64 << 20
# A writer that has written nothing for so long is not waited for.
_STALL_SECONDS = 120.0


class PackedLayer(Protocol):
    """The part of the engine's layer that the cache uses."""

    @property
    def image_bytes(self) -> Sequence[int]: ...
    def write_image(self, part: int, fd: int) -> int: ...
    def use_images(
        self,
        fds: Sequence[int],
        digests: Sequence[int],
        *,
        use: Literal["auto", "map", "copy"] = "auto",
    ) -> bool: ...


@dataclass(frozen=True)
class CacheKey:
    """What a cache is made from: the model folder, its files, and how they are packed.

    ``layers``: the path of each experts module and the bytes of its images, one per NUMA part.
    """

    source: str
    weight_format: str
    layers: dict[str, list[int]]
    files: Fingerprint

    @property
    def parts(self) -> int:
        """NUMA parts of every layer."""
        return len(next(iter(self.layers.values())))

    @property
    def total_bytes(self) -> int:
        """Bytes of all images."""
        return sum(map(sum, self.layers.values()))

    @property
    def folder_name(self) -> str:
        """One folder per model folder, format and parts: a newer version replaces an older one."""
        text = f"{self.source}\0{self.weight_format}\0{self.parts}"
        name = f"{Path(self.source).name}-{self.weight_format}"
        if self.parts > 1:
            name += f"-{self.parts}parts"
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def default_folder() -> Path:
    """$XDG_CACHE_HOME/ktrt, else ~/.cache/ktrt."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "ktrt"


class PackCache:
    """The cache of one model in the cache folder ``root``."""

    def __init__(self, root: Path, key: CacheKey) -> None:
        self.folder = root / key.folder_name
        self._key = key

    def load(self, layers: Mapping[str, PackedLayer]) -> str | None:
        """Gives every layer its images; "mapped" or "copied", or None if there is no cache.

        A cache that is damaged, or was made from other files or in another way, is reported,
        removed and not used; layers that were loaded before damage was found have to be packed.
        """
        if not self.folder.is_dir():
            return None
        try:
            manifest = read_manifest(self.folder)
            if reason := self._difference(manifest):
                logger.info(
                    "The pack cache %s is outdated (%s): packing again", self.folder, reason
                )
                self.discard()
                return None
            return self._use(layers, manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self.folder.is_dir():
                return None  # another process replaces it
            logger.warning(
                "The pack cache %s is damaged (%s): packing again", self.folder, _words(error)
            )
            self.discard()
            return None

    def mismatch(self) -> str | None:
        """Why there is nothing to load; None if there is a cache. Its images are not read."""
        if not self.folder.is_dir():
            return "not there yet"
        try:
            manifest = read_manifest(self.folder)
            for image in (i for images in manifest["images"].values() for i in images):
                if (self.folder / image["file"]).stat().st_size != image["bytes"]:
                    return f"{image['file']} is incomplete"
            return self._difference(manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _words(error)

    def _difference(self, manifest: Mapping[str, Any]) -> str | None:
        """In what the manifest's key differs from this one."""
        if manifest["layout"] != LAYOUT:
            return f"its layout is {manifest['layout']}, now {LAYOUT}"
        found, expected = manifest["key"], asdict(self._key)
        if found == expected:
            return None
        old = {each["name"]: each for each in found["files"]}
        new = {each["name"]: each for each in expected["files"]}
        changed = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
        return f"changed since: {', '.join(changed[:3])}" if changed else "other sizes of experts"

    def _use(self, layers: Mapping[str, PackedLayer], manifest: Mapping[str, Any]) -> str:
        mapped: bool | None = None
        for path, layer in layers.items():
            images = manifest["images"][path]
            with contextlib.ExitStack() as stack:
                fds = [stack.enter_context(_opened(self.folder / i["file"])) for i in images]
                digests = [int(i["digest"], 16) for i in images]
                # Files of one cache lie in the page cache in one way.
                use: Literal["auto", "map", "copy"] = "auto"
                if mapped is not None:
                    use = "map" if mapped else "copy"
                try:
                    mapped = layer.use_images(fds, digests, use=use)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        return "mapped" if mapped else "copied"

    def discard(self) -> None:
        """Removes the cache, at once for whoever looks."""
        doomed = self.folder.with_name(f"{self.folder.name}{_TEMPORARY}{os.getpid()}-old")
        with contextlib.suppress(OSError):
            self.folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Waits until no other process writes this cache; yields whether this one may.

        False if the folder cannot be written, or the other one has stopped getting on.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            path = self.folder.with_name(f"{self.folder.name}.lock")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            logger.warning("No pack cache: %s", _words(error))
            yield False
            return
        try:
            yield self._wait(descriptor)
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> bool:
        told, size, since = False, -1, time.monotonic()
        while not _try_lock(descriptor):
            if not told:
                logger.info("Another process packs these experts: waiting for it (Ctrl-C leaves)")
                told = True
            if (now := _written(self.folder)) != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > _STALL_SECONDS:
                logger.warning("The other process does not get on: packing without the cache")
                return False
            time.sleep(0.1)
        return True

    def writer(self) -> CacheWriter | None:
        """Starts a new cache, under the lock; None, with a message, if there is no room."""
        for path in _temporaries(self.folder):
            shutil.rmtree(path, ignore_errors=True)
        try:
            free = shutil.disk_usage(self.folder.parent).free
            if free < self._key.total_bytes + _SPARE_BYTES:
                _give_up(self.folder, f"{free / 1e9:.2f} GB free on the disk", self._key)
                return None
            return CacheWriter(self.folder, self._key)
        except OSError as error:
            _give_up(self.folder, _words(error), self._key)
            return None


class CacheWriter:
    """Writes a cache, one layer after the other; a failure is a message, never an error."""

    def __init__(self, folder: Path, key: CacheKey) -> None:
        """``OSError`` if the folder cannot be made."""
        self._folder = folder
        self._key = key
        self._images: dict[str, list[dict[str, Any]]] = {}
        self._temporary: Path | None = folder.with_name(f"{folder.name}{_TEMPORARY}{os.getpid()}")
        self._temporary.mkdir()

    def add(self, path: str, layer: PackedLayer) -> None:
        """Writes the images of the layer whose experts module is ``path``."""
        if self._temporary is None:
            return
        images = []
        try:
            for part, size in enumerate(layer.image_bytes):
                file = self._temporary / f"layer-{len(self._images):04d}.part-{part}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptor = os.open(file, flags, 0o444)
                try:
                    digest = layer.write_image(part, descriptor)
                finally:
                    os.close(descriptor)
                images.append({"file": file.name, "bytes": size, "digest": f"{digest:016x}"})
        except OSError as error:
            self._fail(error)
            return
        self._images[path] = images

    def finish(self) -> bool:
        """Makes the cache valid; whether there is one now."""
        if self._temporary is None:
            return False
        manifest = {
            "schema": _SCHEMA,
            "layout": LAYOUT,
            "ktrt": __version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "key": asdict(self._key),
            "images": self._images,
        }
        manifest["sha256"] = _checksum(manifest)
        try:
            file = self._temporary / MANIFEST
            file.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in self._temporary.iterdir():
                _sync(path)
            _sync(self._temporary)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._temporary.rename(self._folder)
            _sync(self._folder.parent)
        except OSError as error:
            self._fail(error)
            return False
        self._temporary = None
        return True

    def _fail(self, error: OSError) -> None:
        _give_up(self._folder, _words(error), self._key)
        self.abort()

    def abort(self) -> None:
        """Removes what was written, unless it is finished."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache. ``OSError``, or ``ValueError`` if it is not what was written."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        raise ValueError(f"{MANIFEST} is not of schema {_SCHEMA}")
    checksum = manifest.pop("sha256", None)
    if checksum != _checksum(manifest):
        raise ValueError(f"{MANIFEST} has another checksum than it names")
    return manifest


def cache_folders(root: Path) -> list[Path]:
    """The finished caches in ``root``, by name."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and _TEMPORARY not in p.name)


def unfinished(root: Path) -> list[Path]:
    """Temporary folders in ``root`` that no living process writes."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _TEMPORARY in p.name and not _being_written(p))


def _being_written(temporary: Path) -> bool:
    lock = temporary.with_name(f"{temporary.name.partition(_TEMPORARY)[0]}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # A file system without locks: writers have folders of their own, and the last one wins.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _temporaries(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f"{glob.escape(folder.name)}{_TEMPORARY}*"))


def _written(folder: Path) -> int:
    """Bytes in the temporary folders of a cache."""
    total = 0
    for temporary in _temporaries(folder):
        with contextlib.suppress(OSError):
            total += sum(file.stat().st_size for file in temporary.iterdir())
    return total


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{error}" if str(error) else type(error).__name__


def _give_up(folder: Path, reason: str, key: CacheKey) -> None:
    logger.warning(
        "No pack cache: %.2f GB cannot be written to %s (%s). The chat goes on; the experts are "
        "packed again at the next start. ktrt_cache_dir names another folder, ktrt_cache: false "
        "switches the cache off.",
        key.total_bytes / 1e9, folder.parent, reason,
    )  # fmt: skip
