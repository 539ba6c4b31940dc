#!/usr/bin/env python3
"""Compares one MoE layer in kt_kernel and in ktrt on this machine.

    python bench/kt_kernel/compare.py [--quick] [--json] [--threads N]

Both get the same random weights, the same routing and the same number of threads. Within one run
the parties alternate: a plain read of memory (the limit of decoding), ktrt, kt_kernel, and
PyTorch's BF16 linear on the same shapes (oneDNN: a limit of prefilling). Every ratio is the median
of the ratios of neighbouring measurements: a shared machine's bandwidth swings within seconds.
Several layers are cycled so that caches do not help. Every dtype (without --quick, every rank
too) runs in a separate process, because kt_kernel leaks packed weights.

ms are per layer; GB/s counts the distinct experts' weights plus their LoRA; relerr is
‖y − y_float32‖ / ‖y_float32‖ over 64 tokens; LoRA cost is ktrt's time over its base's time,
from neighbouring measurements.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = ("bf16", "int8")
# Their classes in kt_kernel are compared without LoRA.
CODED = ("fp8", "int4_g32", "mxfp4")
RANKS = (0, 8, 64)
QLENS = (1, 4, 16, 64, 256, 1024)
QUICK_RANKS = (0, 8)
QUICK_QLENS = (1, 256)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 and 256 tokens, rank 0 and 8")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--threads", type=int, default=0, help="default: as an engine chooses")
    parser.add_argument("--layers", type=int, default=3, help="distinct layers to cycle")
    parser.add_argument(
        "--dtypes",
        default=",".join(DTYPES),
        help="bf16,int8; int4, and without LoRA fp8, int4_g32, mxfp4",
    )
    parser.add_argument("--ranks", default="")
    parser.add_argument("--qlens", default="")
    parser.add_argument(
        "--rounds", type=int, default=0, help="default: 15 to 31 by size, 5 and 3 with --quick"
    )
    parser.add_argument(
        "--zipf", action="store_true", help="skewed routing: the n-th expert with weight 1/n"
    )
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ranks = args.ranks or ",".join(map(str, QUICK_RANKS if args.quick else RANKS))
    args.qlens = args.qlens or ",".join(map(str, QUICK_QLENS if args.quick else QLENS))
    return args


def run_children(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    machine: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    # With all ranks at once kt_kernel's leaked copies take 20 GB in BF16.
    groups = [args.ranks] if args.quick else args.ranks.split(",")
    for dtype, ranks in itertools.product(args.dtypes.split(","), groups):
        if dtype in CODED:
            if ranks != groups[0]:
                continue
            ranks = "0"
        for answer in run_child(args, dtype, ranks):
            if not machine and not args.json:
                print_head(answer["machine"])
            machine = machine or answer["machine"]
            rows.append(answer["row"])
            if not args.json:
                print_row(answer["row"])
    return machine, rows


def run_child(args: argparse.Namespace, dtype: str, ranks: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of one process as they are measured."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", dtype]
    command += ["--ranks", ranks, "--qlens", args.qlens, "--layers", str(args.layers)]
    command += ["--threads", str(args.threads), "--rounds", str(args.rounds)]
    command += [flag for flag in ("--quick", "--zipf") if getattr(args, flag[2:])]
    # OpenMP's idle threads would spin on the cores that the engines are measured on.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode != 0:
        raise SystemExit(f"{dtype}: exit code {child.returncode}")


def print_head(machine: dict[str, Any]) -> None:
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    print(
        f"{'':>12}{'qlen':>6}{'ktrt ms':>10}{'kt ms':>10}{'ratio':>7}{'GB/s':>7}"
        f"{'GFLOP/s':>9}{'of read':>9}{'of oneDNN':>11}{'LoRA cost':>11}{'ktrt err':>10}"
        f"{'kt err':>9}"
    )


def print_row(row: dict[str, Any]) -> None:
    onednn = f"{row['onednn_fraction']:.2f}" if row["onednn_fraction"] is not None else "-"
    lora_cost = f"{row['lora_cost']:+.1%}" if row["rank"] else "-"
    print(
        f"{row['method']:>12}{row['qlen']:>6}{row['ktrt_ms']:>10.2f}{row['kt_ms']:>10.2f}"
        f"{row['ratio']:>7.2f}{row['ktrt_gbs']:>7.1f}{row['ktrt_gflops']:>9.0f}"
        f"{row['bandwidth_fraction']:>9.2f}"
        f"{onednn:>11}{lora_cost:>11}"
        f"{row['ktrt_relerr']:>10.5f}{row['kt_relerr']:>9.5f}",
        flush=True,
    )


def main() -> int:
    args = parse()
    if args.child:
        # kt_kernel prints to stdout from C++; the answer goes out through a saved descriptor.
        answer_fd = os.dup(1)
        os.dup2(2, 1)
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from measure import measure  # torch and both engines: only in the child

        answers = measure(
            args.child,
            [int(rank) for rank in args.ranks.split(",")],
            [int(qlen) for qlen in args.qlens.split(",")],
            layers=args.layers,
            threads=args.threads,
            rounds=args.rounds,
            quick=args.quick,
            zipf=args.zipf,
        )
        with os.fdopen(answer_fd, "w") as out:
            for answer in answers:
                print(json.dumps(answer), file=out, flush=True)
        sys.stderr.flush()
        os._exit(0)  # kt_kernel's destructors are slow and noisy
    machine, rows = run_children(args)
    if args.json:
        json.dump({"machine": machine, "rows": rows}, sys.stdout, indent=1)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
