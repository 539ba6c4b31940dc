#!/usr/bin/env python3
"""Compares a whole model's decoding on the CPU, with and without LoRA, with the read bandwidth.

    python bench/make_v2lite.py /tmp/v2lite --layers 7       # 1 dense and 6 MoE layers, 8 GB
    python bench/cpu_decode.py /tmp/v2lite [--backends AMXBF16 AMXInt8 INT8] [--rank 8] [--json]
    python bench/cpu_decode.py /tmp/next --shape qwen3_next --layers 4   # makes it first: 5.5 GB
    python bench/cpu_decode.py /tmp/oss --shape gpt_oss --context 4096 --backends AMXInt8
    python bench/cpu_decode.py --quick                       # the demo model, for a smoke test

The limit of a token is the bytes of its weights (one row of the embeddings, top_k of each layer's
experts, all others) at the bandwidth of a plain read on the engine's threads. Probe, base and
adapter take turns in one process; ratios are medians over neighbouring runs. The adapter is random,
on every linear layer including routed experts (gpt-oss: without them); its bytes count as overhead.
INT8 is AMXInt8 with quantization_bit: 8, the other linear layers in INT8 too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a model on a GPU is bench/gpu/decode.py's
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from make_v2lite import make_model
from safetensors.torch import save_file
from shapes import SHAPES

from ktrt import _core
from ktrt.checkpoint.folder import Checkpoint
from ktrt.config import load_config
from ktrt.loading.inventory import BASE, loaded_inventory
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

DEMO = Path(__file__).resolve().parents[1] / "examples/demo/model"
PROBE_BYTES = 512 << 20


def write_adapter(model: Path, folder: Path, rank: int, seed: int = 0) -> Path:
    """Writes random LoRA on every linear layer of the checkpoint except head and routers."""
    checkpoint = Checkpoint(model)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    targets = set()
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") and not module.endswith("_proj_with_mqa"):
            continue
        if len(checkpoint.shape(name)) != 2:
            continue  # stacked experts
        targets.add(module.rpartition(".")[2])
        rows, columns = checkpoint.shape(name)
        key = f"base_model.model.{module}"
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = torch.randn(shape, generator=generator) * columns**-0.5 * 0.3
            tensors[f"{key}.lora_{part}.weight"] = values.to(torch.bfloat16)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(targets),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def bytes_per_token(model: Any) -> tuple[int, int]:
    """Returns the bytes (other weights, experts) that one token reads, without LoRA."""
    inventory = loaded_inventory(model)
    return round(inventory.read(*BASE)), round(sum(r.read for r in inventory.experts.values()))


def model_settings(model: Path, backend: str) -> dict[str, object]:
    """Returns the configuration of a model; ``backend``: a kt_backend, or INT8."""
    if backend == "INT8":
        return {"model_name_or_path": str(model), "kt_backend": "AMXInt8", "quantization_bit": 8}
    return {"model_name_or_path": str(model), "kt_backend": backend}


class Party:
    """A loaded model that decodes after a prompt."""

    def __init__(self, model: Path, adapter: Path | None, backend: str, cache: str | None) -> None:
        values = model_settings(model, backend)
        if cache:
            values["ktrt_cache_dir"] = cache
        if adapter is not None:
            values["adapter_name_or_path"] = str(adapter)
        config = load_config(values)
        self.loaded: LoadedModel = load_model(config.model, config.adapter, config.experts)
        self._cache: Any = None

    def prompt(self, length: int) -> float:
        """Returns the seconds that it takes."""
        self._cache = self.loaded.new_cache()
        begin = time.perf_counter()
        self._cache.forward([10 + i % 50 for i in range(length)])
        return time.perf_counter() - begin

    def seconds(self, tokens: int) -> float:
        """Returns seconds per token."""
        begin = time.perf_counter()
        for token in range(tokens):
            self._cache.forward([20 + token])
        return (time.perf_counter() - begin) / tokens


def measure(base: Party, lora: Party, args: argparse.Namespace) -> dict[str, float]:
    others, experts = bytes_per_token(base.loaded.model)
    engine, probe = base.loaded.engine, _core.ReadProbe(PROBE_BYTES)
    prompts = []
    for party in (base, lora):
        prompts.append(party.prompt(args.context))
        party.seconds(2)

    def limit() -> float:
        return probe.seconds(engine) / probe.nbytes * (others + experts)

    rounds = []
    for _ in range(args.rounds):
        first = limit()
        plain = base.seconds(args.tokens)
        second = limit()
        adapted = lora.seconds(args.tokens)
        rounds.append((plain, adapted, (first + second) / 2))
    median = statistics.median
    return {
        "prompt_ms": prompts[0] * 1e3,
        "gb_per_token": (others + experts) / 1e9,
        "experts_gb": experts / 1e9,
        "read_gb_per_s": median((others + experts) / 1e9 / t for _, _, t in rounds),
        "ms": median(plain * 1e3 for plain, _, _ in rounds),
        "limit_ms": median(t * 1e3 for _, _, t in rounds),
        "times_limit": median(plain / t for plain, _, t in rounds),
        "lora_ms": median(adapted * 1e3 for _, adapted, _ in rounds),
        "lora_slowdown": median(_neighbours(rounds)) - 1,
    }


def _neighbours(rounds: Sequence[tuple[float, float, float]]) -> list[float]:
    """Returns the ratios of adapter to base, of the same round and of the next one."""
    same = [adapted / plain for plain, adapted, _ in rounds]
    return same + [a[1] / b[0] for a, b in itertools.pairwise(rounds)]


def show(results: dict[str, dict[str, float]], threads: int) -> None:
    print(f"{threads} threads, {_core.kernels()['dense_bf16']} dense kernels")
    print(
        "| experts | prompt ms | GB a token | read GB/s | limit ms | decode ms | × limit | "
        "LoRA ms | LoRA |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for backend, r in results.items():
        print(
            f"| {backend} | {r['prompt_ms']:.0f} | {r['gb_per_token']:.2f} | "
            f"{r['read_gb_per_s']:.1f} | {r['limit_ms']:.1f} | {r['ms']:.1f} | "
            f"{r['times_limit']:.2f} | {r['lora_ms']:.1f} | {r['lora_slowdown']:+.1%} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="CPU decoding against the read bandwidth.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--backends", nargs="+", default=["AMXBF16", "AMXInt8", "INT8"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=2, help="decoded per turn")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--shape", choices=SHAPES, help="of a model to make if FOLDER has none")
    parser.add_argument("--layers", type=int, default=4, help="of that model")
    parser.add_argument("--cache", help="folder of the pack cache; default: ktrt's own")
    parser.add_argument("--quick", action="store_true", help="few rounds, one format")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.backends, args.rounds, args.tokens = args.backends[:1], 3, 1
    if args.shape and not (args.folder / "config.json").exists():
        make_model(args.folder, args.shape, args.layers)
    results = {}
    threads = 0
    with tempfile.TemporaryDirectory() as temporary:
        adapter = write_adapter(args.folder, Path(temporary) / "adapter", args.rank)
        for backend in args.backends:
            base = Party(args.folder, None, backend, args.cache)
            lora = Party(args.folder, adapter, backend, args.cache)
            threads = base.loaded.engine.num_threads
            results[backend] = measure(base, lora, args)
            base.loaded.close()
            lora.loaded.close()
    if args.json:
        print(json.dumps({"threads": threads, "context": args.context, "results": results}))
    else:
        show(results, threads)


if __name__ == "__main__":
    main()
