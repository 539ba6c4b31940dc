#!/usr/bin/env python3
"""Measures decode steps of many conversations with no, one and several adapters, on the CPU.

    python bench/make_v2lite.py DIR --layers 7          # 1 dense and 6 MoE layers, 8 GB
    python bench/batch_curve.py DIR --batches 1 2 4 8 16 32 64 --many --plot FILE.svg
    python bench/batch_curve.py DIR --many --docs "Emerald 2"   # the table and chart of docs/
    python bench/batch_curve.py --quick                 # the demo model, for a smoke test

Each conversation holds ``--context`` tokens. A step decodes one token of each: all on
the base, all on one adapter, or on ``--adapters`` adapters in turn. The three take turns with a
plain read of memory, in one process; ratios are medians over neighbouring turns.

The limit of a step is the bytes that it must read at the bandwidth of the same round: the distinct
experts that its rows chose, counted in that step, all other weights once, and the KV cache. An
adapter's bytes count as overhead. Sampling is not part of a step here. Next to it stands the time
that the rows' multiplications take at the arithmetic peak (``ktrt doctor``), and the roof of both:
the longer of reading and multiplying for the dense layers, plus that for the experts.

``--many``: also twelve adapters of rank 32 in one batch. With AMX the base is measured once more
with ``kt_fixed_kernels``, whose cost is printed; elsewhere it changes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a model on a GPU is bench/gpu/rows.py's
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from batch_report import Result, chart, tables, write_docs
from batch_rows import Rows
from cpu_decode import DEMO, PROBE_BYTES, write_adapter

from ktrt import _core
from ktrt.engine.probes import arithmetic_peaks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MANY, MANY_RANK = 12, 32
# The first steps of a batch record it, and touch new memory.
WARM_UP = 4
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Measurement:
    """The turns of one batch on one model."""

    def __init__(self, rows: Rows, probe: _core.ReadProbe, args: argparse.Namespace) -> None:
        self._rows, self._probe, self._args = rows, probe, args
        self._peaks = arithmetic_peaks(args.threads)

    def result(self, batch: int) -> Result:
        """Measures a batch; times are milliseconds per step."""
        self._rows.open(batch, self._args.context)
        kinds = self._kinds(batch)
        for adapters in kinds.values():
            self._turn(batch, adapters, WARM_UP)
        rounds = [self._round(batch, kinds, odd=bool(n % 2)) for n in range(self._args.rounds)]
        median = statistics.median
        found: Result = {"batch": batch}
        found["arithmetic_ms"] = 1e3 * sum(s for _, s in self._rows.parts(self._peaks))
        for kind in kinds:
            found[f"{kind}_ms"] = median(r[f"{kind}_ms"] for r in rounds)
            for name in ("experts", "gb", "limit_ms", "roof_ms"):
                found[f"{kind}_{name}"] = median(r[f"{kind}_{name}"] for r in rounds)
            for share, name in (("share", "limit_ms"), ("roof_share", "roof_ms")):
                ratios = (r[f"{kind}_{name}"] / r[f"{kind}_ms"] for r in rounds)
                found[f"{kind}_{share}"] = median(ratios)
        found["one_over_base"] = _ratio(rounds, "one_ms", "base_ms")
        for kind in kinds.keys() - {"base", "one"}:
            found[f"{kind}_over_one"] = _ratio(rounds, f"{kind}_ms", "one_ms")
        found["read_gb_per_s"] = median(r["read_gb_per_s"] for r in rounds)
        return found

    def _kinds(self, batch: int) -> dict[str, list[int]]:
        """Returns the adapter of each row, by what is measured."""
        few = [self._rows.number(f"r{n}") for n in range(self._args.adapters)]
        kinds = {"base": [self._rows.number(None)], "one": few[:1], "mixed": few}
        if self._args.many:
            kinds["many"] = [self._rows.number(f"many{n}") for n in range(MANY)]
        return {
            kind: list(itertools.islice(itertools.cycle(chosen), batch))
            for kind, chosen in kinds.items()
        }

    def _round(self, batch: int, kinds: Mapping[str, Sequence[int]], *, odd: bool) -> Result:
        """Takes the kinds in turn, those with adapters the other way round in odd rounds, with a
        read of memory around each."""
        base, *tuned = kinds
        found: Result = {}
        speeds = [self._bandwidth()]
        for kind in (base, *(reversed(tuned) if odd else tuned)):
            found[f"{kind}_ms"] = 1e3 * self._turn(batch, kinds[kind], self._args.tokens)
            speeds.append(self._bandwidth())
            parts, speed = self._rows.parts(self._peaks), statistics.mean(speeds[-2:])
            read = sum(size for size, _ in parts)
            found[f"{kind}_experts"], found[f"{kind}_gb"] = self._rows.distinct, read / 1e9
            found[f"{kind}_limit_ms"] = 1e3 * read / speed
            found[f"{kind}_roof_ms"] = 1e3 * sum(max(size / speed, s) for size, s in parts)
        found["read_gb_per_s"] = statistics.median(speeds) / 1e9
        return found

    def _turn(self, batch: int, adapters: Sequence[int], steps: int) -> float:
        ids = [self._rows.tokens(batch) for _ in range(steps)]
        return self._rows.seconds(ids, adapters)

    def _bandwidth(self) -> float:
        return self._probe.nbytes / self._probe.seconds(self._rows.loaded.engine)


def _ratio(rounds: Sequence[Result], above: str, below: str) -> float:
    """Returns the median of the ratios within a round and with the next one."""
    same = [r[above] / r[below] for r in rounds]
    return statistics.median(same + [a[above] / b[below] for a, b in itertools.pairwise(rounds)])


def fixed_cost(plain: Rows, fixed: Rows, batch: int, args: argparse.Namespace) -> float:
    """Returns how much longer a base step of ``fixed`` takes, as a share."""
    rounds: list[Result] = []
    parties = {"plain": plain, "fixed": fixed}
    for rows in parties.values():
        rows.open(batch, args.context)
        rows.seconds([rows.tokens(batch)] * WARM_UP, [rows.number(None)] * batch)
    for _ in range(args.rounds):
        ids = [plain.tokens(batch) for _ in range(args.tokens)]
        base = [plain.number(None)] * batch
        rounds.append({name: rows.seconds(ids, base) for name, rows in parties.items()})
    return _ratio(rounds, "fixed", "plain") - 1


def measure(args: argparse.Namespace, backend: str, adapters: Mapping[str, Path]) -> list[Result]:
    settings: dict[str, object] = {"ktrt_cache_dir": args.cache} if args.cache else {}
    rows = Rows(args.folder, backend, adapters, **settings)
    probe = _core.ReadProbe(PROBE_BYTES)
    args.threads = rows.loaded.engine.num_threads
    try:
        each = Measurement(rows, probe, args)
        results = []
        for batch in args.batches:
            results.append(each.result(batch))
            ms, share, roof = (results[-1][f"base_{n}"] for n in ("ms", "share", "roof_share"))
            text = f"base {ms:.1f} ms, {share:.0%} of the read, {roof:.0%} of the roof"
            print(f"{backend}, {batch}: {text}", file=sys.stderr)
        if _core.isa() == "amx":
            fixed = Rows(args.folder, backend, {}, kt_fixed_kernels=True, **settings)
            for result in results:
                result["fixed_cost"] = fixed_cost(rows, fixed, int(result["batch"]), args)
            fixed.close()
    finally:
        rows.close()
    return results


def write_adapters(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Writes random adapters; returns their folders by name."""
    wanted = {f"r{n}": args.rank for n in range(args.adapters)}
    if args.many:
        wanted |= {f"many{n}": MANY_RANK for n in range(MANY)}
    return {
        name: write_adapter(args.folder, folder / name, rank, seed)
        for seed, (name, rank) in enumerate(wanted.items())
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode steps of many conversations on the CPU.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--backends", nargs="+", default=["AMXBF16", "INT8"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4, help="adapters of a mixed batch")
    parser.add_argument("--many", action="store_true", help=f"also {MANY} of r {MANY_RANK}")
    parser.add_argument("--context", type=int, default=256, help="tokens of each conversation")
    parser.add_argument("--tokens", type=int, default=2, help="steps per turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache", help="folder of the pack cache; default: ktrt's own")
    parser.add_argument("--quick", action="store_true", help="few rounds, small batches")
    parser.add_argument("--json", action="store_true", help="print all figures")
    parser.add_argument("--markdown", action="store_true", help="print the tables alone")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write a chart")
    parser.add_argument("--docs", metavar="MACHINE", help="write docs/performance.md and its chart")
    parser.add_argument("--from-json", type=Path, help="take the figures of an earlier --json")
    args = parser.parse_args(argv)
    if args.plot is not None and args.plot.suffix != ".svg":
        parser.error(f"--plot {args.plot}: expected the name of an .svg file")
    if min(*args.batches, args.adapters, args.rank, args.rounds, args.tokens) < 1:
        parser.error("batches, adapters, rank, rounds and tokens are 1 or more")
    if args.quick:
        args.backends, args.batches = args.backends[:1], [1, 2, 4]
        args.rounds, args.tokens, args.context = 2, 1, 16
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        adapters = write_adapters(args, Path(temporary))
        for backend in args.backends:
            results[backend] = measure(args, backend, adapters)
    names = ("threads", "context", "adapters", "rank", "rounds")
    return {
        **{name: getattr(args, name) for name in names},
        "many_adapters": MANY,
        "many_rank": MANY_RANK,
        "kernels": _core.kernels(),
        "isa": _core.isa(),
        "results": results,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    report = json.loads(args.from_json.read_text("utf-8")) if args.from_json else run(args)
    if args.plot is not None:
        args.plot.write_text(chart(report), "utf-8")
    if args.docs:
        write_docs(report, args.docs)
    if args.json:
        print(json.dumps(report))
        return
    if not args.markdown:
        print(
            f"{report['threads']} threads, {report['isa']}; {report['context']} tokens of context, "
            f"adapters of r {report['rank']}"
        )
        if report["isa"] != "amx":
            print("kt_fixed_kernels changes nothing: without AMX kernels are always fixed")
    print(tables(report))


if __name__ == "__main__":
    main()
