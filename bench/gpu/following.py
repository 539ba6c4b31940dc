"""Measures residents that follow the conversation against a static choice, on routing that drifts.

    python bench/gpu/following.py                # V2-Lite's shape, INT8, 14 layers, about 1 min
    python bench/gpu/following.py --small        # a trial of this script, without a GPU too

The routers' choices are replaced by made-up ones: each expert of a layer has a preference that all
texts share, one of the conversation, one that drifts with the tokens, and noise. Conversations
begin with a prompt and go on token by token. The same ones are decoded with the first experts on
the GPU; with those that other conversations used most; and with residents that follow, which start
from those. ``patterns``: without the conversations' own preferences and their drift the static
choice is the best one, and following can only cost.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from model import Bench, experts_of, make_config
from sections import Sections

from ktrt.config.args import WEIGHT_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ktrt.generate.runner import KvCache

BACKENDS = {weight_format: backend for backend, weight_format in WEIGHT_FORMATS.items()}
Result = dict[str, Any]


class Pattern(NamedTuple):
    """Standard deviations of the preferences of all texts, of a conversation, and of its drift."""

    shared: float
    own: float
    drift: float


# With noise of 1, and a drift that keeps 1/e after DRIFT_TOKENS.
PATTERNS = {
    "drifting": Pattern(0.5, 0.8, 0.6),
    "skewed": Pattern(1.0, 0.7, 0.6),
    "fast": Pattern(0.5, 0.5, 1.0),
    "static": Pattern(1.0, 0.0, 0.0),
    "uniform": Pattern(0.0, 0.0, 0.0),
}
DRIFT_TOKENS = {"fast": 50}


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sections, results = Sections(), list[Result]()
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    print(f"device: {name}; {args.moe_layers} layers of experts")
    for weight_format in args.formats:
        with sections.section(weight_format):
            results += measure(args, weight_format)
    if args.json:
        print(json.dumps({"device": name, "results": results}))
    return sections.status()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe-layers", type=int, default=14)
    parser.add_argument("--formats", default="int8", type=lambda text: text.split(","))
    parser.add_argument("--patterns", default=list(PATTERNS), type=lambda text: text.split(","))
    parser.add_argument("--threads", type=int, help="of the experts' engine; default: one per core")
    parser.add_argument("--gpu-experts", type=int, help="of each layer; default: a quarter")
    parser.add_argument("--conversations", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200, help="decoded in each conversation")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--streamed", action="store_true", help="the prompts' experts are streamed")
    parser.add_argument("--no-lora", action="store_true", help="default: r 8 everywhere")
    parser.add_argument("--small", action="store_true", help="tiny layers: does the script work?")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.small:
        args.moe_layers, args.conversations = min(args.moe_layers, 2), min(args.conversations, 1)
        args.tokens, args.prompt = min(args.tokens, 20), min(args.prompt, 16)
    return args


def conversations(
    pattern: str, count: int, tokens: int, layers: int, experts: int, top_k: int
) -> list[NDArray[np.int64]]:
    """Returns the experts chosen in each conversation [layers, tokens, top_k]."""
    shared, own, drift = PATTERNS[pattern]
    kept = np.exp(-1 / DRIFT_TOKENS.get(pattern, 150))
    random = np.random.default_rng(0)
    liked = random.normal(0, 1, (layers, experts)) * shared
    found = []
    for _ in range(count):
        mine = liked + random.normal(0, 1, (layers, experts)) * own
        moving = random.normal(0, 1, (layers, experts))
        chosen = np.empty((layers, tokens, top_k), np.int64)
        for token in range(tokens):
            moving = kept * moving + np.sqrt(1 - kept**2) * random.normal(0, 1, moving.shape)
            scores = mine + drift * moving + random.normal(0, 1, moving.shape)
            chosen[:, token] = np.argpartition(-scores, top_k - 1)[:, :top_k]
        found.append(chosen)
    return found


class Routing:
    """Replaces the routers' choices, in captured steps too."""

    def __init__(self, bench: Bench, most: int) -> None:
        self._most = most
        self._device = bench.model.get_input_embeddings().weight.device
        self._at = torch.zeros((), dtype=torch.int64, device=self._device)
        self._chosen = torch.empty(0)
        modules = [module for _, module in experts_of(bench.model)]
        for index, module in enumerate(modules):
            last = index == len(modules) - 1
            module.register_forward_pre_hook(self._replacing(index, last=last))

    def _replacing(self, index: int, *, last: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        def replace(
            _module: Any, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, ...]:
            states, ids, weights = args
            rows = self._at + torch.arange(len(ids), device=self._device)
            new = self._chosen[index].index_select(0, rows % self._chosen.shape[1])
            if last:
                self._at += len(ids)
            return states, new, weights

        return replace

    def begin(self, chosen: NDArray[np.int64]) -> None:
        """The next token is the first one of ``chosen``."""
        values = torch.from_numpy(chosen).to(self._device)
        if not len(self._chosen):
            self._chosen = torch.zeros_like(values[:, :1]).repeat(1, self._most, 1)
        self._chosen[:, : values.shape[1]] = values  # where captured steps read it
        self._at.zero_()


def measure(args: argparse.Namespace, weight_format: str) -> list[Result]:
    """Prints and returns the figures of every pattern."""
    config = make_config(args.moe_layers, small=args.small)
    bench = Bench.make(config, BACKENDS[weight_format], args.threads)
    if not args.no_lora:
        bench.add_lora()
    try:
        number = args.gpu_experts or bench.experts.count // 4
        bench.share_resident(number)
        assert bench.gpu is not None
        bench.gpu.pin()
        if args.streamed:
            bench.gpu.threshold = args.prompt
        with torch.inference_mode(False):
            routing = Routing(bench, args.prompt + args.tokens + 9)
        cache = bench.cache(graph=torch.cuda.is_available())
        print(f"{weight_format}, {number} of {bench.experts.count} experts on the GPU\n{HEADER}")
        return [
            row for name in args.patterns for row in one_pattern(args, bench, cache, routing, name)
        ]
    finally:
        bench.close()


def one_pattern(
    args: argparse.Namespace, bench: Bench, cache: KvCache, routing: Routing, pattern: str
) -> list[Result]:
    gpu, layers = bench.gpu, bench.layers
    assert gpu is not None
    number = len(next(iter(gpu.layers.values())).experts)
    texts = conversations(
        pattern, 2 * args.conversations, args.prompt + args.tokens, len(layers),
        bench.experts.count, layers[0][1].top_k,
    )  # fmt: skip
    others, texts = texts[args.conversations :], texts[: args.conversations]
    counts = {path: [0] * bench.experts.count for path in gpu.layers}
    for at, path in enumerate(gpu.layers):
        chosen = np.concatenate([text[at].ravel() for text in others])
        counts[path] = np.bincount(chosen, minlength=bench.experts.count).tolist()
    # Captures, where nothing was yet: a graph is compared with a plain forward, of other tokens.
    converse(args, bench, cache, routing, [texts[0][:, :1].repeat(args.prompt + 9, 1)])
    results: list[Result] = []
    logits: dict[str, torch.Tensor] = {}
    for way in ("first", "others'", "following"):
        gpu.select(number, None if way == "first" else counts)
        following = gpu.follow() if way == "following" else None
        if bench.hand_off is not None:
            bench.hand_off.meanwhile = following.step if following is not None else None
        held = [set(share.experts) for share in gpu.layers.values()]
        times, logits[way] = converse(args, bench, cache, routing, texts)
        hits = np.mean(
            [np.isin(text[at], list(held[at])) for text in texts for at in range(len(layers))]
        )
        row = {"pattern": pattern, "way": way, "ms": 1e3 * statistics.mean(times)}
        row |= {"median_ms": 1e3 * statistics.median(times), "hits": float(hits)}
        row |= {"uploads": 0.0, "adopted": 0}
        if following is not None:
            numbers = following.numbers
            row["hits"] = numbers.hits / max(1, numbers.hits + numbers.misses)
            row["uploads"] = numbers.uploads / len(times)
            row["adopted"] = numbers.adopted
        gpu.stay()
        row["error"] = error(logits[way], logits["first"])
        row["ratio"] = results[-1]["ms"] / row["ms"] if results else 1.0
        results.append(row)
        print_result(row)
    return results


def converse(
    args: argparse.Namespace, bench: Bench, cache: KvCache, routing: Routing,
    texts: Sequence[NDArray[np.int64]],
) -> tuple[list[float], torch.Tensor]:  # fmt: skip
    """Returns the seconds of each decode step, and its logits."""
    times, logits = [], []
    random = np.random.default_rng(1)
    for text in texts:
        ids: list[int] = random.integers(2, bench.model.config.vocab_size, text.shape[1]).tolist()
        routing.begin(text)
        prompt = ids[: args.prompt]
        if cache._slot is not None:
            cache.runner.pool.empty(cache._slot)  # nothing is reused
        cache.forward(prompt)
        for token in ids[args.prompt :]:
            start = time.perf_counter()
            found = cache.forward([token])
            times.append(time.perf_counter() - start)
            logits.append(found.float().cpu())
            if bench.hand_off is None and bench.gpu is not None and bench.gpu.following:
                bench.gpu.following.step()
    return times, torch.stack(logits)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest error of a step."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.max())


HEADER = (
    "pattern   residents   ms a token  median  × the row before  hits  copies a step  adopted  "
    "error"
)


def print_result(row: Result) -> None:
    print(
        f"{row['pattern']:9} {row['way']:11} {row['ms']:10.2f} {row['median_ms']:7.2f} "
        f"{row['ratio']:17.2f} {row['hits']:5.2f} {row['uploads']:14.2f} {row['adopted']:8} "
        f"{row['error']:6.4f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
