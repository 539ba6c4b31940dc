"""Packed experts on disk: written once, mapped into memory by every later start.

A cache is a folder with one image file per layer and NUMA part, and a manifest with the images'
origin and digests. It is written under a temporary name and renamed when complete. It never
contains LoRA. Files without a valid digest are never used, nor files that another user could have
written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

from ktrt import __version__
from ktrt.loading.pack_manifest import (
    DAMAGE,
    LAYOUT,
    MANIFEST,
    SCHEMA,
    CacheKey,
    Image,
    Manifest,
    checksum_of,
    read_manifest,
)
from ktrt.utils.owned_folder import NotTrustedError, OwnedFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
# In addition to the images: full file systems behave badly.
_SPARE_BYTES = 64 << 20
# A writer that makes no progress for this time is not waited for.
_STALL_SECONDS = 120.0


class PackedLayer(Protocol):
    """The engine's layer, as far as the cache uses it."""

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


def default_folder() -> Path | None:
    """Returns $XDG_CACHE_HOME/ktrt, else ~/.cache/ktrt; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "ktrt"
    try:
        return Path.home() / ".cache" / "ktrt"
    except RuntimeError:  # neither HOME nor an entry in passwd
        return None


class PackCache:
    """The cache of one model in the cache folder ``root``."""

    def __init__(self, root: Path, key: CacheKey) -> None:
        self.folder = root / key.folder_name
        self._key = key
        self._refused = False

    def load(self, layers: Mapping[str, PackedLayer]) -> str | None:
        """Gives every layer its images; returns "mapped" or "copied", or None without a cache.

        A cache that is damaged or outdated is reported, removed and not used; layers that were
        loaded before the damage was found must be packed again. A cache that others could have
        written is not used either; if this user may not replace it, nothing is written.
        """
        if self._refused or not self.folder.is_dir():
            return None
        try:
            with opened(self.folder) as folder:
                manifest = read_manifest(folder)
                if not (reason := self._difference(manifest)):
                    return self._use(layers, manifest, folder)
            logger.info("The pack cache %s is outdated (%s): packing again", self.folder, reason)
        except NotTrustedError as error:
            if not error.ours or not _is_trusted(self.folder.parent):
                self._refuse(error)
                return None
            logger.warning("The pack cache %s is not used (%s): packing again", self.folder, error)
        except DAMAGE as error:
            if not self.folder.is_dir():
                return None  # another process replaces it
            logger.warning(
                "The pack cache %s is damaged (%s): packing again", self.folder, _words(error)
            )
        self.discard()
        return None

    def _refuse(self, reason: NotTrustedError) -> None:
        self._refused = True
        logger.warning(
            "No pack cache: %s. The experts are packed at every start; ktrt_cache_dir or "
            "KTRT_CACHE_DIR names another folder.", reason,
        )  # fmt: skip

    def mismatch(self) -> str | None:
        """Says why there is nothing to load; None if there is a cache. Reads no image."""
        if not self.folder.is_dir():
            return "not there yet"
        try:
            with opened(self.folder) as folder:
                manifest = read_manifest(folder)
            for image in (i for images in manifest["images"].values() for i in images):
                if (self.folder / image["file"]).stat().st_size != image["bytes"]:
                    return f"{image['file']} is incomplete"
            return self._difference(manifest)
        except DAMAGE as error:
            return _words(error)

    def _difference(self, manifest: Manifest) -> str | None:
        """Says how the manifest's key differs from this cache's; None if it does not."""
        if manifest["layout"] != LAYOUT:
            return f"its layout is {manifest['layout']}, now {LAYOUT}"
        return self._key.difference(manifest["key"])

    def _use(
        self, layers: Mapping[str, PackedLayer], manifest: Manifest, folder: OwnedFolder
    ) -> str:
        mapped: bool | None = None
        for path, layer in layers.items():
            images = manifest["images"].get(path)
            if images is None:
                raise ValueError(f"{path} has no image")
            with contextlib.ExitStack() as stack:
                fds = [stack.enter_context(_open_file(folder, i["file"])) for i in images]
                digests = [int(i["digest"], 16) for i in images]
                # The first layer decides for all: their files are alike in the page cache.
                use: Literal["auto", "map", "copy"] = "auto"
                if mapped is not None:
                    use = "map" if mapped else "copy"
                try:
                    mapped = layer.use_images(fds, digests, use=use)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        return "mapped" if mapped else "copied"

    def discard(self) -> None:
        """Removes the cache; other processes see it vanish in one step."""
        doomed = f"{self.folder.name}{_TEMPORARY}{os.getpid()}-old"
        lost = contextlib.suppress(OSError, NotTrustedError)
        with lost, OwnedFolder.root(self.folder.parent) as root:
            root.rename(self.folder.name, doomed)
            root.remove_folder(doomed)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Waits until no other process writes this cache; yields whether this process may.

        Yields False if the folder is not writable, if others can write to it, or if the other
        process makes no progress.
        """
        if self._refused:
            yield False
            return
        try:
            self.folder.parent.mkdir(0o755, parents=True, exist_ok=True)
            with OwnedFolder.root(self.folder.parent) as root:
                descriptor = root.open(f"{self.folder.name}.lock", os.O_RDWR | os.O_CREAT)
        except NotTrustedError as error:
            self._refuse(error)
            yield False
            return
        except (OSError, ValueError) as error:
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
                logger.warning("The other process makes no progress: packing without the cache")
                return False
            time.sleep(0.1)
        return True

    def writer(self) -> CacheWriter | None:
        """Starts a new cache, under the lock; None, with a warning, if there is no room."""
        for path in _temporaries(self.folder):
            shutil.rmtree(path, ignore_errors=True)
        try:
            free = shutil.disk_usage(self.folder.parent).free
            if free < self._key.total_bytes + _SPARE_BYTES:
                _give_up(self.folder, f"{free / 1e9:.2f} GB free on the disk", self._key)
                return None
            return CacheWriter(self.folder, self._key)
        except (OSError, NotTrustedError) as error:
            _give_up(self.folder, _words(error), self._key)
            return None


class CacheWriter:
    """Writes a cache layer by layer; a failure is a warning, never an error."""

    def __init__(self, folder: Path, key: CacheKey) -> None:
        """``OSError`` or ``NotTrustedError`` if the folder cannot be made."""
        self._folder = folder
        self._key = key
        self._images: dict[str, list[Image]] = {}
        self._root = OwnedFolder.root(folder.parent)
        self._temporary: OwnedFolder | None = None
        try:
            self._temporary = self._root.make_folder(f"{folder.name}{_TEMPORARY}{os.getpid()}")
        except BaseException:
            self._root.close()
            raise

    def add(self, path: str, layer: PackedLayer) -> None:
        """Writes the images of the layer whose experts module is ``path``."""
        if self._temporary is None:
            return
        images: list[Image] = []
        try:
            for part, size in enumerate(layer.image_bytes):
                file = f"layer-{len(self._images):04d}.part-{part}"
                with _open_file(self._temporary, file, _NEW, 0o444) as descriptor:
                    digest = layer.write_image(part, descriptor)
                images.append({"file": file, "bytes": size, "digest": f"{digest:016x}"})
        except OSError as error:
            self._fail(error)
            return
        self._images[path] = images

    def finish(self) -> bool:
        """Makes the cache valid; returns whether there is one now."""
        if self._temporary is None:
            return False
        manifest = {
            "schema": SCHEMA,
            "layout": LAYOUT,
            "ktrt": __version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "key": self._key.as_dict(),
            "images": self._images,
        }
        manifest["sha256"] = checksum_of(manifest)
        try:
            with os.fdopen(self._temporary.open(MANIFEST, _NEW), "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
            self._temporary.sync()
            self._root.remove_folder(self._folder.name)
            self._root.rename(self._temporary.path.name, self._folder.name)
            os.fsync(self._root.descriptor)
        except OSError as error:
            self._fail(error)
            return False
        self._temporary.close()
        self._temporary = None
        return True

    def _fail(self, error: OSError) -> None:
        _give_up(self._folder, _words(error), self._key)
        self.abort()

    def abort(self) -> None:
        """Removes an unfinished cache."""
        if self._temporary is not None:
            self._root.remove_folder(self._temporary.path.name)
            self._temporary.close()
            self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
        self._root.close()


def cache_folders(root: Path) -> list[Path]:
    """Returns the finished caches in ``root``, by name."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and _TEMPORARY not in p.name)


def unfinished(root: Path) -> list[Path]:
    """Returns the temporary folders in ``root`` that no living process writes."""
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
        # A file system without locks: each writer has a separate folder, and the last one wins.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _temporaries(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f"{glob.escape(folder.name)}{_TEMPORARY}*"))


def _written(folder: Path) -> int:
    """Returns the bytes in the temporary folders of a cache."""
    total = 0
    for temporary in _temporaries(folder):
        with contextlib.suppress(OSError):
            total += sum(file.stat().st_size for file in temporary.iterdir())
    return total


@contextlib.contextmanager
def opened(path: Path) -> Iterator[OwnedFolder]:
    """Opens the folder of a cache. ``NotTrustedError``, ``OSError``."""
    with OwnedFolder.root(path.parent) as root, root.folder(path.name) as folder:
        yield folder


def _is_trusted(root: Path) -> bool:
    try:
        OwnedFolder.root(root).close()
    except (NotTrustedError, OSError):
        return False
    return True


@contextlib.contextmanager
def _open_file(
    folder: OwnedFolder, name: str, flags: int = os.O_RDONLY, mode: int = 0o644
) -> Iterator[int]:
    descriptor = folder.open(name, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{error}" if str(error) else type(error).__name__


def _give_up(folder: Path, reason: str, key: CacheKey) -> None:
    logger.warning(
        "No pack cache: %.2f GB cannot be written to %s (%s). The experts are "
        "packed again at the next start. ktrt_cache_dir names another folder, ktrt_cache: false "
        "switches the cache off.",
        key.total_bytes / 1e9, folder.parent, reason,
    )  # fmt: skip
