"""Fills the engine's layers from the pack cache, from kt_kernel's files, or by packing."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt.engine import release_file_pages
from ktrt.engine.formats import joined
from ktrt.errors import CheckpointError, ConfigError
from ktrt.loading.pack_cache import PackCache, default_folder
from ktrt.loading.pack_manifest import INT4_SEARCH, CacheKey
from ktrt.utils.fingerprint import fingerprint
from ktrt.utils.progress import byte_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ktrt.checkpoint.experts import ExpertWeights
    from ktrt.checkpoint.folder import Checkpoint
    from ktrt.checkpoint.kt_files import KtWeights
    from ktrt.config import ExpertArgs
    from ktrt.engine import MoeLayer
    from ktrt.experts import ExpertsSpec
    from ktrt.loading.pack_cache import CacheWriter
    from ktrt.utils.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

_OFF = ("0", "off", "false", "no")


@dataclass(frozen=True)
class ExpertSource:
    """The routed experts of a checkpoint; ``weights`` locates each layer's by module path."""

    checkpoint: Checkpoint
    specs: Sequence[ExpertsSpec]
    weights: Mapping[str, ExpertWeights]

    def files(self) -> list[Path]:
        """Returns the weight files, with symbolic links resolved."""
        found = {self.checkpoint.file(name) for name in self.checkpoint.names()}
        return sorted(path.resolve() for path in found)


def cache_folder(
    args: ExpertArgs, environ: Mapping[str, str] = os.environ, *, quiet: bool = False
) -> Path | None:
    """Returns the folder of packed experts: ``ktrt_cache_dir``, else KTRT_CACHE_DIR, else
    ~/.cache/ktrt. None if ``ktrt_cache: false`` or KTRT_CACHE=0 switches the cache off, or, with a
    log line unless ``quiet``, if the user has no home."""
    if not args.ktrt_cache or environ.get("KTRT_CACHE", "").lower() in _OFF:
        return None
    if args.ktrt_cache_dir is not None:
        return _expanded(args.ktrt_cache_dir)
    if given := environ.get("KTRT_CACHE_DIR"):
        return _expanded(Path(given))
    folder = default_folder()
    if folder is None and not quiet:
        logger.warning(
            "No pack cache: this user has no home folder. The experts are packed at every start; "
            "ktrt_cache_dir or KTRT_CACHE_DIR names a folder for them."
        )
    return folder


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"The cache folder {path} names a home folder that is unknown."
        ) from error


def seems_cached(root: Path, source: ExpertSource, layers: Mapping[str, MoeLayer]) -> bool:
    """Returns whether there is a cache for these layers, which may be outdated. Reads no file."""
    return (root / _key(source, layers, []).folder_name).is_dir()


def cache_of(root: Path, source: ExpertSource, layers: Mapping[str, MoeLayer]) -> PackCache:
    """Returns the cache in ``root`` for these layers. ``CheckpointError``: an unreadable file."""
    # config.json gives the tensors their meaning.
    files = [*source.files(), source.checkpoint.folder.resolve() / "config.json"]
    return PackCache(root, _key(source, layers, fingerprint(files)))


def _key(source: ExpertSource, layers: Mapping[str, MoeLayer], files: Fingerprint) -> CacheKey:
    def searched(item: tuple[str, MoeLayer]) -> bool:
        path, layer = item
        stored = source.weights[path].coded if path in source.weights else None
        return layer.weight_format.startswith("int4_g") and layer.weight_format != stored

    return CacheKey(
        source=str(source.checkpoint.folder.resolve()),
        weight_format=joined(layer.weight_format for layer in layers.values()),
        layers={path: list(layer.image_bytes) for path, layer in layers.items()},
        files=files,
        int4_search=INT4_SEARCH if any(map(searched, layers.items())) else 0,
    )


def load_experts(
    source: ExpertSource,
    layers: Mapping[str, MoeLayer],
    root: Path | None,
    kt_weights: KtWeights | None = None,
) -> None:
    """Loads all experts into ``layers`` (by module path). ``root``: the cache's folder, None: no
    cache. ``kt_weights``: kt_kernel's files, used instead of the checkpoint's experts."""
    if kt_weights is not None:
        _load(source, layers, "Loaded", lambda spec, expert: layers[spec.path].load_packed_expert(
            expert, *kt_weights.read(spec, expert)), kt_weights.files)  # fmt: skip
        # A flipped bit in a code makes another valid weight.
        logger.info(
            "The files of kt_weight_path carry no checksums: damage is noticed in sizes, names and "
            "scales only. Keep sha256sum's output with them, or use the checkpoint: ktrt checks "
            "its pack cache at every start."
        )
        return
    if root is None:
        pack_experts(source, layers)
        return
    cache = cache_of(root, source, layers)
    if _load_cached(cache, layers, source.specs):
        return
    with cache.lock() as may_write:
        if _load_cached(cache, layers, source.specs):
            return
        writer = cache.writer() if may_write else None
        if writer is None:
            pack_experts(source, layers)
            return
        with writer:
            pack_experts(source, layers, writer)
            finish(writer, cache)


def _load_cached(
    cache: PackCache, layers: Mapping[str, MoeLayer], specs: Sequence[ExpertsSpec]
) -> bool:
    start = time.perf_counter()
    how = cache.load(layers)
    if how is None:
        return False
    size = sum(layer.packed_bytes for layer in layers.values())
    _log_rate(f"Loaded {_count(specs)} from the pack cache", size, start, f", {how}")
    return True


def finish(writer: CacheWriter, cache: PackCache) -> None:
    """Completes the cache and logs its folder."""
    start = time.perf_counter()
    if writer.finish():
        seconds = time.perf_counter() - start
        logger.info("Wrote the pack cache %s (%.1f s on the disk)", cache.folder, seconds)


def pack_experts(
    source: ExpertSource,
    layers: Mapping[str, MoeLayer],
    writer: CacheWriter | None = None,
    done: Callable[[str], object] = lambda _path: None,
) -> None:
    """Packs the checkpoint's experts layer by layer; calls ``done(path)`` after each."""

    def load(spec: ExpertsSpec, expert: int) -> None:
        _pack(layers[spec.path], source.weights[spec.path], expert)

    def after(path: str) -> None:
        if writer is not None:
            writer.add(path, layers[path])
        done(path)

    _load(source, layers, "Packed", load, source.files(), after)


def _pack(layer: MoeLayer, weights: ExpertWeights, expert: int) -> None:
    """Packs an expert as it is stored if that is the layer's format, else from its numbers.
    ``CheckpointError``: numbers that are not finite."""
    try:
        if layer.weight_format != weights.coded:
            layer.load_expert(expert, *weights.read(expert))
            return
        gate, up, down = weights.read_codes(expert)
        layer.load_coded_expert(expert, gate.pair if gate else None, up.pair, down.pair)
    except ValueError as error:
        raise CheckpointError(
            f"{weights.where(expert)}: {error}. Download or copy the file again."
        ) from error


def _load(
    source: ExpertSource,
    layers: Mapping[str, MoeLayer],
    verb: str,
    load: Callable[[ExpertsSpec, int], None],
    files: Iterable[Path],
    after: Callable[[str], None] = lambda _path: None,
) -> None:
    """Loads expert by expert. Gives the pages of ``files`` back after every layer, so that at most
    one layer of them counts as this process's memory."""
    start = time.perf_counter()
    sizes = {path: layer.packed_bytes for path, layer in layers.items()}
    with byte_progress(f"{verb.removesuffix('ed')}ing experts", sum(sizes.values())) as advance:
        for spec in source.specs:
            for expert in range(spec.num_experts):
                load(spec, expert)
                advance(sizes[spec.path] / spec.num_experts)
            for file in files:
                release_file_pages(str(file))
            after(spec.path)
    _log_rate(f"{verb} {_count(source.specs)}", sum(sizes.values()), start)


def _count(specs: Sequence[ExpertsSpec]) -> str:
    return f"{sum(spec.num_experts for spec in specs)} experts of {len(specs)} layers"


def _log_rate(what: str, size: int, start: float, more: str = "") -> None:
    seconds = time.perf_counter() - start
    gigabytes = size / 1e9
    logger.info(
        "%s: %.2f GB in %.1f s (%.2f GB/s)%s", what, gigabytes, seconds, gigabytes / seconds, more
    )
