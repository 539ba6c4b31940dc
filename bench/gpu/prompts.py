"""Measures prompts on a GPU: their experts streamed and on the CPU, and long ones in one pass over
the bus against one for every 8,192 tokens.

    python bench/gpu/prompts.py            # V2-Lite's shape, 8 layers of INT8 experts
    python bench/gpu/prompts.py --small    # a trial of this script, without a GPU too

Random weights, made in memory. ``experts``: the streamed layers alone, whose copies overlap.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from model import Bench, make_config
from sections import Sections
from stream import seconds, synchronize

from ktrt.config.args import WEIGHT_FORMATS
from ktrt.experts.gpu import residents
from ktrt.experts.gpu.setup import prompt_bytes
from ktrt.layers.attention import accelerate_attention
from ktrt.layers.latent import use_latents

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.experts import GpuExperts

BACKENDS = {weight_format: backend for backend, weight_format in WEIGHT_FORMATS.items()}
# Relative error of logits between the ways: sums of float32 in another order, in bfloat16 models.
MOST_ERROR = 0.1
# The longest prompt that is computed on the CPU too.
_ON_CPU = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--formats", nargs="+", default=["int8"])
    parser.add_argument("--layers", type=int, default=8, help="with routed experts")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 32768])
    parser.add_argument("--threads", type=int, help="of the experts' engine; default: one per core")
    parser.add_argument("--lora", action="store_true", help="LoRA on everything")
    args = parser.parse_args()
    if args.small:
        args.layers, args.tokens, residents.BLOCK_TOKENS = 2, [64, 200], 64
    sections = Sections()
    for weight_format in args.formats:
        with sections.section(weight_format):
            bench = Bench.make(
                make_config(args.layers, small=args.small), BACKENDS[weight_format], args.threads
            )
            try:
                measure(bench, args, weight_format)
            finally:
                bench.close()
    return sections.status()


def measure(bench: Bench, args: argparse.Namespace, weight_format: str) -> None:
    if args.lora:
        bench.add_lora()
    accelerate_attention(bench.model, bench.engine, bench.patches, bench.running)
    use_latents(bench.model, bench.engine, bench.patches, bench.running)
    bench.share_resident(0)
    gpu = bench.gpu
    assert gpu is not None
    gpu.pin()
    gpu.threshold = 16
    copied = sum(gpu.layer_bytes(path) for path in gpu.layers) / 1e9
    print(f"{weight_format}: {args.layers} layers, {copied:.2f} GB a pass")
    layers = {str(index): layer for index, layer in bench.layers}
    print(
        "  tokens | experts             | seconds | of streamed | tokens/s | experts s | peak GB | "
        "planned | difference"
    )
    for tokens in args.tokens:
        reference: torch.Tensor | None = None
        before = 0.0
        for name, set_way in ways(gpu, tokens).items():
            set_way()
            took, peak, logits = one_prompt(bench, tokens)
            alone = experts_alone(bench, gpu, tokens) if gpu.threshold else 0.0
            reference = logits if reference is None else reference
            before = took if name.startswith("streamed") and not before else before
            error = float((logits - reference).norm() / reference.norm())
            planned = prompt_bytes(layers, gpu.most_tokens) / 1e9
            verdict = "" if error < MOST_ERROR else " WRONG"
            print(
                f"  {tokens:6d} | {name:19s} | {took:7.3f} | "
                f"{took / before if before else 0:11.2f} | {tokens / took:8.0f} | {alone:9.3f} | "
                f"{peak:7.2f} | {planned:7.2f} | {error:.1e}{verdict}",
                flush=True,
            )


def ways(gpu: GpuExperts, tokens: int) -> dict[str, Callable[[], None]]:
    """Returns the ways to compare for a prompt of this length, each as what switches to it."""

    def use(threshold: int, most: int) -> None:
        gpu.threshold, gpu.most_tokens = threshold, most

    block = residents.BLOCK_TOKENS
    passes = -(-tokens // block)
    found: dict[str, Callable[[], None]] = {f"streamed, {passes} passes": partial(use, 16, block)}
    if passes > 1:
        found["streamed, 1 pass"] = partial(use, 16, tokens)
    if tokens <= _ON_CPU:
        found["CPU"] = partial(use, 0, block)
    return found


def one_prompt(bench: Bench, tokens: int) -> tuple[float, float, torch.Tensor]:
    """Returns the seconds of the faster of two prompts after one, the GPU memory that they took in
    addition, and the last token's logits."""
    device, best = bench.model.get_input_embeddings().weight.device, float("inf")
    vocabulary = bench.model.config.vocab_size
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    on_gpu = torch.cuda.is_available()
    peak, cache = 0.0, None
    for _ in range(3):
        del cache
        cache, done = bench.cache(graph=False), 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        synchronize(device)
        start = time.perf_counter()
        while done < tokens:
            count = min(tokens - done, cache.prefill_chunk(tokens - done))
            logits = cache.forward(ids[done : done + count].tolist())
            done += count
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        if on_gpu:
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    return best, peak, logits.float().cpu()


@torch.inference_mode()
def experts_alone(bench: Bench, gpu: GpuExperts, tokens: int) -> float:
    """Returns the seconds of all streamed layers, without the rest of the model."""
    device, layer = gpu.device, bench.layers[0][1]
    states = torch.randn(tokens, layer.hidden_size, device=device).to(torch.bfloat16)
    scores = torch.rand(tokens, layer.num_experts, device=device)
    weights, ids = scores.topk(layer.top_k)
    pieces = [each.split(gpu.most_tokens) for each in (states, ids, weights)]

    def run() -> None:
        for part in zip(*pieces, strict=True):
            for share in gpu.layers.values():
                share.forward_streamed(*part)

    return seconds(run, device, 2)


if __name__ == "__main__":
    sys.exit(main())
