#!/usr/bin/env python3
"""Measures load times of a model: packing it, from the pack cache, and reading the same bytes.

    python bench/make_v2lite.py /tmp/v2lite --layers 4
    python bench/load_times.py /tmp/v2lite [--cache /tmp/cache] [--backend AMXInt8] [--json]

Every start is a separate process. `cat` is `cat files > /dev/null` of the cache's images, which are
in the page cache by then. The cached start is repeated; the best one is compared with the best
`cat`. Peak is the largest resident set, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

RATE = re.compile(
    r"(?P<verb>Packed|Loaded) .*: (?P<gb>[\d.]+) GB in (?P<seconds>[\d.]+) s"
    r" \((?P<rate>[\d.]+) GB/s\)(, (?P<how>mapped|copied))?"
)


def child(folder: str, backend: str, cache: str) -> None:
    """Loads, answers one token, and prints the times."""
    start = time.perf_counter()
    import logging

    from ktrt.chat.__main__ import _open_session
    from ktrt.config import load_config

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ktrt").addHandler(handler)
    logging.getLogger("ktrt").setLevel(logging.INFO)
    imported = time.perf_counter()
    config = {"model_name_or_path": folder, "kt_backend": backend, "ktrt_cache_dir": cache}
    with _open_session(load_config(config)) as session:
        loaded = time.perf_counter()
        messages = [{"role": "user", "content": "你好"}]
        list(session.stream(messages, do_sample=False, max_new_tokens=1))
        first = time.perf_counter()
    found = next(match for line in lines if (match := RATE.match(line)))
    result = {
        "what": found["verb"].lower(),
        "how": found["how"] or "packed",
        "gb": float(found["gb"]),
        "experts_s": float(found["seconds"]),
        "gb_per_s": float(found["rate"]),
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_token_s": first - start,
        "peak_gb": peak_bytes() / 1e9,
    }
    print(json.dumps(result))


def peak_bytes() -> int:
    """Returns this process's peak; getrusage would include its parent's memory."""
    status = Path("/proc/self/status").read_text("utf-8")
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def start(folder: Path, backend: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), "--backend", backend, "--cache", str(cache)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    begin = time.perf_counter()
    output = subprocess.run(
        [*command, "--child"], check=True, stdout=subprocess.PIPE, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result | {"wall_s": time.perf_counter() - begin}


def cat(files: Sequence[Path]) -> dict[str, float]:
    begin = time.perf_counter()
    with open(os.devnull, "wb") as sink:  # noqa: PTH123
        subprocess.run(["cat", *map(str, files)], check=True, stdout=sink)
    seconds = time.perf_counter() - begin
    size = sum(f.stat().st_size for f in files)
    return {"gb": size / 1e9, "seconds": seconds, "gb_per_s": size / 1e9 / seconds}


def measure(folder: Path, backend: str, cache: Path, rounds: int) -> dict[str, Any]:
    first = start(folder, backend, cache)
    images = sorted(cache.glob("*/layer-*"))
    cats, cached = [], []
    for _ in range(rounds):
        cats.append(cat(images))
        cached.append(start(folder, backend, cache))
    best_cat = max(cats, key=lambda each: each["gb_per_s"])
    rate = max(float(each["gb_per_s"]) for each in cached)
    return {
        "backend": backend,
        "first": first,
        "cached": cached,
        "cat": cats,
        "cached_gb_per_s": rate,
        "cat_gb_per_s": best_cat["gb_per_s"],
        "share_of_cat": rate / best_cat["gb_per_s"],
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'':<14}{'experts s':>10}{'GB/s':>8}{'load s':>8}{'first token s':>15}{'peak GB':>9}")
    rows = [("first start", result["first"]), *(("cached", each) for each in result["cached"])]
    for name, row in rows:
        print(
            f"{name:<14}{row['experts_s']:>10.1f}{row['gb_per_s']:>8.2f}{row['load_s']:>8.2f}"
            f"{row['first_token_s']:>15.2f}{row['peak_gb']:>9.2f}  {row['how']}"
        )
    for each in result["cat"]:
        print(f"{'cat':<14}{each['seconds']:>10.2f}{each['gb_per_s']:>8.2f}")
    print(f"cached load: {result['share_of_cat']:.0%} of cat's rate")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Load times: packing, pack cache, cat.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="AMXBF16")
    parser.add_argument("--cache", type=Path, help="cache folder; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3, help="cached starts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(str(args.folder), args.backend, str(args.cache))
        return
    with tempfile.TemporaryDirectory() as temporary:
        cache = args.cache or Path(temporary)
        result = measure(args.folder, args.backend, cache, args.rounds)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    main()
