#!/usr/bin/env python3
"""Checks the hand-off between a CUDA stream and the engine on a real device: right, fast, never
stuck.

    python bench/gpu/handoff.py [--threads N] [--layers N]

Chains of layers (one's output is the next one's input) run directly on the CPU, eagerly through a
hand-off and as a replayed CUDA graph, with both mechanisms; the bits must be equal. "idle" layers
route no token, so their chain measures the hand-off alone. Then: a forward that fails, one that
takes too long, an unexpected replay, close with work pending. Prints µs per layer (median) and ends
with status 1 if anything was wrong; takes less than a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from sections import Sections

from ktrt import _core
from ktrt.engine.threads import num_threads

if TYPE_CHECKING:
    from collections.abc import Callable

Mechanism = Literal["stream_memory_ops", "host_functions"]
MECHANISMS: tuple[Mechanism, ...] = ("stream_memory_ops", "host_functions")
MAX_QLEN = 1024


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    inter: int


class Checks:
    """Counts failed checks."""

    def __init__(self) -> None:
        self.wrong = 0

    def that(self, right: bool, text: str) -> None:
        if not right:
            self.wrong += 1
        print(f"  {'ok   ' if right else 'WRONG'} {text}", flush=True)

    def raises(self, error: type[Exception], words: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except error as caught:
            self.that(words in str(caught), f"{type(caught).__name__}: {caught}")
        else:
            self.that(False, f"no {error.__name__} with '{words}'")


def make_layers(engine: _core.Engine, shape: Shape) -> list[_core.MoeLayer]:
    """Returns layers with the same random experts in different orders."""
    generator = torch.Generator().manual_seed(0)
    gates, ups = torch.randn(
        2, shape.experts, shape.inter, shape.hidden, generator=generator
    ).bfloat16() * (shape.hidden**-0.5)
    downs = torch.randn(shape.experts, shape.hidden, shape.inter, generator=generator).bfloat16()
    downs *= 2.5 * shape.inter**-0.5
    layers = []
    for index in range(shape.layers):
        layer = _core.MoeLayer(
            engine,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.inter,
            weight_format="bf16",
        )
        for expert in range(shape.experts):
            source = (expert + index) % shape.experts
            layer.load_expert(expert, gates[source], ups[source], downs[source])
        layers.append(layer)
    return layers


class Chain:
    """Runs the layers one after the other for `tokens` rows, on the CPU and through a hand-off."""

    def __init__(
        self, handoff: _core.GpuHandoff, layers: list[_core.MoeLayer], tokens: int, idle: bool
    ) -> None:
        first = layers[0]
        generator = torch.Generator().manual_seed(tokens)
        self.handoff, self.layers = handoff, layers
        hidden = torch.randn(tokens, first.hidden_size, generator=generator).bfloat16()
        ids = torch.rand(tokens, first.num_experts, generator=generator).argsort(1)
        ids = ids[:, : first.top_k].contiguous()
        weights = torch.rand(tokens, first.top_k, generator=generator).softmax(1)
        self.cpu = (hidden, ids.fill_(-1) if idle else ids, weights)
        self.cpu_states = [hidden, *(torch.empty_like(hidden) for _ in layers)]
        self.states = [state.cuda() for state in self.cpu_states]
        self.ids, self.weights = self.cpu[1].cuda(), self.cpu[2].cuda()
        self.slots = [
            handoff.add_slot(
                layer, tokens=tokens, top_k=first.top_k, dtype="bfloat16", name=f"layer {i}"
            )
            for i, layer in enumerate(layers)
        ]
        self.graph = torch.cuda.CUDAGraph()

    def direct(self) -> None:
        for layer, (before, after) in zip(
            self.layers, itertools.pairwise(self.cpu_states), strict=True
        ):
            layer.forward(before, *self.cpu[1:], after)

    def enqueue(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        routing = self.ids.data_ptr(), self.weights.data_ptr()
        for slot, (before, after) in zip(self.slots, itertools.pairwise(self.states), strict=True):
            self.handoff.submit(slot, stream, before.data_ptr(), *routing)
            self.handoff.wait(slot, stream, after.data_ptr())

    def synchronize(self) -> None:
        self.handoff.synchronize(torch.cuda.current_stream().cuda_stream)

    def eager(self) -> None:
        self.enqueue()
        self.synchronize()

    def capture(self) -> None:
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.enqueue()

    def replay(self) -> None:
        self.handoff.expect(self.slots)
        self.graph.replay()
        self.synchronize()

    def is_right(self) -> bool:
        """Compares every layer's output bit by bit; then overwrites it."""
        torch.cuda.synchronize()
        pairs = list(zip(self.states, self.cpu_states, strict=True))[1:]
        equal = all(torch.equal(state.cpu(), wanted) for state, wanted in pairs)
        for state, _ in pairs:
            state.fill_(float("nan"))
        return equal and all(bool(wanted.isfinite().all()) for _, wanted in pairs)


def median_us(call: Callable[[], None], layers: int, seconds: float = 0.35) -> float:
    """Returns the median time of a call, per layer."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 400):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / layers * 1e6


def measure(
    checks: Checks, handoff: _core.GpuHandoff, shape: Shape, layers: list[_core.MoeLayer]
) -> None:
    for tokens, idle in ((1, True), (1, False), (16, False)):
        chain = Chain(handoff, layers, tokens, idle)
        chain.direct()
        chain.eager()
        right = [chain.is_right()]
        chain.capture()
        for _ in range(20):
            chain.replay()
            right.append(chain.is_right())
        direct = median_us(chain.direct, len(layers))
        eager = median_us(chain.eager, len(layers))
        graph = median_us(chain.replay, len(layers))
        right.append(chain.is_right())
        what = f"{shape.name}, {tokens} tokens{', idle' if idle else ''}"
        checks.that(
            all(right),
            f"{what:<28} {handoff.mechanism:<18} direct {direct:8.1f}  eager {eager:8.1f} "
            f"(+{eager - direct:.1f})  graph {graph:8.1f} (+{graph - direct:.1f})",
        )


def check_failures(
    checks: Checks, engine: _core.Engine, layers: list[_core.MoeLayer], mechanism: Mechanism
) -> None:
    """Uses one hand-off, so every check also shows that the previous one left nothing pending."""
    first = layers[0]
    broken = _core.MoeLayer(
        engine,
        num_experts=first.num_experts,
        top_k=first.top_k,
        hidden_size=first.hidden_size,
        intermediate_size=first.intermediate_size,
        weight_format="bf16",
    )
    handoff = _core.GpuHandoff(engine, timeout=5.0, mechanism=mechanism)
    good = Chain(handoff, layers[:3], 1, idle=False)
    bad = Chain(handoff, [layers[0], broken, layers[1]], 1, idle=False)
    good.direct()
    good.capture()
    bad.capture()
    for name, call in (("eager", bad.eager), ("graph", bad.replay)):
        print(f" {mechanism}, {name}: a layer without experts")
        checks.raises(RuntimeError, "(layer 1, 1 token): expert 0 has not been loaded", call)
        good.replay()
        checks.that(good.is_right(), "the next use is right")
    print(f" {mechanism}: a replay that was not expected, and no synchronize of ours")
    good.graph.replay()
    torch.cuda.synchronize()
    checks.raises(RuntimeError, "started, but nothing was expected", good.synchronize)
    print(f" {mechanism}: expected, but not launched")
    handoff.expect(good.slots)
    checks.raises(RuntimeError, "nothing on the stream started it", good.synchronize)
    good.replay()
    checks.that(good.is_right(), "the next use is right")
    print(f" {mechanism}: close with work pending")
    for _ in range(20):
        good.enqueue()
    handoff.close()
    torch.cuda.synchronize()
    checks.that(handoff.closed and handoff.pinned_bytes == 0, "closed, pinned memory freed")


def check_timeout(
    checks: Checks, engine: _core.Engine, layers: list[_core.MoeLayer], mechanism: Mechanism
) -> None:
    print(f" {mechanism}: a prefill that takes longer than the timeout")
    timeout = 0.004
    handoff = _core.GpuHandoff(engine, timeout=timeout, mechanism=mechanism)
    slow = Chain(handoff, layers[:2], MAX_QLEN, idle=False)
    quick = Chain(handoff, layers[:2], 1, idle=False)
    start = time.perf_counter()
    slow.direct()
    seconds = (time.perf_counter() - start) / 2
    if seconds < 3 * timeout:
        print(f"  skipped: a forward takes only {seconds * 1000:.1f} ms here")
        return
    checks.raises(TimeoutError, "the forward has not ended", slow.eager)
    quick.direct()
    deadline = time.perf_counter() + 10
    while True:  # until the forward that was given up has ended
        try:
            quick.eager()
            break
        except TimeoutError as error:
            if time.perf_counter() > deadline:
                checks.that(False, f"no clean start: {error}")
                return
            torch.cuda.synchronize()
            with contextlib.suppress(TimeoutError):
                quick.synchronize()
    checks.that(quick.is_right(), "the next use is right")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=0, help="default: as an engine chooses")
    parser.add_argument("--layers", type=int, default=26, help="of the larger model")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    faulthandler.dump_traceback_later(120, exit=True)  # if it is stuck
    start = time.perf_counter()
    torch.zeros(1, device="cuda")
    engine = _core.Engine(num_threads=num_threads(args.threads or None), max_qlen=MAX_QLEN)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {engine.num_threads} threads"
    )
    checks, sections = Checks(), Sections()
    with sections.section("mechanism"):
        checks.that(_core.GpuHandoff(engine).mechanism == MECHANISMS[0], "auto: stream_memory_ops")
    shapes = (Shape("small", 4, 8, 2, 256, 128), Shape("V2-Lite", args.layers, 8, 6, 2048, 1408))
    print("µs per layer, and the excess over a direct forward")
    for shape in shapes:
        layers = make_layers(engine, shape)
        for mechanism in MECHANISMS:
            with sections.section(f"{shape.name}, {mechanism}"):
                handoff = _core.GpuHandoff(engine, mechanism=mechanism)
                measure(checks, handoff, shape, layers)
                handoff.close()
    for mechanism in MECHANISMS:
        with sections.section(f"failures, {mechanism}"):
            check_failures(checks, engine, layers, mechanism)
        with sections.section(f"timeout, {mechanism}"):
            check_timeout(checks, engine, layers, mechanism)
    print(f"{checks.wrong} wrong, {time.perf_counter() - start:.0f} s")
    return 1 if sections.status() or checks.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
