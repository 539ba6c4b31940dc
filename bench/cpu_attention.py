#!/usr/bin/env python3
"""Compares the engine's attention on the CPU with torch's kernel (prompts) and a read (one token).

    python bench/cpu_attention.py [--tokens 4096] [--threads 2] [--rounds 5]

Heads as published models have them, random numbers. Both parties take turns in one process; the
figures are medians. A prompt's error is of 16 positions, against float32. Single tokens go through
four layers, so that keys and values come from memory; the read is a plain one of as many bytes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ktrt import _core
from ktrt.engine import Engine
from ktrt.engine.torch_threads import set_torch_threads
from ktrt.layers.engine_attention import EngineAttention
from ktrt.layers.form import AttentionForm
from ktrt.layers.prompt_attention import attend_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Heads, groups, numbers of a key and of a value, window, sinks.
SHAPES = {
    "gpt-oss": (64, 8, 64, 64, 0, True),
    "gpt-oss, window": (64, 8, 64, 64, 128, True),
    "Qwen3-30B": (32, 4, 128, 128, 0, False),
    "Qwen3-Next": (16, 2, 256, 256, 0, False),
    "V2-Lite": (16, 16, 192, 128, 0, False),
}
LAYERS = 4
PROBE_BYTES = 256 << 20


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Case:
    """Random queries, keys and values of one layer of a shape."""

    def __init__(self, name: str, tokens: int, attention: EngineAttention) -> None:
        heads, groups, size, width, window, sinks = SHAPES[name]
        self.form = AttentionForm(
            size**-0.5, window, sinks=torch.linspace(-1, 2, heads) if sinks else None
        )
        self.attention, self.tokens = attention, tokens
        self.query = torch.randn(1, tokens, heads, size).bfloat16().transpose(1, 2)
        self.key = torch.randn(1, groups, tokens, size).bfloat16()
        self.value = torch.randn(1, groups, tokens, width).bfloat16()
        self.out = torch.empty(1, tokens, heads, width, dtype=torch.bfloat16)

    def prompt(self, engine: EngineAttention | None) -> float:
        states = self.query, self.key, self.value, self.form, self.out
        return seconds(lambda: attend_blocks(*states, start=0, engine=engine))

    def error(self) -> float:
        """Returns the relative error of ``out``."""
        heads, size = self.query.shape[1], self.query.shape[3]
        each = heads // self.key.shape[1]
        difference = whole = 0.0
        for at in range(0, self.tokens, max(1, self.tokens // 16)):
            seen = slice(self.form.first_of(at + 1), at + 1)
            key, value = (
                x[0, :, seen].float().repeat_interleave(each, 0) for x in (self.key, self.value)
            )
            query = self.query[0, :, at].float().view(heads, 1, size)
            scores = (query @ key.transpose(1, 2))[:, 0] * self.form.scaling
            if self.form.sinks is not None:
                scores = torch.cat([scores, self.form.sinks[:, None]], 1)
            expected = (scores.softmax(-1)[:, None, : key.shape[1]] @ value)[:, 0]
            difference += float((self.out[0, at].float() - expected).square().sum())
            whole += float(expected.square().sum())
        return math.sqrt(difference / whole)

    def step(self) -> Callable[[], object]:
        """Returns a function that computes the last position over all others."""
        form = replace(self.form, sinks=None)
        query, out = self.query[0, :, -1].contiguous(), self.out[0, -1].clone()
        run = self.attention.bind(query, self.key[0], self.value[0], out, form)
        return lambda: run(self.tokens, form.first_of(self.tokens))


def prompts(name: str, tokens: int, attention: EngineAttention, rounds: int) -> str:
    case = Case(name, tokens, attention)
    found: dict[str, list[float]] = {"torch": [], "engine": []}
    errors = dict.fromkeys(found, 0.0)
    for _ in range(rounds):
        for party, engine in (("torch", None), ("engine", attention)):
            found[party].append(case.prompt(engine))
            errors[party] = errors[party] or case.error()
    median = {party: statistics.median(times) for party, times in found.items()}
    return (
        f"| {name} | {median['torch'] * 1e3:.0f} | {median['engine'] * 1e3:.0f} | "
        f"{median['torch'] / median['engine']:.1f} | {errors['torch']:.2%} | "
        f"{errors['engine']:.2%} |"
    )


def steps(
    name: str, tokens: int, attention: EngineAttention, engine: Engine, rounds: int
) -> str:  # fmt: skip
    layers = [Case(name, tokens, attention) for _ in range(LAYERS)]
    run = [case.step() for case in layers]
    held = sum(x.nbytes for case in layers for x in (case.key, case.value))
    probe = _core.ReadProbe(PROBE_BYTES)
    pairs = []
    for _ in range(4 * rounds):
        read = probe.seconds(engine) / probe.nbytes * held
        pairs.append((seconds(lambda: [each() for each in run]), read))
    taken, read = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    return f"| {name} | {held / 1e6:.0f} | {taken * 1e3:.2f} | {read * 1e3:.2f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The engine's attention on the CPU.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    set_torch_threads(args.threads)
    engine = Engine(num_threads=args.threads)
    attention = EngineAttention(engine)
    with torch.inference_mode():
        print(f"{args.threads} threads, {args.tokens} tokens")
        print("| prompt | torch, ms | engine, ms | times | error, torch | error, engine |")
        print("|---|---|---|---|---|---|")
        for name in SHAPES:
            print(prompts(name, args.tokens, attention, args.rounds), flush=True)
        print(f"\n| one token, {LAYERS} layers | MB | engine, ms | plain read, ms |")
        print("|---|---|---|---|")
        for name, shape in SHAPES.items():
            if shape[4] == 0:
                print(steps(name, args.tokens, attention, engine, args.rounds), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
