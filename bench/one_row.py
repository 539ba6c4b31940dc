#!/usr/bin/env python3
"""Compares one conversation through the scheduler with the plain loop on one KV cache.

    python bench/one_row.py DIR [--backend AMXBF16] [--rank 8]
    python bench/one_row.py --quick                     # the demo model, for a smoke test

Both decode the same prompt with the same adapter in one process, in turns; the ratio is a median
over neighbouring turns. Between two commits, `python -m tools.compare_commits` compares.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from cpu_decode import DEMO, model_settings, write_adapter

import ktrt
from ktrt.config import override_sampling
from ktrt.generate.loop import stream_generate
from ktrt.generate.response import Response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.runner import KvCache
    from ktrt.session import Session

MESSAGES = [{"role": "user", "content": "你好，请介绍一下你自己。" * 4}]


def milliseconds(response: Response) -> float:
    """Returns milliseconds per decoded token."""
    return 1e3 * response.decode_seconds / max(1, response.generated_tokens - 1)


def plain(session: Session, cache: KvCache, tokens: int) -> float:
    sampling = override_sampling(session.sampling, {"do_sample": False, "max_new_tokens": tokens})
    ids = session.template.encode(MESSAGES)
    responses = stream_generate(
        session.tokenizer, cache, ids, sampling, stop_ids=(), max_tokens=tokens
    )
    return milliseconds(Response.whole(responses))


def scheduled(session: Session, tokens: int) -> float:
    return milliseconds(session.chat(MESSAGES, do_sample=False, max_new_tokens=tokens))


def measure(session: Session, rounds: int, tokens: int) -> dict[str, float]:
    cache = session.new_cache()
    # The first turns record steps and touch new memory.
    for _ in range(2):
        plain(session, cache, tokens)
        scheduled(session, tokens)
    turns = [(plain(session, cache, tokens), scheduled(session, tokens)) for _ in range(rounds)]
    ratios = [through / alone for alone, through in turns]
    ratios += [a[1] / b[0] for a, b in itertools.pairwise(turns)]
    return {
        "loop_ms": statistics.median(alone for alone, _ in turns),
        "scheduler_ms": statistics.median(through for _, through in turns),
        "ratio": statistics.median(ratios),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One conversation, with and without scheduler.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--backend", default="AMXBF16", help="a kt_backend, or INT8")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="decoded per turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache", help="folder of the pack cache; default: ktrt's own")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.tokens = 2, 6
    settings = model_settings(args.folder, args.backend)
    if args.cache:
        settings["ktrt_cache_dir"] = args.cache
    with tempfile.TemporaryDirectory() as temporary:
        adapter = write_adapter(args.folder, Path(temporary) / "adapter", args.rank)
        settings["adapter_name_or_path"] = str(adapter)
        with ktrt.load(settings) as session:
            found = measure(session, args.rounds, args.tokens)
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{args.backend}: loop {found['loop_ms']:.2f} ms a token, scheduler "
            f"{found['scheduler_ms']:.2f} ms, {found['ratio'] - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
