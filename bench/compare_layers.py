"""The measuring half of compare_kt_kernel.py: layers of both engines, alternating measurements."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ktrt import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# DeepSeek-V2-Lite.
EXPERTS, TOP_K, HIDDEN, INTER = 64, 6, 2048, 1408
LORA_SCALE = 2.0
FORMATS: tuple[Literal["bf16", "int8", "int4"], ...] = ("bf16", "int8", "int4")
ELEMENT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
KT_CLASS = {"bf16": "AMXBF16", "int8": "AMXInt8", "int4": "AMXInt4"}
PROBE_BYTES = 256 << 20
SETTLE_SECONDS = 0.06
ERROR_TOKENS = 64


@dataclass
class Weights:
    gate: torch.Tensor  # [E, I, H] bfloat16
    up: torch.Tensor
    down: torch.Tensor  # [E, H, I]
    lora: dict[str, torch.Tensor]  # bfloat16 A and B, unscaled; empty without LoRA

    @property
    def rank(self) -> int:
        return self.lora["gate_a"].shape[1] if self.lora else 0


def make_weights() -> Weights:
    """Gaussian values. Experts are different windows of one random pool: drawing 550 million
    numbers would take longer than the measurement."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(24_000_000, generator=generator).to(torch.bfloat16)

    def window(index: int, rows: int, columns: int) -> torch.Tensor:
        start = index * 7919 * 32 % (pool.numel() - rows * columns)
        return pool[start : start + rows * columns].view(rows, columns) / math.sqrt(columns)

    def stack(first: int, rows: int, columns: int) -> torch.Tensor:
        return torch.stack([window(first + e, rows, columns) for e in range(EXPERTS)])

    return Weights(
        stack(0, INTER, HIDDEN), stack(100, INTER, HIDDEN), stack(200, HIDDEN, INTER), {}
    )


def make_lora(rank: int) -> dict[str, torch.Tensor]:
    """A and B of every projection, so that LoRA changes the outputs by tens of per cent."""
    generator = torch.Generator().manual_seed(rank)
    lora: dict[str, torch.Tensor] = {}
    for name, out, inp in (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER)):
        if rank:
            a = torch.randn(EXPERTS, rank, inp, generator=generator) * inp**-0.5
            b = torch.randn(EXPERTS, out, rank, generator=generator)
            lora[f"{name}_a"] = a.to(torch.bfloat16)
            lora[f"{name}_b"] = (b * (0.3 / LORA_SCALE * rank**-0.5)).to(torch.bfloat16)
    return lora


class Ktrt:
    def __init__(self, weights: Weights, dtype: str, layers: int, threads: int, max_qlen: int):
        self.engine = _core.Engine(num_threads=threads, max_qlen=max_qlen)
        self.layers = [self._layer(weights, dtype) for _ in range(layers)]

    def _layer(self, weights: Weights, dtype: str) -> _core.MoeLayer:
        layer = _core.MoeLayer(
            self.engine,
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=INTER,
            weight_format=next(each for each in FORMATS if each == dtype),
        )
        for expert in range(EXPERTS):
            layer.load_expert(
                expert, weights.gate[expert], weights.up[expert], weights.down[expert]
            )
        return layer

    def set_lora(self, lora: dict[str, torch.Tensor]) -> None:
        folded = {
            name: value.float() * (LORA_SCALE if name.endswith("_b") else 1.0)
            for name, value in lora.items()
        }
        for layer in self.layers:
            layer.set_lora(**folded)

    def base_forward(self, layer: int, batch: Batch) -> None:
        self.layers[layer].lora_enabled = False
        self.forward(layer, batch)
        self.layers[layer].lora_enabled = True

    def forward(self, layer: int, batch: Batch) -> None:
        self.layers[layer].forward(batch.x, batch.ids[layer], batch.routing, batch.out)


class KtKernel:
    """kt_kernel's raw binding; its Python layer needs a CUDA driver."""

    def __init__(self, weights: Weights, dtype: str, layers: int, threads: int, max_qlen: int):
        self.kt = load_kt_kernel()
        pool = self.kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [threads]
        self.cpu = self.kt.CPUInfer(pool)
        self.weights = weights
        self.identity = torch.arange(EXPERTS, dtype=torch.int64)
        self.max_len = max(32, (max_qlen + 31) // 32 * 32)  # anything else crashes
        # By the batch itself: a task points into its tensors, which must live as long.
        self.tasks: dict[tuple[int, Batch], Any] = {}
        self.layers = [self._layer(dtype, index) for index in range(layers)]

    def _layer(self, dtype: str, index: int) -> Any:
        w = self.weights
        make = self.kt.moe.MOESFTConfig if w.lora else self.kt.moe.MOEConfig
        config = make(EXPERTS, TOP_K, HIDDEN, INTER)
        config.layer_idx, config.pool, config.max_len = index, self.cpu.backend_, self.max_len
        config.physical_to_logical_map = self.identity.data_ptr()
        config.gate_proj, config.up_proj = w.gate.data_ptr(), w.up.data_ptr()
        config.down_proj = w.down.data_ptr()
        if not w.lora:
            layer = getattr(self.kt.moe, f"{KT_CLASS[dtype]}_MOE")(config)
            self.cpu.submit(layer.load_weights_task(self.identity.data_ptr()))
            self.cpu.sync()
            return layer
        config.lora_rank, config.lora_alpha = w.rank, LORA_SCALE * w.rank
        config.lora_dropout = 0.0  # else it is applied at inference
        config.share_backward_bb = config.share_cache_pool = True  # else weights double
        layer = getattr(self.kt.moe, f"{KT_CLASS[dtype]}_SFT_MOE")(config)
        self.cpu.submit(layer.load_weights_task())
        self.cpu.sync()
        names = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
        layer.update_lora_weights(*(w.lora[name].data_ptr() for name in names))
        return layer

    def forward(self, layer: int, batch: Batch) -> None:
        key = (layer, batch)
        if key not in self.tasks:  # building a task leaks 80 bytes: once each
            moe = self.layers[layer]
            build = moe.forward_sft_task if self.weights.lora else moe.forward_task
            self.tasks[key] = build(
                batch.count.data_ptr(), TOP_K, batch.ids[layer].data_ptr(),
                batch.routing.data_ptr(), batch.x.data_ptr(), batch.out.data_ptr(), False,
            )  # fmt: skip
        self.cpu.submit(self.tasks[key])
        self.cpu.sync()


def load_kt_kernel() -> Any:
    spec = importlib.util.find_spec("kt_kernel")
    if spec is None or spec.origin is None:
        raise SystemExit("kt_kernel not found: pip install kt-kernel (Python 3.11 or 3.12)")
    flags = Path("/proc/cpuinfo").read_text()
    order = {"amx": "amx_tile", "avx512_bf16": "avx512_bf16", "avx512_vnni": "avx512_vnni"}
    order |= {"avx512_base": "avx512f", "avx2": "avx2"}
    variant = next(name for name, flag in order.items() if f" {flag}" in flags)
    variant = os.environ.get("KT_KERNEL_CPU_VARIANT", variant)
    path = next(Path(spec.origin).parent.glob(f"_kt_kernel_ext_{variant}.*.so"))
    module_spec = importlib.util.spec_from_file_location("kt_kernel_ext", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def route(qlen: int, generator: torch.Generator, *, zipf: bool) -> torch.Tensor:
    """Distinct experts of each token [qlen, TOP_K]: drawn evenly, or expert of rank n with weight
    1/n, the ranks shuffled."""
    weights = torch.ones(EXPERTS)
    if zipf:
        weights = 1.0 / (1.0 + torch.randperm(EXPERTS, generator=generator))
    # Efraimidis and Spirakis: the largest u^(1/w) are a weighted draw without replacement.
    keys = torch.rand(qlen, EXPERTS, generator=generator).pow(1.0 / weights)
    return keys.topk(TOP_K, -1).indices.contiguous()


class Batch:
    """Inputs of one forward size; every layer has its own routing."""

    def __init__(self, qlen: int, layers: int, *, zipf: bool):
        generator = torch.Generator().manual_seed(qlen)
        self.qlen = qlen
        self.count = torch.tensor([qlen], dtype=torch.int32)
        self.x = torch.randn(qlen, HIDDEN, generator=generator).to(torch.bfloat16)
        self.out = torch.empty_like(self.x)
        self.routing = torch.softmax(torch.randn(qlen, TOP_K, generator=generator), -1)
        self.ids = [route(qlen, generator, zipf=zipf) for _ in range(layers)]

    def part(self, first: int, qlen: int) -> Batch:
        """Some of its tokens, in the same memory."""
        rows = slice(first, first + qlen)
        part = copy.copy(self)
        part.x, part.out, part.routing = self.x[rows], self.out[rows], self.routing[rows]
        part.ids = [ids[rows] for ids in self.ids]
        part.qlen = len(part.x)
        part.count = torch.tensor([part.qlen], dtype=torch.int32)
        return part

    def distinct_experts(self) -> float:
        return statistics.mean(len(ids.unique()) for ids in self.ids)


def reference(weights: Weights, batch: Batch, tokens: int) -> torch.Tensor:
    """float32, from the weights and adapter before any packing or rounding of ours."""
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
    """‖y − y_float32‖ / ‖y_float32‖ of both over ERROR_TOKENS tokens, in forwards of at most
    ``qlen``: one token alone would say little of an error that is mostly rounding of activations.
    """
    batch = Batch(max(qlen, ERROR_TOKENS), 1, zipf=False)
    expected = reference(weights, batch, ERROR_TOKENS)
    parts = [batch.part(first, qlen) for first in range(0, ERROR_TOKENS, qlen)]
    errors = []
    for forward in (engines[0].forward, engines[1].forward):
        for part in parts:
            forward(0, part)
        difference = batch.out[:ERROR_TOKENS].float() - expected
        errors.append(float(difference.norm() / expected.norm()))
    return errors


def onednn_party(weights: Weights, qlen: int) -> Callable[[], float]:
    """PyTorch's BF16 linear at the mean rows per expert, over changing experts; GFLOP/s."""
    rows = max(1, qlen * TOP_K // EXPERTS)
    x, act = torch.randn(rows, HIDDEN), torch.randn(rows, INTER)
    x, act = x.to(torch.bfloat16), act.to(torch.bfloat16)
    experts = itertools.cycle(range(EXPERTS))
    count = max(2, 512 // rows)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(min(count, EXPERTS)):
            e = next(experts)
            torch.nn.functional.linear(x, weights.gate[e])
            torch.nn.functional.linear(x, weights.up[e])
            torch.nn.functional.linear(act, weights.down[e])
        seconds = time.perf_counter() - start
        return 6.0 * rows * HIDDEN * INTER * min(count, EXPERTS) / seconds / 1e9

    return run


def settle() -> None:
    """Lets the threads of the party before go to sleep: kt_kernel's and OpenMP's spin for a while
    after their work, on the cores that the next party is measured on."""
    time.sleep(SETTLE_SECONDS)


def timed(forward: Callable[[int, Batch], None], batch: Batch, layers: int) -> float:
    """Seconds per layer, the party's own threads awake."""
    if batch.qlen < 64:  # beside more tokens, waking threads takes no time
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


def sample_rounds(
    ktrt: Ktrt, kt: KtKernel, batch: Batch, onednn: Callable[[], float] | None, rounds: int
) -> list[Sample]:
    probe = _core.ReadProbe(PROBE_BYTES)
    layers, has_lora = len(ktrt.layers), bool(kt.weights.lora)
    samples = []
    for index in range(rounds):
        settle()
        read_rate = PROBE_BYTES / probe.seconds(ktrt.engine)
        # Each comes first half of the time: whatever drifts meets both alike.
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
    nbytes = experts * (3 * HIDDEN * INTER * ELEMENT_BYTES[dtype] + lora_bytes)
    flops = 2.0 * qlen * TOP_K * 3 * (HIDDEN * INTER + rank * (HIDDEN + INTER))
    samples = sample_rounds(ktrt, kt, batch, onednn, rounds or (31 if qlen <= 16 else 15))

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
    zipf: bool,
) -> Iterator[dict[str, Any]]:
    """The rows of one dtype, and the machine with each of them."""
    threads = threads or len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
    torch.set_num_threads(threads)
    base = make_weights()
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
            row = measure_qlen((ktrt, kt), weights, batch, dtype, rounds)
            yield {"machine": machine, "row": row}


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


def _core_of(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(cpu)
