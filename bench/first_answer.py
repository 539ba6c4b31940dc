#!/usr/bin/env python3
"""Measures the first answer of a fresh process, and the first one of a second conversation.

    python bench/make_v2lite.py /tmp/v2lite --layers 27
    python bench/first_answer.py /tmp/v2lite [--backends AMXBF16 AMXInt8] [--cache DIR] [--json]

``chat`` is ``python -m ktrt.chat -p … --json``, like a user's start: the first token's time, tokens
per second over the answer, and the seconds before them. ``steps`` is a separate process that loads
by ``ktrt.load`` and answers two conversations: the first and second token of each, and the median
of the later ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS = 64
QUESTIONS = (
    "请介绍一下你自己，并说说 LoRA 和 MoE 各是什么？",
    "What is a Mixture-of-Experts model?",
)


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = parse_arguments(given)
    if args.child:
        print(json.dumps(steps(settings(args, args.backends[0]), args.faults)))
        return 0
    results: list[dict[str, Any]] = []
    for backend in args.backends:
        found = {"backend": backend, "chat": chat(args, backend), "steps": child(given, backend)}
        results.append(found)
        if not args.json:
            print(describe(found), flush=True)
    if args.json:
        print(json.dumps(results))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the first answer of a fresh process.")
    parser.add_argument("folder", type=Path, help="the model")
    parser.add_argument("--backends", nargs="+", default=["AMXBF16", "AMXInt8"])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--cache", type=Path, help="folder of the pack cache; without it, none")
    parser.add_argument("--faults", action="store_true", help="page faults of the first tokens too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def settings(args: argparse.Namespace, backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model_name_or_path": str(args.folder),
        "kt_backend": backend,
        "ktrt_cache": args.cache is not None,
        "do_sample": False,
        "max_new_tokens": TOKENS,
    }
    if args.cache is not None:
        found["ktrt_cache_dir"] = str(args.cache)
    if args.adapter is not None:
        found["adapter_name_or_path"] = str(args.adapter)
    return found


def chat(args: argparse.Namespace, backend: str) -> dict[str, Any]:
    config = args.folder / "first_answer.yaml"
    config.write_text(json.dumps(settings(args, backend)), encoding="utf-8")
    command = [sys.executable, "-m", "ktrt.chat", "-q", str(config), "-p", QUESTIONS[0], "--json"]
    start = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {
        "prompt_tokens": answer["prompt_tokens"],
        "first_token_s": answer["first_token_seconds"],
        "tokens_per_s": answer["decode_tokens_per_second"],
        "generated_tokens": answer["generated_tokens"],
        "load_s": seconds - answer["first_token_seconds"] - answer["decode_seconds"],
    }


def child(given: Sequence[str], backend: str) -> dict[str, Any]:
    """Runs ``steps`` in a separate process with the same arguments."""
    command = [sys.executable, __file__, *given, "--backends", backend, "--child"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def steps(config: dict[str, Any], faults: bool) -> dict[str, Any]:
    """Returns the seconds of the first tokens of two conversations in one session."""
    from ktrt.command_line import set_environment

    set_environment()
    import ktrt

    start = time.perf_counter()
    with ktrt.load(config) as session:
        found: dict[str, Any] = {"load_s": time.perf_counter() - start}
        for name, question in zip(("first", "second"), QUESTIONS, strict=True):
            found[name] = conversation(session, question, faults)
    return found


def conversation(session: Any, question: str, faults: bool) -> dict[str, Any]:
    import resource

    times: list[float] = []
    minor: list[int] = []
    last, held = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in session.stream_responses([{"role": "user", "content": question}]):
        now, count = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times.append(now - last)
        minor.append(count - held)
        last, held = now, count
    result: dict[str, Any] = {"first_s": times[0]}
    if len(times) > 8:
        later = statistics.median(times[8:])
        result |= {"second_s": times[1], "median_s": later, "slowest_s": max(times[1:])}
        result["seconds"] = [round(each, 4) for each in times[:8]]
    if faults:
        result["faults"] = minor[:8]
    return result


def describe(found: dict[str, Any]) -> str:
    chat, steps = found["chat"], found["steps"]
    lines = [
        f"{found['backend']}: prompt of {chat['prompt_tokens']} tokens, first token after "
        f"{chat['first_token_s']:.2f} s, {chat['tokens_per_s']:.1f} tokens/s over "
        f"{chat['generated_tokens']}, {chat['load_s']:.1f} s before"
    ]
    for name in ("first", "second"):
        each = steps[name]
        line = f"  {name} conversation: first token {each['first_s']:.3f} s"
        if "second_s" in each:
            line += (
                f", second {each['second_s'] * 1e3:.0f} ms, median {each['median_s'] * 1e3:.1f} ms"
                f", slowest {each['slowest_s'] * 1e3:.0f} ms"
            )
        lines.append(line + (f", faults {each['faults']}" if "faults" in each else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
