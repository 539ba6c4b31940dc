"""Runs the benches of two commits by turns and reads their measurements."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

from tools.compare_commits.builds import Build, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CPU_DECODE = ("bench/cpu_decode.py",)
KT_KERNEL = (
    "bench/kt_kernel/compare.py",
    "bench/compare_kt_kernel.py",
)
# Layers of fewer tokens are bound by the memory.
MANY_TOKENS = 64


def find_script(source: Path, candidates: Sequence[str]) -> Path:
    """The first candidate that the checkout has."""
    for name in candidates:
        if (source / name).is_file():
            return source / name
    raise SystemExit(f"{source} has none of {', '.join(candidates)}; add the bench's new path")


def measure(
    builds: Sequence[Build], rounds: int, model: Path | None, *, quick: bool
) -> list[list[dict[str, float]]]:
    """Measurements by name, for each build a list of rounds."""
    found: list[list[dict[str, float]]] = [[] for _ in builds]
    # One model for both, and the first commit's: each checkout has its own copy of the demo's.
    folder = model or builds[0].source / "examples/demo/model"
    with_kt_kernel = importlib.util.find_spec("kt_kernel") is not None
    if not with_kt_kernel:
        print("kt_kernel is not installed: only cpu_decode is measured", file=sys.stderr)
    for number in range(rounds):
        for build, results in zip(builds, found, strict=True):
            print(f"round {number + 1}: {build.commit[:9]}", file=sys.stderr, flush=True)
            row = cpu_decode(build, folder, quick=quick)
            if with_kt_kernel:
                row |= kt_kernel(build, quick=quick)
            results.append(row)
    return found


def cpu_decode(build: Build, model: Path, *, quick: bool) -> dict[str, float]:
    options = [str(model), "--cache", str(build.cache / "packed")]
    options += ["--rounds", "5" if quick else "31"]
    return decode_row(run_bench(build, CPU_DECODE, options))


def kt_kernel(build: Build, *, quick: bool) -> dict[str, float]:
    options = ["--quick"]
    if quick:
        options += ["--dtypes", "int8", "--ranks", "8", "--rounds", "3", "--layers", "1"]
    return layer_row(run_bench(build, KT_KERNEL, options))


def run_bench(build: Build, candidates: Sequence[str], options: Sequence[str]) -> Any:
    script = find_script(build.source, candidates)
    command = [sys.executable, str(script), "--json", *options]
    return json.loads(run(command, env=build.environment(), cwd=build.source.parent))


def decode_row(answer: Any) -> dict[str, float]:
    """Times of a decoded token, with and without LoRA, by backend: multiples of the time that
    reading the same bytes took in the same run. Milliseconds follow the bandwidth that a shared
    machine's neighbours leave, which doubles within seconds."""
    row = {}
    for backend, result in answer["results"].items():
        row[f"decode {backend}, x limit"] = result["ms"] / result["limit_ms"]
        row[f"decode {backend} + LoRA, x limit"] = result["lora_ms"] / result["limit_ms"]
    return row


def layer_row(answer: Any) -> dict[str, float]:
    """Times of one MoE layer by method and number of tokens: few tokens as in ``decode_row``, many,
    which arithmetic bounds, in ms."""
    row = {}
    for each in answer["rows"]:
        name = f"layer {each['method']}, {each['qlen']} tokens"
        if each["qlen"] < MANY_TOKENS:
            row[f"{name}, x limit"] = 1 / each["bandwidth_fraction"]
        else:
            row[f"{name}, ms"] = each["ktrt_ms"]
    return row
