#!/usr/bin/env python3
"""Decode steps of published families on a GPU, loaded as the chat loads them.

    python bench/gpu/families.py [SHAPE …] [--layers 8] [--lengths 1024,8192] [--keep DIR] [--json]

Each shape has a family's published sizes with fewer layers and experts (a token reads as many as it
does there), random weights and INT8 experts, and is warmed up as the chat is. The bound of a step
is the bytes of its experts over the read bandwidth of the same run. A "first prompt" is the first
of its length. "Error": the logits of a step by the graph, relative to the plain forward's logits of
the same token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from make_v2lite import make_model
from shapes import SHAPES

from ktrt import _core
from ktrt.config import load_config
from ktrt.generate.warm_up import warm_up
from ktrt.loading.inventory import loaded_inventory
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_BYTES = 1 << 30
LIMIT = 32_768  # tokens, for the warm-up
# Experts of a layer: more than the processor's caches hold, few enough to be written in seconds.
EXPERTS = {"gpt_oss": 8, "mimo_v2_flash": 8, "deepseek_v3": 8}
MOST_EXPERTS = 32


def measure(folder: Path, lengths: Sequence[int], steps: int) -> dict[str, Any]:
    config = load_config({"model_name_or_path": str(folder), "kt_backend": "AMXInt8"})
    loaded = load_model(config.model, config.adapter, config.experts)
    try:
        experts = sum(row.read for row in loaded_inventory(loaded.model).experts.values())
        probe = _core.ReadProbe(PROBE_BYTES)
        rate = probe.nbytes / statistics.median(probe.seconds(loaded.engine) for _ in range(5))
        found: dict[str, Any] = {"bound_ms": experts / rate * 1e3, "gb_per_s": rate / 1e9}
        warm_up(loaded.new_cache(), LIMIT)
        for length in lengths:
            cache = loaded.new_cache()
            found[f"first prompt {length}"] = prompt_seconds(cache, length, 7)
            found[f"prompt {length}"] = prompt_seconds(cache, length, 11)
            times = []
            for token in range(steps):
                begin = time.perf_counter()
                cache.forward([50 + token]).argmax().item()
                times.append((time.perf_counter() - begin) * 1e3)
            found[f"ms {length}"] = statistics.median(times[4:])
            found[f"longest {length}"] = max(times[4:])
        found["graphs"] = bool(loaded.runner.has_graphs)
        found["error"] = error_of(loaded)
    finally:
        loaded.close()
    return found


def prompt_seconds(cache: Any, length: int, step: int) -> float:
    ids = [100 + i * step % 900 for i in range(length)]
    begin = time.perf_counter()
    cache.reuse(ids[:1])
    while cache.length < length:
        cache.forward(ids[cache.length :][: cache.prefill_chunk(length - cache.length)])
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def error_of(loaded: Any) -> float:
    """Returns the relative difference of a graph's logits from the plain forward's."""
    ids, token = [100 + i * 3 % 700 for i in range(300)], [77]
    logits = []
    for graph in (True, False):
        cache = loaded.new_cache()
        cache.forward(ids[cache.reuse(ids) :])
        if graph:
            cache.forward([33])
            cache.forward([44])
            logits.append(cache.forward(token))
        else:
            # Two tokens at once have no graph; their last logits are the same token's.
            cache.forward([33])
            logits.append(cache.forward([44, *token]))
    return float((logits[0].float() - logits[1].float()).norm() / logits[1].float().norm())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode steps of published families on a GPU.")
    parser.add_argument("shapes", nargs="*", default=[], metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", default="1024,8192")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    lengths = [int(each) for each in args.lengths.split(",")]
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for shape in args.shapes or SHAPES:
            folder = (args.keep or Path(temporary)) / f"{shape}-{args.layers}"
            if not (folder / "model.safetensors.index.json").exists():
                make_model(folder, shape, args.layers, EXPERTS.get(shape, MOST_EXPERTS))
            try:
                results[shape] = measure(folder, lengths, args.steps)
            except Exception as error:  # noqa: BLE001 - the other families are measured all the same
                results[shape] = {"failed": f"{type(error).__name__}: {error}"}
            if not args.json:
                print(shape, json.dumps(results[shape]), flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
