"""The measurements of compare_llama_cpp.py, and their table."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from llama_cpp_model import Shape

# Bytes per weight (experts, rest): ktrt's, llama.cpp's. INT8's scales are left out: one per row of
# 512 weights or more is below 1 %.
Q8_0 = (34 / 32, 34 / 32)
BYTES = {
    "bf16": ((2.0, 2.0), (2.0, 2.0)),
    "int8": ((1.0, 1.0), Q8_0),
    "int8-experts": ((1.0, 2.0), Q8_0),
}
CHECKED_TOKENS = 48
NAMES = {"bf16": "BF16", "int8": "INT8 · Q8_0", "int8-experts": "INT8 experts · Q8_0"}
Row = dict[str, Any]


class Size(NamedTuple):
    """A measurement: a prompt, then ``new`` tokens; ``phases``: its times that count."""

    prompt: int
    new: int
    phases: tuple[str, ...]


# Tokens before decoding, with a GPU.
SHALLOW, DEEP = 32, 16384
GPU_PROMPTS = (1024, 8192)
# (ktrt, llama.cpp) of each round, by LoRA and size.
Samples = dict[tuple[bool, Size], list[tuple[Row, Row]]]


def sizes_of(args: argparse.Namespace) -> list[Size]:
    """Returns the measurements of a round."""
    if not args.gpu:
        return [Size(args.prompt or 512, args.new, ("prefill", "decode"))]
    prompts = GPU_PROMPTS if args.prompt is None else (args.prompt,)
    depths = SHALLOW, DEEP if args.depth is None else args.depth
    found = [Size(prompt, 0, ("prefill",)) for prompt in prompts]
    return [*found, *(Size(depth, args.new, ("decode",)) for depth in depths)]


def context_of(args: argparse.Namespace) -> int:
    """Returns the tokens of the longest measurement, or of the check."""
    return max(*(each.prompt + each.new + 1 for each in sizes_of(args)), CHECKED_TOKENS)


def rows_of(name: str, samples: Samples, shape: Shape, *, gpu: bool = False) -> Iterator[Row]:
    """Yields a row per LoRA setting, size and phase; with a GPU only experts are read from RAM."""
    sizes = [shape.token_bytes(experts, 0 if gpu else rest) for experts, rest in BYTES[name]]
    for (lora, size), pairs in samples.items():
        for phase in size.phases:
            tokens = size.prompt if phase == "prefill" else 1
            ktrt_times = [pair[0][phase] / tokens for pair in pairs]
            their_times = [pair[1][phase] / tokens for pair in pairs]
            ratios = [b / a for a, b in zip(ktrt_times, their_times, strict=True)]
            yield {
                "format": name, "lora": lora, "phase": phase, "prompt": size.prompt,
                "ktrt": 1 / statistics.median(ktrt_times),
                "llama_cpp": 1 / statistics.median(their_times),
                "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                "of_read": _shares(pairs, sizes) if phase == "decode" else None,
                "ktrt_rounds": [1 / each for each in ktrt_times],
                "llama_cpp_rounds": [1 / each for each in their_times],
            }  # fmt: skip


def _shares(pairs: Sequence[tuple[Row, Row]], sizes: Sequence[float]) -> list[float]:
    """Returns the weights' bytes over the time, against the neighbouring read, of each party."""
    return [
        statistics.median(size / pair[party]["decode"] / pair[party]["read"] for pair in pairs)
        for party, size in enumerate(sizes)
    ]


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table; tokens per second."""
    depths = len({row["prompt"] for row in rows if row["phase"] == "decode"})
    lines = [
        "| | ktrt, tokens/s | llama.cpp, tokens/s | times as fast | of the rounds "
        "| share of the read bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        phase = f"prompt of {row['prompt']}" if row["phase"] == "prefill" else "decoding"
        if row["phase"] == "decode" and depths > 1:
            phase += f" after {row['prompt']}"
        lora = ", LoRA r 8" if row["lora"] else ""
        shares = row["of_read"]
        read = f"{shares[0]:.0%} · {shares[1]:.0%}" if shares else "–"
        lines.append(
            f"| {NAMES[row['format']]}, {phase}{lora} | {row['ktrt']:.1f} | {row['llama_cpp']:.1f} "
            f"| {row['ratio']:.2f} | {row['least']:.2f}–{row['most']:.2f} | {read} |"
        )
    return "\n".join(lines)
