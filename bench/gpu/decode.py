"""Measures decoding with all but the routed experts on a GPU, against the bandwidth bound.

    python bench/gpu/decode.py                     # V2-Lite's shape, BF16 and INT8, about 4 min
    python bench/gpu/decode.py --moe-layers 4      # less memory and time
    python bench/gpu/decode.py --gpu-experts 16 32 # then also with experts on the GPU
    python bench/gpu/decode.py --small             # a trial of this script, without a GPU too

Weights are random and made in place; nothing is read from or written to disk. ``bound``: tokens per
second if only the packed expert weights were read, at the bandwidth measured in the same run.
``experts`` is the time of the experts alone; the rest of a token is the GPU's and the hand-offs'.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from model import Bench, make_config
from reference import offloaded_seconds_per_token, reference_model
from sections import Sections

from ktrt._core import ReadProbe
from ktrt.config.args import WEIGHT_FORMATS
from ktrt.generate.loop import generate_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.runner import KvCache

BACKENDS = {weight_format: backend for backend, weight_format in WEIGHT_FORMATS.items()}
PROBE_BYTES = 1 << 30
WARM_UP = 10
Result = dict[str, Any]


def main() -> int:
    args = parse_args()
    # Shows the chosen kernels, and reasons for missing graphs.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sections = Sections()
    checks: list[Result] = []
    results: list[Result] = []
    print(f"device: {device_name()}; relative errors of logits, three layers, LoRA on:")
    for weight_format in args.formats:
        with sections.section(f"{weight_format}: logits"):
            checks.append(check(args, weight_format))
            print_check(checks[-1])
    for weight_format in args.formats:
        with sections.section(f"{weight_format}: speed"):
            measure(args, sections, weight_format, results)
    report: Result = {"device": device_name(), "checks": checks, "results": results}
    if args.reference:
        with sections.section("HF + PEFT, experts offloaded"):
            report["offloaded_tokens_per_s"] = 1 / offloaded_seconds_per_token(
                make_config(min(args.moe_layers, 2), small=args.small), args.moe_layers
            )
            speed = report["offloaded_tokens_per_s"]
            print(f"HF + PEFT, experts offloaded: {speed:.2f} tokens/s")
    if args.json:
        print(json.dumps(report))
    return sections.status()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe-layers", type=int, default=26)
    parser.add_argument("--formats", default="bf16,int8", type=lambda text: text.split(","))
    parser.add_argument("--threads", type=int, help="of the experts' engine; default: one per core")
    parser.add_argument("--tokens", type=int, default=100, help="decoded per measurement")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before the first token")
    parser.add_argument("--context", type=int, default=8000, help="tokens for the GPU memory")
    parser.add_argument(
        "--gpu-experts", nargs="+", type=int, default=[], help="of each layer, in turn"
    )
    parser.add_argument("--reference", action="store_true", help="HF + PEFT, experts offloaded")
    parser.add_argument("--small", action="store_true", help="tiny layers: does the script work?")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.small:
        args.moe_layers, args.prompt = min(args.moe_layers, 2), min(args.prompt, 64)
        args.tokens, args.context = min(args.tokens, 20), min(args.context, 300)
    return args


def check(args: argparse.Namespace, weight_format: str) -> Result:
    """Returns relative errors of the logits of a model of three layers, LoRA on: graph against
    eager in bfloat16; then, with all but the experts in float32, both against float32 on the CPU
    with merged LoRA. (In bfloat16 a router near a tie may choose other experts, which is no
    error.)"""
    config = make_config(2, small=args.small)
    bench = Bench.make(config, BACKENDS[weight_format], args.threads)
    try:
        bench.add_lora()
        ids = tokens(48, config.vocab_size)
        eager, graph = (teacher_forced(bench.cache(graph=graph), ids) for graph in (False, True))
        result: Result = {"format": weight_format, "graph_vs_eager_bf16": error(graph, eager)}
        bench.model.float()
        if bench.fused_lora is not None:
            bench.fused_lora.refresh()
        eager, graph = (teacher_forced(bench.cache(graph=graph), ids) for graph in (False, True))
        with torch.inference_mode():
            expected = reference_model(bench, config)(torch.tensor([ids])).logits[0, 31:]
    finally:
        bench.close()
    return result | {
        "graph_vs_eager": error(graph, eager),
        "eager_vs_float32": error(eager, expected),
        "graph_vs_float32": error(graph, expected),
    }


def teacher_forced(cache: KvCache, ids: Sequence[int]) -> torch.Tensor:
    """Returns logits after 32, 33, … tokens; feeds the later ones one by one."""
    chunks = [ids[:32], *([each] for each in ids[32:])]
    return torch.stack([cache.forward(chunk).float().cpu() for chunk in chunks])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the median over positions: one router near a tie must not decide."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.median())


def measure(
    args: argparse.Namespace, sections: Sections, weight_format: str, results: list[Result]
) -> None:
    """Measures one format: LoRA off and on, host-launched and by graph; then with some experts on
    the GPU. Prints the figures at once."""
    start = time.perf_counter()
    bench = Bench.make(
        make_config(args.moe_layers, small=args.small), BACKENDS[weight_format], args.threads
    )
    built = time.perf_counter() - start
    probe = ReadProbe(PROBE_BYTES)
    bandwidth = PROBE_BYTES / min(probe.seconds(bench.engine) for _ in range(7))
    del probe
    bound = bandwidth / bench.bytes_per_token
    print(
        f"{weight_format}: bound {bound:.1f} tokens/s at {bandwidth / 1e9:.1f} GB/s; built in "
        f"{built:.0f} s\n{HEADER}"
    )

    def setting(*, lora: bool, graph: bool, on_gpu: int) -> None:
        name = f"{weight_format}: LoRA {lora}, graph {graph}, {on_gpu} experts on the GPU"
        with sections.section(name):
            figures = one_setting(args, bench, graph=graph)
            figures["experts_ms"] = experts_alone(bench)
            results.append(
                {"format": weight_format, "lora": lora, "graph": graph, "on_gpu": on_gpu}
                | {"bound_tokens_per_s": bound, "bandwidth_gb_s": bandwidth / 1e9, **figures}
                | {"of_bound": figures["tokens_per_s"] / bound, "build_s": built}
            )
            print_result(results[-1])

    try:
        for lora in (False, True):
            if lora:
                bench.add_lora()
            for graph in (False, True):
                setting(lora=lora, graph=graph, on_gpu=0)
        with sections.section(f"{weight_format}: GPU memory"):
            memory = memory_at(args, bench)
            print(f"{weight_format}: GB at {memory}")
        for number in args.gpu_experts:
            with sections.section(f"{weight_format}: {number} experts to the GPU"):
                bench.share(number)
                setting(lora=True, graph=True, on_gpu=number)
    finally:
        bench.close()


def one_setting(args: argparse.Namespace, bench: Bench, *, graph: bool) -> Result:
    vocabulary = bench.model.config.vocab_size
    first = []
    for attempt in range(3):
        prompt = tokens(args.prompt, vocabulary, seed=attempt)
        start = time.perf_counter()
        next(generate_step(bench.cache(graph=graph), prompt, greedy))
        first.append(time.perf_counter() - start)
    cache, times = bench.cache(graph=graph), []
    steps = generate_step(cache, tokens(128, vocabulary), greedy)
    for _ in range(WARM_UP + args.tokens):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    times = sorted(times[WARM_UP:])
    if graph and bench.hand_off is not None and not cache.has_graphs:
        raise RuntimeError("no graph was captured; see the warning above")
    return {
        "tokens_per_s": 1 / statistics.median(times),
        "ms_best": times[0] * 1e3,
        "ms_p90": times[int(0.9 * len(times))] * 1e3,
        "first_token_s": min(first[1:]),
    }


def experts_alone(bench: Bench) -> float:
    """Returns milliseconds of one token's routed experts, called by the host on CPU tensors."""
    hidden, count = bench.experts.hidden, bench.experts.count
    generator, times = torch.Generator().manual_seed(0), []
    states = torch.randn(1, hidden, generator=generator).to(torch.bfloat16)
    out, weights = torch.empty_like(states), torch.full((1, bench.layers[0][1].top_k), 0.2)
    for _ in range(30):
        ids = [
            torch.randperm(count, generator=generator)[None, : weights.shape[1]].contiguous()
            for _ in bench.layers
        ]
        start = time.perf_counter()
        for index, (_, layer) in zip(ids, bench.layers, strict=True):
            layer.forward(states, index, weights, out)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[5:])


def memory_at(args: argparse.Namespace, bench: Bench) -> Result:
    """Returns the peak GPU memory of a conversation of ``args.context`` tokens: of torch's
    allocator, and in total."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    steps = generate_step(
        bench.cache(graph=True), tokens(args.context, bench.model.config.vocab_size), greedy
    )
    times = []
    for _ in range(20):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    return {
        "context": args.context,
        "weights": weights / 1e9,
        "peak_allocated": torch.cuda.max_memory_allocated() / 1e9,
        "peak_reserved": torch.cuda.max_memory_reserved() / 1e9,
        "device_used": (total - min(free, torch.cuda.mem_get_info()[0])) / 1e9,
        "tokens_per_s": 1 / statistics.median(times[5:]),
    }


def greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, vocabulary, (count,), generator=generator).tolist()
    return found


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"


HEADER = (
    "format lora  graph on GPU  tokens/s  of bound  median,best,p90 ms      experts ms  "
    "first token s"
)


def print_check(row: Result) -> None:
    print(
        f"  {row['format']:5} graph/eager {row['graph_vs_eager_bf16']:.4f} (bf16) "
        f"{row['graph_vs_eager']:.4f}  eager/float32 {row['eager_vs_float32']:.4f}  "
        f"graph/float32 {row['graph_vs_float32']:.4f}"
    )


def print_result(row: Result) -> None:
    median = 1e3 / row["tokens_per_s"]
    print(
        f"{row['format']:6} {row['lora']!s:5} {row['graph']!s:5} {row['on_gpu']:6} "
        f"{row['tokens_per_s']:9.1f} {row['of_bound']:9.1%}  {median:7.2f} {row['ms_best']:7.2f} "
        f"{row['ms_p90']:7.2f} {row['experts_ms']:10.2f} {row['first_token_s']:14.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
