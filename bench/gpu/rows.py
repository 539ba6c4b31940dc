"""Checks and measures decode steps of many rows with separate adapters, on a GPU.

    python bench/gpu/rows.py                 # V2-Lite's shape, 9 layers, BF16 and INT8, about 3 min
    python bench/gpu/rows.py --small         # a trial of this script, without a GPU too

All but the routed experts is on the GPU, with LoRA of r 8 on everything, experts included; weights
are random and made in place. First the checks: four rows with four adapters are one CUDA graph,
other adapters and slots take no other one; their logits equal the logits of each row alone up to
rounding; base rows have the bits of a step of base rows. Then the speed of 1 to 32 rows: all base,
one adapter, four adapters in turn. ``bound``: the time to read the experts that the steps chose, at
the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from model import Bench, experts_of, make_config
from sections import Sections

from ktrt._core import ReadProbe
from ktrt.config.args import WEIGHT_FORMATS
from ktrt.engine.step_rows import BASE
from ktrt.generate.graphs import CudaGraphs
from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.generate.runner import ModelRunner
    from ktrt.kv.pool import Slot

BACKENDS = {weight_format: backend for backend, weight_format in WEIGHT_FORMATS.items()}
ADAPTERS = 4
PROBE_BYTES = 1 << 30
WARM_UP = 5
Result = dict[str, Any]
KINDS: dict[str, Callable[[int], int]] = {
    "base": lambda _row: BASE, "one": lambda _row: 0, "mixed": lambda row: row % ADAPTERS,
}  # fmt: skip


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sections, report = Sections(), list[Result]()
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    print(f"device: {name}; {ADAPTERS} adapters; {args.moe_layers + 1} layers")
    for weight_format in args.formats:
        with sections.section(f"{weight_format}: checks"):
            report += checks(args, weight_format)
    for weight_format in args.formats:
        with sections.section(f"{weight_format}: speed"):
            report += speeds(args, weight_format)
    if args.json:
        print(json.dumps({"device": name, "results": report}))
    return sections.status()


def checks(args: argparse.Namespace, weight_format: str) -> list[Result]:
    """Checks a model of three layers, whose kernels do not depend on the number of rows (on AMX
    that is a setting), without and with experts on the GPU."""
    bench = make(args, weight_format, 2, fixed_kernels=True)
    try:
        results = [{"format": weight_format, **check(bench, args)}]
        bench.share_resident(bench.experts.count // 2)
        results.append({"format": weight_format, "residents": True, **check(bench, args)})
        return results
    finally:
        bench.close()


def speeds(args: argparse.Namespace, weight_format: str) -> list[Result]:
    """Measures; with ``--gpu-experts`` once more with these on the GPU."""
    bench = make(args, weight_format, args.moe_layers, fixed_kernels=False)
    try:
        results = measure(bench, args, weight_format)
        if args.gpu_experts:
            bench.share_resident(args.gpu_experts)
            print(f"{args.gpu_experts} experts of each layer on the GPU:")
            results += measure(bench, args, weight_format)
        return results
    finally:
        bench.close()


def make(
    args: argparse.Namespace, weight_format: str, layers: int, *, fixed_kernels: bool
) -> Bench:
    bench = Bench.make(
        make_config(layers, small=args.small), BACKENDS[weight_format], args.threads,
        fixed_kernels=fixed_kernels,
    )  # fmt: skip
    bench.add_loras(ADAPTERS)
    return bench


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe-layers", type=int, default=8)
    parser.add_argument("--formats", default="bf16,int8", type=lambda text: text.split(","))
    parser.add_argument("--threads", type=int, help="of the experts' engine; default: one per core")
    parser.add_argument("--gpu-experts", type=int, default=0, help="of each layer, once more")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=30, help="timed in each measurement")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a slot before the steps")
    parser.add_argument("--small", action="store_true", help="tiny layers: does the script work?")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.small:
        args.moe_layers, args.prompt, args.steps = min(args.moe_layers, 2), 9, 3
        args.rows = [rows for rows in args.rows if rows <= 8]
    return args


class CallAgain:
    """Stands in for CUDA's graphs where there is no GPU: a replay is the step's own call."""

    what = "stand-in for a graph"
    failure_level = logging.WARNING
    captures_compute = False

    def __init__(self) -> None:
        self.usable, self.proven = True, False

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    def clear(self) -> None:
        """Nothing is kept."""


class Batch:
    """Sequences in the first slots of a runner."""

    def __init__(self, bench: Bench, rows: int, prompt: int) -> None:
        self.bench, self.rows = bench, rows
        cuda = torch.cuda.is_available()
        self.runner: ModelRunner = bench.runner(CudaGraphs() if cuda else CallAgain())
        self.runner._mixed = None  # as on a GPU
        self.slots: list[Slot] = []
        vocabulary = bench.model.config.vocab_size
        generator = torch.Generator().manual_seed(rows)
        for row in range(rows):
            ids = torch.randint(2, vocabulary, (prompt,), generator=generator).tolist()
            self.slots.append(self.runner.pool.open(row, ids))
            self.runner.run(Step((Span(slot=self.slots[-1], ids=ids, adapter=BASE),)))
        self._generator, self._vocabulary = generator, vocabulary

    def tokens(self) -> list[int]:
        """Returns a next token for every row."""
        size = (self.rows,)
        found: list[int] = torch.randint(
            2, self._vocabulary, size, generator=self._generator
        ).tolist()
        return found

    def step(
        self, ids: Sequence[int], adapters: Sequence[int], rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Returns the logits of one step of these rows (default: all)."""
        chosen = range(self.rows) if rows is None else rows
        spans = (Span(slot=self.slots[r], ids=[ids[r]], adapter=adapters[r]) for r in chosen)
        return torch.cat(self.runner.run(Step(tuple(spans))))

    def back(self) -> None:
        """Takes the last token of every row back."""
        for slot in self.slots:
            self.runner.pool.rollback(slot, slot.length - 1)

    def again(self, ids: Sequence[int], first: dict[str, torch.Tensor]) -> str:
        """Runs the last step four times more, with tuned rows and all base: where each has the
        bits of its ``first`` run, these are two orders of sums, else there is a race."""
        kinds, same = {"tuned": [BASE, 0, BASE, 1], "base": [BASE] * 4}, dict.fromkeys(first, 0)
        for name in list(first) * 4:
            self.back()
            same[name] += torch.equal(self.step(ids, kinds[name]), first[name])
        return f"of 4 repetitions, with the bits of the first run: {same}"

    def graphs(self) -> tuple[int, int]:
        """Returns how many graphs there are, and how many forwards the host launched for them."""
        alone = self.runner._alone
        assert alone is not None
        assert alone.rows is not None
        return alone.rows.count, alone.rows.eager_forwards


def check(bench: Bench, args: argparse.Namespace) -> Result:
    """Checks four rows; raises where a check fails."""
    batch = Batch(bench, 4, args.prompt)
    mixed, shifted, base = [0, 1, 2, 3], [3, BASE, 0, 2], [BASE] * 4
    batch.step(batch.tokens(), mixed)
    batch.back()
    count, eager = batch.graphs()
    assert count == 1, f"{count} graphs for one step of four rows"
    forwards = count_forwards(bench)
    for adapters in (mixed, shifted, base):
        batch.step(batch.tokens(), adapters)
    assert batch.graphs() == (count, eager), "other adapters took another graph"
    assert not (forwards and torch.cuda.is_available()), f"{len(forwards)} forwards by the host"

    errors: dict[str, list[float]] = {"mixed": [], "base": []}
    same_bits, beside, tuned, again = 0, 0, list[float](), list[str]()
    steps = max(4, args.steps // 2)
    for _ in range(steps):
        ids = batch.tokens()
        rows = {}
        for name, adapters in (("mixed", mixed), ("base", base)):
            rows[name] = batch.step(ids, adapters).clone()
            batch.back()
            for row in range(4):
                alone = batch.step(ids, adapters, [row])[0]
                batch.runner.pool.rollback(batch.slots[row], batch.slots[row].length - 1)
                errors[name].append(error(rows[name][row], alone))
        tuned.append(error(rows["mixed"], rows["base"]))
        company = batch.step(ids, [BASE, 0, BASE, 1])
        if torch.equal(company[[0, 2]], rows["base"][[0, 2]]):
            same_bits += 1
        else:
            again.append(batch.again(ids, {"tuned": company, "base": rows["base"]}))
        beside += sum(value == 0 for value in errors["base"][-4:])
    result = {name: statistics.median(values) for name, values in errors.items()}
    print(
        f"one graph for four rows with four adapters; against each row alone, median of {steps} "
        f"steps: {result['mixed']:.5f} mixed, {result['base']:.5f} base ({beside} of {4 * steps} "
        f"rows bit for bit, in graphs of four rows and of one); base rows with tuned ones as "
        f"in a step of base rows: {same_bits} of {steps} steps bit for bit"
    )
    assert min(tuned) > 0.05, "the adapters change nothing"
    assert same_bits == steps, f"base rows with tuned ones have other bits; {'; '.join(again)}"
    assert result["mixed"] <= max(0.05, 2 * result["base"]), "mixed rows differ from rows alone"
    return {"errors": result, "base_bits": same_bits / steps, "steps": steps}


def count_forwards(bench: Bench) -> list[int]:
    """Returns a list that grows with each forward that the host launches from now on."""
    found: list[int] = []
    bench.model.register_forward_pre_hook(lambda *_: found.append(1))
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


class Routing:
    """The experts that each layer's router chose in the last forward, in memory that a captured
    graph writes too."""

    def __init__(self, bench: Bench, rows: int) -> None:
        self._chosen, self._hooks = [], []
        device = bench.model.get_input_embeddings().weight.device
        for (_, module), (_, layer) in zip(experts_of(bench.model), bench.layers, strict=True):
            chosen = torch.zeros(rows, layer.top_k, dtype=torch.int64, device=device)
            self._chosen.append(chosen)
            self._hooks.append(module.register_forward_pre_hook(self._note(chosen)))
        self._bytes = [layer.packed_bytes / layer.num_experts for _, layer in bench.layers]

    @staticmethod
    def _note(chosen: torch.Tensor) -> Callable[..., None]:
        def note(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            if len(args[1]) == len(chosen):
                chosen.copy_(args[1])

        return note

    def union(self) -> tuple[float, float]:
        """Returns the distinct experts of a layer, on average, and the bytes of all."""
        counts = [len(chosen.unique()) for chosen in self._chosen]
        size = sum(count * each for count, each in zip(counts, self._bytes, strict=True))
        return statistics.mean(counts), size

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def measure(bench: Bench, args: argparse.Namespace, weight_format: str) -> list[Result]:
    """Prints and returns the figures of every number of rows and kind of adapters."""
    probe = ReadProbe(PROBE_BYTES if not args.small else 1 << 24)
    bandwidth = probe.nbytes / min(probe.seconds(bench.engine) for _ in range(7))
    del probe
    print(f"{weight_format}: {bandwidth / 1e9:.1f} GB/s\n{HEADER}")
    results: list[Result] = []
    for rows in args.rows:
        routing = Routing(bench, rows)
        batch = Batch(bench, rows, args.prompt)
        for kind, adapter in KINDS.items():
            adapters = [adapter(row) for row in range(rows)]
            times, unions = [], []
            for step in range(WARM_UP + args.steps):
                ids = batch.tokens()
                start = time.perf_counter()
                logits = batch.step(ids, adapters)
                logits.argmax(-1).tolist()
                if step >= WARM_UP:
                    times.append(time.perf_counter() - start)
                    unions.append(routing.union())
            seconds = statistics.median(times)
            distinct, size = (statistics.mean(each) for each in zip(*unions, strict=True))
            results.append(
                {"format": weight_format, "rows": rows, "kind": kind, "ms": 1e3 * seconds}
                | {"tokens_per_s": rows / seconds, "best_ms": 1e3 * min(times)}
                | {"distinct": distinct, "bound_ms": 1e3 * size / bandwidth}
                | {"of_bound": size / bandwidth / seconds, "bandwidth_gb_s": bandwidth / 1e9}
            )
            print_result(results[-1])
        routing.remove()
        del batch
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


HEADER = "format rows kind   tokens/s   ms a step (best)  distinct  bound ms  of bound"


def print_result(row: Result) -> None:
    print(
        f"{row['format']:6} {row['rows']:4} {row['kind']:6} {row['tokens_per_s']:8.1f} "
        f"{row['ms']:10.2f} {row['best_ms']:7.2f} {row['distinct']:9.1f} {row['bound_ms']:9.2f} "
        f"{row['of_bound']:9.1%}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
