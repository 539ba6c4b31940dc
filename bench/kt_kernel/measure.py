"""Measures for compare.py, alternating between both engines."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from coded import KT_CLASSES, code_weights
from engines import (
    EXPERTS,
    HIDDEN,
    INTER,
    LORA_SCALE,
    TOP_K,
    Batch,
    KtKernel,
    Ktrt,
    Weights,
    make_lora,
    make_weights,
)

from ktrt import _core
from ktrt.engine.formats import format_named
from ktrt.engine.threads import num_threads
from ktrt.engine.torch_threads import set_torch_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROBE_BYTES = 256 << 20
SETTLE_SECONDS = 0.08
ERROR_TOKENS = 64


def reference(weights: Weights, batch: Batch, tokens: int) -> torch.Tensor:
    """Computes in float32, from weights and adapter without packing or rounding."""
    x, ids = batch.x[:tokens].float(), batch.ids[0][:tokens]
    y = torch.zeros(tokens, HIDDEN)

    def project(name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
        matrix: torch.Tensor = getattr(weights, name)[expert]
        result = value @ matrix.float().T
        if weights.lora:
            a, b = weights.lora[f"{name}_a"][expert], weights.lora[f"{name}_b"][expert]
            result += LORA_SCALE * (value @ a.float().T) @ b.float().T
        return result

    for expert in ids.unique().tolist():
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        rows = x[token]
        act = torch.nn.functional.silu(project("gate", expert, rows)) * project("up", expert, rows)
        y.index_add_(0, token, project("down", expert, act) * batch.routing[token, slot, None])
    return y


def relative_errors(engines: tuple[Ktrt, KtKernel], weights: Weights, qlen: int) -> list[float]:
    """Returns ‖y − y_float32‖ / ‖y_float32‖ of both over ERROR_TOKENS tokens, in forwards of up to
    ``qlen``. The error is mostly rounding of activations, so a single token says little.
    """
    batch = Batch(max(qlen, ERROR_TOKENS), 1, zipf=False)
    expected = reference(weights, batch, ERROR_TOKENS)
    windows = [batch.window(first, qlen) for first in range(0, ERROR_TOKENS, qlen)]
    errors = []
    for forward in (engines[0].forward, engines[1].forward):
        for window in windows:
            forward(0, window)
        difference = batch.out[:ERROR_TOKENS].float() - expected
        errors.append(float(difference.norm() / expected.norm()))
    return errors


def onednn_party(weights: Weights, qlen: int) -> Callable[[], float]:
    """Returns a measurement of PyTorch's BF16 linear, in GFLOP/s, at the mean rows per expert and
    over changing experts."""
    rows = max(1, qlen * TOP_K // EXPERTS)
    x, act = torch.randn(rows, HIDDEN), torch.randn(rows, INTER)
    x, act = x.to(torch.bfloat16), act.to(torch.bfloat16)
    gate, up, down = (w.bfloat16() for w in (weights.gate, weights.up, weights.down))
    experts = itertools.cycle(range(EXPERTS))
    count = max(2, 512 // rows)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(min(count, EXPERTS)):
            e = next(experts)
            torch.nn.functional.linear(x, gate[e])
            torch.nn.functional.linear(x, up[e])
            torch.nn.functional.linear(act, down[e])
        seconds = time.perf_counter() - start
        return 6.0 * rows * HIDDEN * INTER * min(count, EXPERTS) / seconds / 1e9

    return run


def settle() -> None:
    """Waits until the previous party's threads sleep: kt_kernel's and OpenMP's spin for a while
    after their work, on the next party's cores."""
    time.sleep(SETTLE_SECONDS)


def timed(forward: Callable[[int, Batch], None], batch: Batch, layers: int) -> float:
    """Returns seconds per layer, with the party's threads awake."""
    if batch.qlen < 64:  # for more tokens the time of waking threads is negligible
        forward(layers - 1, batch)
    start = time.perf_counter()
    for layer in range(layers):
        forward(layer, batch)
    return (time.perf_counter() - start) / layers


@dataclass
class Sample:
    """One round: neighbouring measurements, in seconds per layer."""

    read_rate: float  # bytes per second
    base: float  # ktrt without its LoRA
    ktrt: float
    kt: float
    onednn: float | None  # GFLOP/s


@cache
def read_probe() -> _core.ReadProbe:
    """Returns one probe for all measurements: filling it takes half a second."""
    return _core.ReadProbe(PROBE_BYTES)


def sample_rounds(
    ktrt: Ktrt, kt: KtKernel, batch: Batch, onednn: Callable[[], float] | None, rounds: int
) -> list[Sample]:
    layers, has_lora = len(ktrt.layers), bool(kt.weights.lora)
    samples = []
    for index in range(rounds):
        settle()
        read_rate = PROBE_BYTES / read_probe().seconds(ktrt.engine)
        # Each one comes first half of the time, so drift affects both equally.
        first, second = ktrt.forward, ktrt.base_forward
        if index % 2:
            first, second = second, first
        one = timed(first, batch, layers)
        two = timed(second, batch, layers) if has_lora else one
        ours, base = (two, one) if index % 2 else (one, two)
        theirs = timed(kt.forward, batch, layers)
        gflops = None
        if onednn is not None:
            settle()
            gflops = onednn()
        samples.append(Sample(read_rate, base, ours, theirs, gflops))
    return samples


def measure_qlen(
    engines: tuple[Ktrt, KtKernel], weights: Weights, batch: Batch, dtype: str, rounds: int
) -> dict[str, Any]:
    ktrt, kt = engines
    rank, qlen = weights.rank, batch.qlen
    errors = relative_errors(engines, weights, qlen)
    onednn = onednn_party(weights, qlen) if qlen >= 64 else None
    experts = batch.distinct_experts()
    lora_bytes = 2 * rank * 3 * (HIDDEN + INTER)
    nbytes = experts * (3 * weight_bytes(dtype) + lora_bytes)
    flops = 2.0 * qlen * TOP_K * 3 * (HIDDEN * INTER + rank * (HIDDEN + INTER))
    samples = sample_rounds(ktrt, kt, batch, onednn, rounds)

    def median(value: Callable[[Sample], float]) -> float:
        return statistics.median(value(sample) for sample in samples)

    ours = median(lambda s: s.ktrt)
    return {
        "method": f"{dtype}{f'+lora{rank}' if rank else ''}",
        "dtype": dtype,
        "rank": rank,
        "qlen": qlen,
        "ktrt_ms": ours * 1e3,
        "kt_ms": median(lambda s: s.kt) * 1e3,
        "ratio": median(lambda s: s.kt / s.ktrt),
        "bandwidth_fraction": median(lambda s: nbytes / s.ktrt / s.read_rate),
        "onednn_fraction": median(lambda s: flops / 1e9 / s.ktrt / (s.onednn or 1.0))
        if onednn
        else None,
        "ktrt_relerr": errors[0],
        "kt_relerr": errors[1],
        "lora_cost": median(lambda s: s.ktrt / s.base) - 1.0,
        "ktrt_gbs": nbytes / ours / 1e9,
        "ktrt_gflops": flops / ours / 1e9,
        "read_gbs": median(lambda s: s.read_rate) / 1e9,
        "experts": experts,
    }


def measure(
    dtype: str,
    ranks: list[int],
    qlens: list[int],
    *,
    layers: int,
    threads: int,
    rounds: int,
    quick: bool,
    zipf: bool,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one dtype, each with the machine."""
    threads = num_threads(threads or None)
    set_torch_threads(threads)
    base = make_weights()
    if dtype in KT_CLASSES:
        base, coded = code_weights(base, dtype)
        base = replace(base, coded=coded)
    ktrt = Ktrt(base, dtype, layers, threads, max(qlens))
    keep = []  # kt_kernel's destructors are slow and noisy
    for rank in ranks:
        weights = replace(base, lora=make_lora(rank))
        ktrt.set_lora(weights.lora)
        kt = KtKernel(weights, dtype, layers, threads, max(qlens))
        keep.append(kt)
        machine = describe_machine(kt, threads, layers)
        for qlen in qlens:
            batch = Batch(qlen, layers, zipf=zipf)
            few, many = (5, 3) if quick else (31, 15)
            chosen = rounds or (few if qlen <= 16 else many)
            row = measure_qlen((ktrt, kt), weights, batch, dtype, chosen)
            yield {"machine": machine, "row": row}


def weight_bytes(dtype: str) -> int:
    """Returns the bytes of one matrix, with its scales."""
    each = format_named(dtype)
    return each.code_bytes(INTER, HIDDEN) + each.scale_bytes(INTER, HIDDEN)


def describe_machine(kt: KtKernel, threads: int, layers: int) -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    return {
        "cpu": cpu,
        "threads": threads,
        "isa": _core.isa(),
        "kernels": _core.kernels(),
        "kt_variant": kt.kt.__cpu_variant__,
        "torch": torch.__version__,
        "shape": f"{EXPERTS} experts top-{TOP_K}, hidden {HIDDEN}, intermediate {INTER}",
        "layers": layers,
    }
