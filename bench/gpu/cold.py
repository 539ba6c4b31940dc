"""Measures what is slower the first time with a GPU: prompts, growth of the cache, steps of more
rows; decoding by context; GPU memory.

    python bench/gpu/cold.py            # V2-Lite's shape, 8 layers, INT8 experts, about 60 s
    python bench/gpu/cold.py --small    # a trial of this script, without a GPU too

Weights are random and made in place. The model is warmed up as at load; ``first`` is the first
prompt after that, ``later`` the median of three others.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from decode import tokens
from model import Bench, experts_of, make_config
from sections import Sections

from ktrt.engine.step_rows import ACTIVE, BASE
from ktrt.experts import experts_muted
from ktrt.generate.device_memory import let_segments_grow
from ktrt.generate.graphs import CudaGraphs, DecodeGraphs, NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.generate.warm_up import _load_kernels, warm_up
from ktrt.layers.attention import accelerate_attention
from ktrt.layers.cuda_linear import FusedLora
from ktrt.layers.latent import use_latents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 65_536
PROMPTS = (256, 1000, 1024, 5000, 8192)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny layers: does the script work?")
    parser.add_argument("--moe-layers", type=int, default=7)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--cold", action="store_true", help="without what load warms up")
    parser.add_argument("--fixed-segments", action="store_true", help="torch's allocator as it is")
    parser.add_argument(
        "--muted", action="store_true", help="no experts: their layers return zeros"
    )
    parser.add_argument("--parts", default="prompts,growth,rows,slots,context")
    args = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    for name in ("torch", "urllib3", "filelock", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    sections, scale = Sections(), 64 if args.small else 1
    if torch.cuda.is_available() and not args.fixed_segments:
        let_segments_grow(torch.device("cuda", 0))
    start = time.perf_counter()
    with sections.section("model"):
        case = Case(args)
    print(f"built in {time.perf_counter() - start:.1f} s; {case.memory()}")
    parts: dict[str, Callable[[], None]] = {
        "prompts": lambda: case.prompts(*(size // scale for size in PROMPTS)),
        "growth": lambda: case.growth(*(size // scale for size in (2048, 8192, 16384))),
        "rows": lambda: case.rows(1, 2, 4, 8, 16, 32),
        "slots": lambda: case.slots((5,), (2, 3), (9, 10), (4, 6, 7), (20,)),
        "context": lambda: case.context(*(size // scale for size in (1000, 8000, 32_000))),
    }
    with experts_muted(case.bench.model) if args.muted else torch.inference_mode():
        for name in args.parts.split(","):
            with sections.section(name):
                parts[name]()
    case.bench.close()
    return sections.status()


class Case:
    """The model, as load makes it, and a conversation."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = make_config(args.moe_layers, small=args.small)
        self.vocabulary = config.vocab_size
        self.bench = bench = (
            make_muted(config) if args.muted else Bench.make(config, "AMXInt8", None)
        )
        model, running = bench.model, bench.running
        self.on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
        bench.masks.watch(model, bench.patches)
        accelerate_attention(model, bench.engine, bench.patches, running)
        use_latents(model, bench.engine, bench.patches, running)
        start = time.perf_counter()
        if self.on_gpu and not args.cold:
            with experts_muted(model):
                _load_kernels(model, torch.device("cuda", 0), LIMIT, running)
            print(f"kernels during the load: {time.perf_counter() - start:.2f} s")
        linears = None
        if args.lora:
            bench.add_lora()
        if self.on_gpu:
            linears = FusedLora(model, bench.active_set, bench.patches, bench.masks)
            if not args.muted:
                bench.share(0)
        hand_off = bench.hand_off or NoHandOff()
        graphs = partial(
            DecodeGraphs, model, handoff=hand_off, maker=CudaGraphs(), running=running
        ) if self.on_gpu else None  # fmt: skip
        rows = partial(RowGraphs, model, handoff=hand_off, maker=CudaGraphs())
        self.runner = ModelRunner(
            model, graphs, bench.gpu, bench.active_set, running=running, linears=linears,
            row_graphs=rows if self.on_gpu else None, capacity=LIMIT if self.on_gpu else None,
        )  # fmt: skip
        self.cache = KvCache(model, runner=self.runner)
        start = time.perf_counter()
        if not args.cold:
            with experts_muted(model) if args.muted else nullcontext():
                warm_up(self.cache, LIMIT, 32)
        lengths = running.keeps_to_lengths
        print(f"warm-up: {time.perf_counter() - start:.2f} s; memory stays: "
              f"{self.runner.memory_stays}; all lengths in one graph: {lengths}")  # fmt: skip

    def forward(self, ids: list[int]) -> float:
        start = time.perf_counter()
        int(self.cache.forward(ids).argmax())
        return time.perf_counter() - start

    def prompt(self, size: int, seed: int) -> float:
        """Returns the seconds of a prompt in chunks, on an empty cache."""
        self.cache.reuse([0])
        ids, at, seconds = tokens(size, self.vocabulary, seed), 0, 0.0
        while at < size:
            chunk = min(self.cache.prefill_chunk(size - at), size - at)
            seconds += self.forward(ids[at : at + chunk])
            at += chunk
        return seconds

    def prompts(self, *sizes: int) -> None:
        for size in sizes:
            before = allocations()
            first = self.prompt(size, 1)
            made = allocations() - before
            later = statistics.median(self.prompt(size, seed) for seed in (2, 3, 4))
            print(f"prompt of {size}: first {first:.3f} s, later {later:.3f} s, "
                  f"{first / later:.2f} ×; {made} allocations; {self.memory()}")  # fmt: skip

    def growth(self, *sizes: int) -> None:
        """Steps over the sizes at which memory that moves would move, and graphs with windows
        change."""
        for size in sizes:
            self.prompt(size - 8, 5)
            times = [self.forward([7 + at]) for at in range(24)]
            median = statistics.median(times)
            print(f"steps over {size}: median {1e3 * median:.2f} ms, longest "
                  f"{1e3 * max(times):.2f} ms at {size - 8 + times.index(max(times))}, "
                  f"{max(times) / median:.2f} ×; moves {self.moves}")  # fmt: skip

    def rows(self, *counts: int) -> None:
        """First steps of more and more sequences, with the active adapters and by row."""
        with self.slots_of(max(counts)) as slots:
            for adapter, name in ((ACTIVE, "active"), (BASE, "by row")):
                for count in counts:
                    self.first_step(f"{count} rows, {name}", slots[:count], adapter)

    def slots(self, *groups: tuple[int, ...]) -> None:
        """First steps of few sequences among many slots, as others have ended."""
        with self.slots_of(1 + max(max(group) for group in groups)) as slots:
            for group in groups if slots else ():
                self.first_step(f"slots {group}", [slots[at] for at in group], ACTIVE)

    @contextmanager
    def slots_of(self, count: int) -> Iterator[list[Any]]:
        """Within the block, ``count`` slots hold a token each."""
        self.cache.reuse([0])
        self.cache.close()
        pool = self.runner.pool
        slots = [pool.open("bench", ()) for _ in range(count if self.on_gpu else 0)]
        yield slots
        for slot in slots:
            pool.empty(slot)
            pool.close(slot)

    def first_step(self, what: str, slots: list[Any], adapter: int) -> None:
        times = []
        for step in range(12 if slots else 0):
            # Other tokens, for other experts than in the step before.
            ids = tokens(len(slots), self.vocabulary, 100 * len(what) + step)
            start = time.perf_counter()
            pairs = zip(slots, ids, strict=True)
            spans = (Span(slot=slot, ids=[token], adapter=adapter) for slot, token in pairs)
            int(self.runner.run(Step(tuple(spans)))[-1].argmax())
            times.append(time.perf_counter() - start)
        if slots:
            later = statistics.median(times[1:])
            print(f"{what}: first {1e3 * times[0]:.1f} ms, later {1e3 * later:.2f} ms, "
                  f"{times[0] / later:.2f} ×")  # fmt: skip

    def context(self, *sizes: int) -> None:
        rates = []
        for size in sizes:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = self.prompt(size, 6)
            times = [self.forward([7 + at]) for at in range(40)]
            rates.append(1 / statistics.median(times[4:]))
            print(f"at {size}: {rates[-1]:.1f} tokens/s, {100 * rates[-1] / rates[0]:.0f} % of the "
                  f"first; prompt {seconds:.2f} s; {self.memory()}")  # fmt: skip

    @property
    def moves(self) -> int:
        return 0 if self.runner.cache is None else self.runner.cache.moves

    def memory(self) -> str:
        if not self.on_gpu:
            return "no GPU"
        free, total = torch.cuda.mem_get_info()
        held = self.runner.pool.committed_bytes
        numbers = {
            "device used": total - free, "torch reserved": torch.cuda.memory_reserved(),
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(), "keys and values": held,
        }  # fmt: skip
        return "GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in numbers.items())


def make_muted(config: Any) -> Bench:
    """Returns the model without routed experts."""
    one = Bench.make(make_config(1, small=config.hidden_size < 2048), "AMXInt8", None)
    from model import make_torch_model

    device = one.model.get_input_embeddings().weight.device
    one.model = make_torch_model(config, device)
    for _, module in experts_of(one.model):
        module.running = one.running
    return one


def allocations() -> int:
    """Returns how often torch has asked the driver for memory."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.memory_stats().get("num_device_alloc", 0))


if __name__ == "__main__":
    sys.exit(main())
