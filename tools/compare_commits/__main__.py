"""Compares two commits: the bits of the demo model's logits, and the speed of the benches.

    python -m tools.compare_commits OLD [NEW] [--check bits|speed|all] [--json]

Needs scikit-build-core, pybind11, cmake and ninja in the environment; each commit is built (a few
minutes; ``--builds FOLDER`` keeps the results). Bits: base, both demo adapters, their weighted sum,
and a batch of all, in every weight format and on every ISA of this machine; each commit computes in
its own processes. Speed: `bench/cpu_decode.py` and the comparison with kt_kernel, the commits by
turns. Exit code 1: some bits differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.compare_commits import speed
from tools.compare_commits.builds import Build, built, run, title_of
from tools.compare_commits.differences import (
    BitsRow,
    SpeedRow,
    bits_rows,
    missing_names,
    speed_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORKER = Path(__file__).with_name("logits.py")


def compare_bits(builds: Sequence[Build], work: Path, isas: Sequence[str]) -> Iterator[BitsRow]:
    """Rows of each ISA as soon as both commits have computed on it."""
    demo = builds[0].source / "examples/demo"
    for isa in isas:
        print(f"computing on {isa}", file=sys.stderr, flush=True)
        files = [work / f"logits-{number}.npz" for number in range(len(builds))]
        for build, file in zip(builds, files, strict=True):
            worker(build, "--demo", str(demo), "--out", str(file), KTRT_ISA=isa)
        old, new = (dict(np.load(file)) for file in files)
        yield from bits_rows(isa, old, new)


def worker(build: Build, *options: str, **variables: str) -> str:
    """Runs the worker on the CPU, whatever GPUs there are."""
    command = [sys.executable, str(WORKER), "--site", str(build.site), *options]
    environment = build.environment(CUDA_VISIBLE_DEVICES="", **variables)
    return run(command, env=environment, cwd=build.source.parent)


def chosen_isas(builds: Sequence[Build], asked: Sequence[str] | None) -> list[str]:
    """Returns the ISAs that were asked for, by default all of this machine."""
    known = worker(builds[0], "--isas").split()
    for isa in asked or []:
        if isa not in known:
            raise SystemExit(f"--isas {isa}: this machine has {', '.join(known)}")
    return list(asked or known)


def show_bits(rows: Sequence[BitsRow]) -> None:
    print(f"\n{'ISA':<10}{'format':<19}{'adapter':<11}bits")
    for row in rows:
        print(f"{row.isa:<10}{row.format:<19}{row.adapter:<11}{first_of(row)}")
    different = sum(row.difference is not None for row in rows)
    print(f"{different} of {len(rows)} rows differ" if different else f"all {len(rows)} rows equal")


def first_of(row: BitsRow) -> str:
    """The first forward that differs; all of them are in the JSON."""
    if row.difference is None:
        return "equal"
    first, *others = row.difference.split("; ")
    return first + (f" … and in {len(others)} more" if others else "")


def show_speed(rows: Sequence[SpeedRow]) -> None:
    head = f"median of {rows[0].rounds} rounds"
    print(f"\n{head:<44}{'old':>10}{'new':>10}{'ratio':>8}")
    for row in rows:
        mark = ("  slower" if row.ratio > 1 else "  faster") if row.flagged else ""
        print(f"{row.name:<44}{row.old:>10.3f}{row.new:>10.3f}{row.ratio:>8.3f}{mark}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_commits", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD", help="default: HEAD")
    parser.add_argument("--check", choices=["bits", "speed", "all"], default="bits")
    parser.add_argument("--isas", nargs="+", help="default: all of this machine")
    parser.add_argument("--rounds", type=int, default=5, help="of both commits, for speed")
    parser.add_argument("--model", type=Path, help="model of cpu_decode; default: the demo's")
    parser.add_argument("--quick", action="store_true", help="short rounds, for a smoke test")
    parser.add_argument("--builds", type=Path, help="folder that keeps installed commits")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    bits: list[BitsRow] = []
    speeds: list[SpeedRow] = []
    missing: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="ktrt-compare-") as temporary,
        built([args.old, args.new], Path(temporary), args.builds) as builds,
    ):
        work = Path(temporary)
        commits = [title_of(build.commit) for build in builds]
        if args.check in {"bits", "all"}:
            bits = list(compare_bits(builds, work, chosen_isas(builds, args.isas)))
        if args.check in {"speed", "all"}:
            model = args.model.resolve() if args.model else None
            old, new = speed.measure(builds, args.rounds, model, quick=args.quick)
            speeds, missing = speed_rows(old, new), missing_names(old, new)
    if args.json:
        answer = {
            "commits": commits,
            "bits": [dataclasses.asdict(row) for row in bits],
            "speed": [dataclasses.asdict(row) for row in speeds],
            "not_compared": missing,
        }
        json.dump(answer, sys.stdout, indent=1)
        print()
    else:
        print(f"old: {commits[0]}\nnew: {commits[1]}")
        if bits:
            show_bits(bits)
        if speeds:
            show_speed(speeds)
        for name in missing:
            print(f"{name}: not measured in every round of both")
    return int(any(row.difference for row in bits))


if __name__ == "__main__":
    sys.exit(main())
