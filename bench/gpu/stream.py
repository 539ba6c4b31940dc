"""Measures the GPU's share of the routed experts: rates, streaming against the engine, resident
experts.

    python bench/gpu/stream.py            # V2-Lite's layer, BF16 and INT8, under 90 s
    python bench/gpu/stream.py --small    # a trial of this script, without a GPU too

Random weights, made in memory. Times are per layer; ``streamed`` runs through all layers one after
the other, so copies overlap like in a model.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sections import Sections

from ktrt import _core
from ktrt._core import Engine, MoeLayer
from ktrt.engine.threads import num_threads
from ktrt.experts.gpu.costs import measure_engine, measure_gpu, streaming_threshold
from ktrt.experts.gpu.residents import GpuExperts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.experts.gpu.residents import GpuLayer

MAX_QLEN = 1024
LORA_SCALE = 0.3
# Relative errors against the engine. FP8 and grouped INT4 are rounded to bfloat16 on the GPU only.
MOST_ERROR = 5e-4
ROUNDED_ERROR = 6e-3


@dataclass(frozen=True)
class Sizes:
    experts: int
    top_k: int
    hidden: int
    inner: int
    layers: int
    tokens: Sequence[int]
    residents: Sequence[int]
    copy_bytes: int


V2_LITE = Sizes(64, 6, 2048, 1408, 3, (256, 1024, 4096, 8192, 16384), (8, 32), 256 << 20)
SMALL = Sizes(8, 2, 160, 176, 2, (16, 64), (2, 8), 1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 8])
    args = parser.parse_args()
    sections = Sections()
    sizes = SMALL if args.small else V2_LITE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(num_threads=num_threads(), max_qlen=MAX_QLEN)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"torch {torch.__version__}, {name}, {engine.num_threads} threads, {_core.isa()}")
    print(
        f"{sizes.layers} layers of {sizes.experts} experts, top {sizes.top_k}, hidden "
        f"{sizes.hidden}, intermediate {sizes.inner}"
    )
    with sections.section("copy rates"):
        copy_rates(sizes, device)
    pool = torch.randn(24_000_000, generator=torch.Generator().manual_seed(0))
    pool = (pool / sizes.hidden**0.5).to(torch.bfloat16)
    for weight_format in args.formats:
        layers: dict[str, MoeLayer] = {}
        with sections.section(f"{weight_format}: layers"):
            layers = make_layers(engine, sizes, weight_format, pool)
        for rank in args.ranks if layers else ():
            with sections.section(f"{weight_format}, LoRA r {rank}"):
                for layer in layers.values():
                    set_lora(layer, rank, pool)
                one_setting(sections, engine, layers, sizes, device, rank)
        del layers
    engine.close()
    return sections.status()


def make_layers(
    engine: Engine, sizes: Sizes, weight_format: Any, pool: torch.Tensor
) -> dict[str, MoeLayer]:
    """Makes layers; experts are windows of one random pool."""
    size = sizes.hidden * sizes.inner

    def window(index: int, rows: int, columns: int) -> torch.Tensor:
        start = index * 7919 * 32 % (pool.numel() - size)
        return pool[start : start + size].view(rows, columns)

    layers = {}
    for number in range(sizes.layers):
        layer = MoeLayer(
            engine,
            num_experts=sizes.experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.inner,
            weight_format=weight_format,
        )
        for expert in range(sizes.experts):
            at = (number * sizes.experts + expert) * 3
            layer.load_expert(
                expert,
                window(at, sizes.inner, sizes.hidden),
                window(at + 1, sizes.inner, sizes.hidden),
                window(at + 2, sizes.hidden, sizes.inner),
            )
        layers[f"layers.{number}"] = layer
    return layers


def set_lora(layer: MoeLayer, rank: int, pool: torch.Tensor) -> None:
    """Sets LoRA with the pool's values on all three projections; none for rank 0."""
    layer.activate_loras([], [])
    if rank == 0:
        return
    count, hidden, inner = layer.num_experts, layer.hidden_size, layer.intermediate_size

    def values(first: int, *shape: int) -> torch.Tensor:
        total = count * shape[0] * shape[1]
        return pool[first : first + total].float().view(count, *shape)

    up = {"a": values(11, rank, hidden), "b": LORA_SCALE * hidden**0.5 * values(17, inner, rank)}
    down = {"a": values(23, rank, inner), "b": LORA_SCALE * hidden**0.5 * values(29, hidden, rank)}
    layer.load_lora(
        0,
        gate_a=up["a"],
        gate_b=up["b"],
        up_a=up["a"].flip(1),
        up_b=up["b"].flip(1),
        down_a=down["a"],
        down_b=down["b"],
    )
    layer.activate_loras([0], [1.0])


def seconds(run: Callable[[], object], device: torch.device, repeat: int = 3) -> float:
    """Returns the seconds of the fastest run after one warm-up; waits for the device."""
    best = float("inf")
    for _ in range(repeat + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rates(sizes: Sizes, device: torch.device) -> None:
    target = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    rates = {}
    for name in ("pageable", "pinned"):
        source = torch.ones(sizes.copy_bytes, dtype=torch.uint8)
        if name == "pinned" and device.type == "cuda":
            source = source.pin_memory()
        took = seconds(partial(target.copy_, source, non_blocking=True), device)
        rates[name] = sizes.copy_bytes / took / 1e9
    print("host to device: " + ", ".join(f"{n} {r:.1f} GB/s" for n, r in rates.items()))


def sample(
    sizes: Sizes, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, sizes.hidden, generator=generator).to(torch.bfloat16)
    ids = torch.rand(tokens, sizes.experts, generator=generator).topk(sizes.top_k).indices
    weights = torch.rand(tokens, sizes.top_k, generator=generator)
    return states.to(device), ids.to(device), weights.to(device)


def run_engine(
    layer: MoeLayer, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.empty_like(states)
    for at in range(0, len(states), MAX_QLEN):
        rows = slice(at, at + MAX_QLEN)
        layer.forward(states[rows], ids[rows], weights[rows], out[rows])
    return out


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float().cpu() - expected.float()).norm() / expected.float().norm())


def most_error(layers: dict[str, MoeLayer]) -> float:
    name = next(iter(layers.values())).weight_format
    return ROUNDED_ERROR if name.startswith(("fp8", "int4_g")) else MOST_ERROR


def one_setting(
    sections: Sections,
    engine: Engine,
    layers: dict[str, MoeLayer],
    sizes: Sizes,
    device: torch.device,
    rank: int,
) -> None:
    first = next(iter(layers.values()))
    experts = GpuExperts(layers, device)
    start = time.perf_counter()
    experts.pin()
    pinning = time.perf_counter() - start
    gigabytes = experts.layer_bytes("layers.0") / 1e9
    print(
        f"\n{first.weight_format}, LoRA r {rank}: {gigabytes:.3f} GB a layer; pinned "
        f"{experts.pinned_bytes / 1e9:.2f} GB in {pinning:.2f} s, not pinned "
        f"{experts.unpinned_bytes / 1e9:.2f} GB"
    )
    name = f"{first.weight_format}, LoRA r {rank}"
    try:
        with sections.section(f"{name}: streamed against the engine"):
            check_numbers(layers, experts, sizes, device)
        with sections.section(f"{name}: streaming"):
            streaming_table(layers, experts, sizes, device, gigabytes)
        with sections.section(f"{name}: threshold"):
            cpu = measure_engine(first, engine.max_qlen)
            gpu = measure_gpu(experts, experts.layers["layers.0"], first)
            threshold = streaming_threshold(cpu, gpu, engine.max_qlen)
            print(f"threshold: {threshold} tokens (CPU {cpu}, GPU {gpu})")
        for number in sizes.residents:
            with sections.section(f"{name}: {number} resident experts"):
                residents(layers, experts, sizes, device, number)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        print(f"most GPU memory so far: {memory / 1e9:.2f} GB")
    finally:
        experts.close()


def check_numbers(
    layers: dict[str, MoeLayer], experts: GpuExperts, sizes: Sizes, device: torch.device
) -> None:
    """Compares streaming with the engine in float32, before the last rounding."""
    states, ids, weights = sample(sizes, min(sizes.tokens[-1], 512), torch.device("cpu"))
    arguments, worst = (states.float(), ids, weights), 0.0
    on_device = [tensor.to(device) for tensor in arguments]
    for path, layer in layers.items():
        found = experts.layers[path].forward_streamed(*on_device)
        worst = max(worst, error(found, run_engine(layer, *arguments)))
    verdict = "ok" if worst < most_error(layers) else "WRONG"
    print(f"streamed against the engine, float32: relative error {worst:.1e} {verdict}")


def streaming_table(
    layers: dict[str, MoeLayer],
    experts: GpuExperts,
    sizes: Sizes,
    device: torch.device,
    gigabytes: float,
) -> None:
    """Prints milliseconds per layer. ``issue``: until the host is free; ``GB/s``: of the copies,
    if nothing else took time; the engine's longest inputs are extrapolated from one call."""
    print("  tokens | engine ms | streamed ms | issue ms |  GB/s | speed-up")
    shares = list(experts.layers.values())
    layer = layers["layers.0"]
    engine_ms, measured = 0.0, 1
    for tokens in sizes.tokens:
        on_host = sample(sizes, tokens, torch.device("cpu"))
        if tokens <= MAX_QLEN:
            run = partial(run_engine, layer, *on_host)
            engine_ms, measured = seconds(run, torch.device("cpu"), 2) * 1e3, tokens
        whole_ms = engine_ms * tokens / measured
        inputs = [tensor.to(device) for tensor in on_host]
        issued = [0.0]
        streamed = seconds(partial(stream_all, shares, inputs, issued), device, 2)
        milliseconds = streamed / len(shares) * 1e3
        print(
            f"  {tokens:6d} | {whole_ms:9.2f} | {milliseconds:11.2f} | "
            f"{issued[0] / len(shares) * 1e3:8.2f} | {gigabytes / milliseconds * 1e3:5.1f} | "
            f"{whole_ms / milliseconds:8.2f}"
        )


def stream_all(
    shares: Sequence[GpuLayer], inputs: Sequence[torch.Tensor], issued: list[float]
) -> None:
    start = time.perf_counter()
    for share in shares:
        share.forward_streamed(*inputs)
    issued[0] = time.perf_counter() - start


def residents(
    layers: dict[str, MoeLayer],
    experts: GpuExperts,
    sizes: Sizes,
    device: torch.device,
    number: int,
) -> None:
    """Measures one token on resident experts, in a CUDA graph; then many tokens, grouped."""
    start = time.perf_counter()
    experts.select(number)
    synchronize(device)
    took = time.perf_counter() - start
    share, layer = experts.layers["layers.0"], layers["layers.0"]
    host = sample(sizes, 1, torch.device("cpu"))
    host[1][0] = torch.arange(sizes.top_k) * number // 2 % sizes.experts
    inputs = [host[0].float().to(device), *(tensor.to(device) for tensor in host[1:])]
    replay, outputs = captured(list(experts.layers.values()), inputs, device)
    decode = seconds(replay, device, 20) / len(layers)
    rest = run_engine(layer, host[0].float(), outputs[0].cpu(), host[2])
    whole = run_engine(layer, host[0].float(), *host[1:])
    worst = error(outputs[1].cpu() + rest, whole)
    verdict = "ok" if worst < most_error(layers) else "WRONG"
    many = [tensor.to(device) for tensor in sample(sizes, sizes.tokens[1], torch.device("cpu"))]
    grouped = seconds(lambda: share.forward_resident(*many), device)
    alone = seconds(lambda: run_engine(layer, *host), torch.device("cpu"), 20)
    print(
        f"{number} resident experts ({experts.resident_bytes / 1e9:.2f} GB, chosen and copied in "
        f"{took:.2f} s): one token {decode * 1e6:.0f} us in a graph (engine, all experts: "
        f"{alone * 1e6:.0f} us), {sizes.tokens[1]} tokens {grouped * 1e3:.2f} ms; error "
        f"{worst:.1e} {verdict}"
    )


def captured(
    shares: Sequence[GpuLayer], inputs: Sequence[torch.Tensor], device: torch.device
) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """Returns a function that replays one token of all layers, and the first layer's ids and
    sums."""
    outputs: list[torch.Tensor] = []

    def step() -> None:
        outputs.clear()
        for share in shares:
            outputs.extend([share.cpu_ids(inputs[1]), share.forward_resident(*inputs)])

    step()
    if device.type != "cuda":
        return step, outputs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, outputs


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
