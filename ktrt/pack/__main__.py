"""``python -m ktrt.pack config.yaml``: packs a model's experts in advance; manages the cache."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktrt.command_line import new_parser, parse, run_command, set_environment
from ktrt.config import load_config
from ktrt.errors import ConfigError, KtrtError
from ktrt.loading.pack_cache import (
    cache_folders,
    default_folder,
    opened,
    unfinished,
)
from ktrt.loading.pack_manifest import DAMAGE, LAYOUT, read_manifest
from ktrt.utils.fingerprint import fingerprint
from ktrt.utils.owned_folder import NotTrustedError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ktrt.config import Config
    from ktrt.loading.pack_manifest import Manifest

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 after a failure, 130 after Ctrl-C."""
    args = _parse_arguments(argv)

    def body() -> int:
        set_environment()
        if args.list:
            show(entries(_folder(args)), as_json=args.json)
        elif args.prune:
            prune(_folder(args), everything=args.all)
        else:
            pack(load_config(args.config, args.overrides))
        return 0

    return run_command(body, args, level=logging.WARNING if args.quiet else logging.INFO)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "pack", "Packs a model's routed experts into the cache, so that the chat starts fast."
    )
    parser.add_argument("--list", action="store_true", help="show what is in the cache")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    parser.add_argument(
        "--prune", action="store_true", help="remove what is outdated, damaged or incomplete"
    )
    parser.add_argument("--all", action="store_true", help="with --prune: remove everything")
    parser.add_argument("--dir", type=Path, help="with --list and --prune: the cache's folder")
    parser.add_argument("-q", "--quiet", action="store_true", help="show warnings only")
    args = parse(parser, argv)
    if (args.config is None) != (args.list or args.prune):
        parser.error("expected a config file, or --list, or --prune")
    return args


def _folder(args: argparse.Namespace) -> Path:
    given = args.dir or os.environ.get("KTRT_CACHE_DIR")
    folder = Path(os.path.expanduser(given)) if given else default_folder()  # noqa: PTH111
    if folder is None:
        raise ConfigError("this user has no home folder for a cache: name one with --dir")
    return folder


def pack(config: Config) -> None:
    """Packs the experts of a model, with one layer in memory at a time.

    ``ConfigError``: the cache is switched off or cannot be written, or kt_weight_path is set.
    """
    from ktrt.engine.build import build_engine
    from ktrt.loading.experts import (
        cache_folder,
        cache_of,
        finish,
        pack_experts,
    )
    from ktrt.loading.formats import choose_formats
    from ktrt.loading.plan import new_layers, open_base

    args = config.experts
    if args.kt_weight_path is not None:
        raise ConfigError("kt_weight_path: these experts are packed already, there is no cache")
    if (root := cache_folder(args)) is None:
        # A missing home folder has been logged.
        raise ConfigError(
            "no pack cache: it is switched off (ktrt_cache or KTRT_CACHE), or has no folder"
        )
    source = open_base(config.model).experts
    formats = choose_formats(args.kt_backend, source)
    for note in formats.notes:
        logger.info("%s", note)
    engine = build_engine(args, formats.by_path.values())
    try:
        layers = new_layers(engine, source.specs, formats)
        cache = cache_of(root, source, layers)
        with cache.lock() as may_write:
            if reason := cache.mismatch():
                print(f"{cache.folder}: {reason}")
            else:
                print(f"{cache.folder} is there already")
                return
            writer = cache.writer() if may_write else None
            if writer is None:
                raise ConfigError(f"no pack cache can be written to {root}")
            with writer:
                # A layer frees its memory once it is written.
                pack_experts(source, layers, writer, done=layers.pop)
                finish(writer, cache)
            if cache.mismatch():
                raise ConfigError(f"the pack cache could not be written to {root}")
    finally:
        engine.close()


def entries(root: Path) -> list[dict[str, Any]]:
    """Lists the cache folder: size, source and state of each entry."""
    found = []
    for folder in cache_folders(root):
        entry: dict[str, Any] = {"folder": str(folder), "bytes": _size(folder)}
        try:
            with opened(folder) as held:
                manifest = read_manifest(held)
            key = manifest["key"]
            entry |= {
                "source": key["source"],
                "weight_format": key["weight_format"],
                "layers": len(key["layers"]),
                "parts": len(next(iter(key["layers"].values()))),
                "created": manifest["created"],
                "state": _state(manifest),
            }
        except NotTrustedError as error:
            entry["state"] = f"not used: {error}"
        except (*DAMAGE, StopIteration, KeyError, TypeError) as error:
            entry["state"] = f"damaged: {error}"
        found.append(entry)
    found += [
        {"folder": str(folder), "bytes": _size(folder), "state": "incomplete"}
        for folder in unfinished(root)
    ]
    return found


def _state(manifest: Manifest) -> str:
    key = manifest["key"]
    source = Path(key["source"])
    if manifest["layout"] != LAYOUT:
        return f"outdated: layout {manifest['layout']}"
    if not source.is_dir():
        return "the model is gone"
    try:
        same = fingerprint(source / each["name"] for each in key["files"]) == key["files"]
    except KtrtError:
        same = False
    return "current" if same else "outdated: the model's files have changed"


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:  # another user's
        return 0


def show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    """Prints entries."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for entry in found:
        print(f"{entry['bytes'] / 1e9:8.2f} GB  {entry['state']:<10}  {entry['folder']}")
        if "source" in entry:
            parts = f", {entry['parts']} NUMA parts" if entry["parts"] > 1 else ""
            print(
                f"{'':13}{entry['weight_format']} experts of {entry['layers']} layers{parts} of "
                f"{entry['source']}, {entry['created']}"
            )
    total = sum(entry["bytes"] for entry in found)
    print(f"{total / 1e9:8.2f} GB in {len(found)} entries")


def prune(root: Path, *, everything: bool) -> None:
    """Removes the entries that are not current, or all."""
    kept = 0
    for entry in entries(root):
        if entry["state"] == "current" and not everything:
            kept += 1
            continue
        shutil.rmtree(entry["folder"])
        print(f"removed {entry['folder']} ({entry['bytes'] / 1e9:.2f} GB, {entry['state']})")
    print(f"{kept} entries kept")


if __name__ == "__main__":
    sys.exit(main())
