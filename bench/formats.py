#!/usr/bin/env python3
"""Compares the weight formats on one MoE layer of DeepSeek-V2-Lite's shape, on this machine.

    python bench/formats.py [--formats bf16,int8,fp8,…] [--qlens 1,16,1024] [--threads N] [--json]

In each round a plain read of memory and every format take turns, on several layers so that caches
do not help; every figure is a median over rounds. ``of read``: the bytes of the distinct experts,
scales included, at the time of the forward, over the read bandwidth of the same round. ``x BF16``:
BF16's time over the format's. ``LoRA``: what an adapter of ``--rank`` adds. Codes and scales are
random: only times are measured here (errors: bench/format_errors.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from ktrt import _core
from ktrt.engine.formats import format_named
from ktrt.engine.threads import num_threads
from ktrt.engine.torch_threads import set_torch_threads

EXPERTS, TOP_K, HIDDEN, INTER = 64, 6, 2048, 1408
FORMATS = "bf16,int8,fp8,fp8_channel,int4_g32,int4_g64,int4_g128,mxfp4"
# All formats have as many bytes of layers, more than the caches.
LAYER_BYTES = 1.2e9
PROBE_BYTES = 1 << 30
_SETTLE = 0.02


@dataclass
class Party:
    """The layers of one format, taken in turn, and its times in seconds."""

    name: str
    layers: list[_core.MoeLayer]
    turn: int = 0
    times: dict[int, list[float]] = field(default_factory=dict)
    tuned: dict[int, list[float]] = field(default_factory=dict)
    shares: dict[int, list[float]] = field(default_factory=dict)

    def seconds(self, batch: Batch) -> float:
        forwards = max(1, 64 // batch.qlen)
        spent = 0.0
        for _ in range(forwards):
            layer = self.layers[self.turn % len(self.layers)]
            ids = batch.ids[self.turn % len(batch.ids)]
            self.turn += 1
            start = time.perf_counter()
            layer.forward(batch.x, ids, batch.routing, batch.out)
            spent += time.perf_counter() - start
        return spent / forwards

    def activate(self, *, lora: bool) -> None:
        for layer in self.layers:
            layer.activate_loras([0] if lora else [], [1.0] if lora else [])


class Batch:
    """Inputs of one size, with several routings."""

    def __init__(self, qlen: int) -> None:
        generator = torch.Generator().manual_seed(qlen)
        self.qlen = qlen
        self.x = torch.randn(qlen, HIDDEN, generator=generator).bfloat16()
        self.out = torch.empty_like(self.x)
        self.routing = torch.full((qlen, TOP_K), 1 / TOP_K)
        self.ids = [
            torch.rand(qlen, EXPERTS, generator=generator).topk(TOP_K).indices.contiguous()
            for _ in range(16)
        ]
        self.experts = statistics.mean(len(ids.unique()) for ids in self.ids)


def matrix(name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random codes and scales of about 1 / sqrt(columns)."""
    each = format_named(name)
    codes = torch.randint(0, 255, (rows, columns * each.bits // 8), dtype=torch.uint8)
    if each.bits == 8:
        codes[(codes & 0x7F) > 0x48] = 0x30  # E4M3 up to 4
        shape = (-(-rows // 32), -(-columns // 128)) if each.group else (rows,)
        return codes, torch.full(shape, columns**-0.5)
    shape = (rows, -(-columns // each.group))
    if name == "mxfp4":
        return codes, torch.full(shape, 120, dtype=torch.uint8)
    return codes, torch.full(shape, columns**-0.5 / 4).bfloat16()


def make_party(engine: _core.Engine, name: str, rank: int) -> Party:
    each = format_named(name)
    size = 3 * (each.code_bytes(INTER, HIDDEN) + each.scale_bytes(INTER, HIDDEN)) * EXPERTS
    layers = []
    for _ in range(max(2, round(LAYER_BYTES / size))):
        layer = _core.MoeLayer(
            engine, num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN,
            intermediate_size=INTER, weight_format=each.name,
        )  # fmt: skip
        if each.coded:
            wide, tall = matrix(name, INTER, HIDDEN), matrix(name, HIDDEN, INTER)
            for expert in range(EXPERTS):
                layer.load_coded_expert(expert, wide, wide, tall)
        else:
            gate = torch.randn(INTER, HIDDEN).bfloat16() * HIDDEN**-0.5
            down = torch.randn(HIDDEN, INTER).bfloat16() * INTER**-0.5
            for expert in range(EXPERTS):
                layer.load_expert(expert, gate, gate, down)
        layer.load_lora(0, **lora(rank))
        layers.append(layer)
    return Party(name, layers)


def lora(rank: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, out, inner in (
        ("gate", INTER, HIDDEN),
        ("up", INTER, HIDDEN),
        ("down", HIDDEN, INTER),
    ):
        found[f"{name}_a"] = torch.randn(EXPERTS, rank, inner) * inner**-0.5
        found[f"{name}_b"] = torch.randn(EXPERTS, out, rank) * 0.1
    return found


def measure(parties: list[Party], batch: Batch, engine: _core.Engine, rounds: int) -> None:
    probe = _core.ReadProbe(PROBE_BYTES)
    for party in parties:
        party.activate(lora=False)
        party.seconds(batch)
    for _ in range(rounds):
        time.sleep(_SETTLE)
        rate = PROBE_BYTES / probe.seconds(engine)
        for party in parties:
            party.activate(lora=False)
            seconds = party.seconds(batch)
            layer = party.layers[0]
            size = layer.packed_bytes / EXPERTS * batch.experts
            party.times.setdefault(batch.qlen, []).append(seconds)
            party.shares.setdefault(batch.qlen, []).append(size / seconds / rate)
            party.activate(lora=True)
            party.tuned.setdefault(batch.qlen, []).append(party.seconds(batch) / seconds)


def rows(parties: list[Party], qlens: list[int]) -> list[dict[str, Any]]:
    found = []
    first = parties[0]
    for qlen in qlens:
        for party in parties:
            pairs = zip(first.times[qlen], party.times[qlen], strict=True)
            seconds = statistics.median(party.times[qlen])
            found.append({
                "qlen": qlen, "format": party.name, "ms": 1e3 * seconds,
                "of_read": statistics.median(party.shares[qlen]),
                "times_first": statistics.median(a / b for a, b in pairs),
                "gflops": 6e-9 * qlen * TOP_K * HIDDEN * INTER / seconds,
                "lora_cost": statistics.median(party.tuned[qlen]) - 1,
            })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--qlens", default="1,16,1024")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=0, help="default: 21; 5 from 64 tokens on")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    qlens = [int(each) for each in args.qlens.split(",")]
    threads = num_threads(args.threads)
    set_torch_threads(threads)
    engine = _core.Engine(num_threads=threads, max_qlen=max(qlens))
    parties = [make_party(engine, name, args.rank) for name in args.formats.split(",")]
    for qlen in qlens:
        measure(parties, Batch(qlen), engine, args.rounds or (21 if qlen < 64 else 5))
    found = rows(parties, qlens)
    if args.json:
        print(json.dumps({"isa": _core.isa(), "threads": threads, "rows": found}))
        return 0
    print(f"{_core.isa()}, {threads} threads; one layer of {EXPERTS} experts, top {TOP_K}")
    print(
        f"{'qlen':>5} {'format':12}{'ms':>9}{'of read':>9}{'x first':>9}{'GFLOP/s':>9}{'LoRA':>8}"
    )
    for row in found:
        print(
            f"{row['qlen']:>5} {row['format']:12}{row['ms']:>9.2f}{row['of_read']:>9.0%}"
            f"{row['times_first']:>9.2f}{row['gflops']:>9.0f}{row['lora_cost']:>+8.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
