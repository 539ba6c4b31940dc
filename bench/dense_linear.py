#!/usr/bin/env python3
"""Times a dense BF16 linear layer of the engine next to torch's, by the number of rows.

    python bench/dense_linear.py [--shapes 2048x2048 …] [--rows 1 4 16 64 512] [--json]

A shape is in_features x out_features. As many layers as are beyond the caches take turns, so that
weights come from memory; the engine and torch alternate, with a plain read of the memory between
them, and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from ktrt import _core
from ktrt.engine.threads import num_threads
from ktrt.engine.torch_threads import set_torch_threads

if TYPE_CHECKING:
    from collections.abc import Callable

BYTES = 512 << 20
SHAPES = ("2048x2048", "2048x10944", "7168x2048")
ROWS = (1, 4, 8, 16, 64, 512)


class Figures(NamedTuple):
    shape: str
    rows: int
    ms: float
    gflops: float
    of_read: float
    times_torch: float


def seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(
    engine: _core.Engine, probe: _core.ReadProbe, shape: str, rows: int, rounds: int
) -> Figures:
    """Returns figures of one shape and number of rows."""
    inputs, outputs = (int(size) for size in shape.split("x"))
    count = max(1, BYTES // (inputs * outputs * 2))
    weights = [torch.randn(outputs, inputs).mul_(0.02).bfloat16() for _ in range(count)]
    layers = [_core.DenseLinear(engine, weight) for weight in weights]
    x, out = torch.randn(rows, inputs).bfloat16(), torch.empty(rows, outputs).bfloat16()

    def ours() -> None:
        for layer in layers:
            layer.forward(x.data_ptr(), x.numel(), out.data_ptr(), out.numel())

    def torchs() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    found: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        read = probe.seconds(engine) / probe.nbytes * inputs * outputs * 2
        found.append((seconds(ours) / count, seconds(torchs) / count, read))
    del found[0]  # a warm-up
    mine = statistics.median(each for each, _, _ in found)
    return Figures(
        shape, rows, 1e3 * mine, 2e-9 * rows * inputs * outputs / mine,
        of_read=statistics.median(read / each for each, _, read in found),
        times_torch=statistics.median(other / each for each, other, _ in found),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all figures")
    args = parser.parse_args()
    set_torch_threads(args.threads)
    engine, probe = _core.Engine(num_threads=args.threads), _core.ReadProbe(256 << 20)
    probe.seconds(engine)
    found = [
        measure(engine, probe, shape, rows, args.rounds)
        for shape in args.shapes
        for rows in args.rows
    ]
    if args.json:
        results = [figures._asdict() for figures in found]
        report = {"isa": _core.isa(), "threads": args.threads, "results": results}
        print(json.dumps(report, indent=1))
        return
    print(f"{_core.isa()}, {args.threads} threads")
    print("shape         rows       ms  GFLOP/s  of read  torch")
    for r in found:
        print(
            f"{r.shape:<13} {r.rows:>4} {r.ms:>8.3f} {r.gflops:>8.0f} {r.of_read:>8.0%} "
            f"{r.times_torch:>5.2f}×"
        )


if __name__ == "__main__":
    main()
