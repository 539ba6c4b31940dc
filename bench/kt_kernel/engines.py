"""The parties of compare.py: the same random layers in ktrt and in kt_kernel."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from coded import KT_CLASSES, Coded

from ktrt import _core
from ktrt.engine.formats import format_named

# DeepSeek-V2-Lite.
EXPERTS, TOP_K, HIDDEN, INTER = 64, 6, 2048, 1408
LORA_SCALE = 2.0


@dataclass
class Weights:
    gate: torch.Tensor  # [E, I, H] bfloat16
    up: torch.Tensor
    down: torch.Tensor  # [E, H, I]
    lora: dict[str, torch.Tensor]  # bfloat16 A and B, unscaled; empty without LoRA
    coded: dict[str, Coded] | None = None  # by projection; the above are then float32

    @property
    def rank(self) -> int:
        return self.lora["gate_a"].shape[1] if self.lora else 0


def make_weights() -> Weights:
    """Returns Gaussian values. Experts are different windows of one random pool: drawing 550
    million numbers takes longer than the measurement."""
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
    """Returns A and B of every projection; LoRA changes the outputs by tens of per cent."""
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
            weight_format=format_named(dtype).name,
        )
        for expert in range(EXPERTS):
            if weights.coded is not None:
                gate, up, down = (
                    (c.codes[expert], c.scales[expert]) for c in weights.coded.values()
                )
                layer.load_coded_expert(expert, gate, up, down)
                continue
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
            layer.load_lora(0, **folded)
            layer.activate_loras([0], [1.0])

    def base_forward(self, layer: int, batch: Batch) -> None:
        self.layers[layer].activate_loras([], [])
        self.forward(layer, batch)
        self.layers[layer].activate_loras([0], [1.0])

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
        # Keyed by the batch itself: a task points into its tensors and must not outlive them.
        self.tasks: dict[tuple[int, Batch], Any] = {}
        self.layers = [self._layer(dtype, index) for index in range(layers)]

    def _layer(self, dtype: str, index: int) -> Any:
        w = self.weights
        make = self.kt.moe.MOESFTConfig if w.lora else self.kt.moe.MOEConfig
        config = make(EXPERTS, TOP_K, HIDDEN, INTER)
        config.layer_idx, config.pool, config.max_len = index, self.cpu.backend_, self.max_len
        config.physical_to_logical_map = self.identity.data_ptr()
        if w.coded is not None:
            return self._coded_layer(config, dtype)
        config.gate_proj, config.up_proj = w.gate.data_ptr(), w.up.data_ptr()
        config.down_proj = w.down.data_ptr()
        if not w.lora:
            layer = getattr(self.kt.moe, f"{format_named(dtype).kt_backend}_MOE")(config)
            self.cpu.submit(layer.load_weights_task(self.identity.data_ptr()))
            self.cpu.sync()
            return layer
        config.lora_rank, config.lora_alpha = w.rank, LORA_SCALE * w.rank
        config.lora_dropout = 0.0  # else it is applied at inference
        config.share_backward_bb = config.share_cache_pool = True  # else weights double
        layer = getattr(self.kt.moe, f"{format_named(dtype).kt_backend}_SFT_MOE")(config)
        self.cpu.submit(layer.load_weights_task())
        self.cpu.sync()
        names = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
        layer.update_lora_weights(*(w.lora[name].data_ptr() for name in names))
        return layer

    def _coded_layer(self, config: Any, dtype: str) -> Any:
        assert self.weights.coded is not None
        name, config.quant_config.bits, config.quant_config.group_size = KT_CLASSES[dtype]
        config.quant_config.zero_point = False
        for projection, coded in self.weights.coded.items():
            for what, each in (("projs", coded.kt_codes), ("scales", coded.kt_scales)):
                setattr(config, f"{projection}_{what}", [[e.data_ptr() for e in each]])
        layer = getattr(self.kt.moe, name)(config)
        self.cpu.submit(layer.load_weights_task(self.identity.data_ptr()))
        self.cpu.sync()
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
    """Returns distinct experts of each token [qlen, TOP_K], drawn evenly or (``zipf``) with weight
    1/n for the n-th expert of a random order."""
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

    def window(self, first: int, qlen: int) -> Batch:
        """Returns a batch of some of the tokens, in the same memory."""
        rows = slice(first, first + qlen)
        found = copy.copy(self)
        found.x, found.out, found.routing = self.x[rows], self.out[rows], self.routing[rows]
        found.ids = [ids[rows] for ids in self.ids]
        found.qlen = len(found.x)
        found.count = torch.tensor([found.qlen], dtype=torch.int32)
        return found

    def distinct_experts(self) -> float:
        return statistics.mean(len(ids.unique()) for ids in self.ids)
