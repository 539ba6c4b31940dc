#!/usr/bin/env python3
"""Measures the CPU time that a streamed token costs outside of the model.

    python bench/serve_cpu.py --streams 16 --tokens 200
    python bench/serve_cpu.py --profile loop       # or scheduler: cProfile of that thread

The real server, session and scheduler run over the demo, whose forwards are replaced: a step waits
``--step-ms`` and returns ready logits. Clients are a separate process. CPU time is measured, so
that other processes change little: the scheduler's thread (steps, sampling, texts) and the event
loop's (events, JSON, HTTP), in microseconds a token.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cpu_decode import DEMO

import ktrt
from ktrt.serve.app import create_app
from ktrt.serve.settings import ServeSettings
from ktrt.serve.uvicorn_server import HttpServer, bind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.session import Session

WORDS = "a model of experts reads only what its tokens choose . 专家 混合 模型 很 好 ， 谢谢 你 。"


class ReadyLogits:
    """Stands in for a runner's forward: the words of a text in turn are the likeliest tokens."""

    def __init__(self, session: Session, seconds: float) -> None:
        self._seconds = seconds
        # CPU seconds in here, which are not the server's.
        self.spent = 0.0
        runner = session._open().runner
        size = session.model.config.get_text_config().vocab_size
        ids = session.tokenizer.encode(WORDS, add_special_tokens=False)
        self._rows = torch.zeros(len(ids), 1, size, dtype=torch.bfloat16)
        for row, token in zip(self._rows, ids, strict=True):
            row[0, token] = 9.0
        runner._run = self.run  # type: ignore[method-assign,assignment]

    def run(self, parts: Sequence[Any], _held: object) -> list[torch.Tensor]:
        before = time.thread_time()
        time.sleep(self._seconds)
        found = [
            self._rows[part.end % len(self._rows)]
            if part.span.logits is None
            else self._rows[0][: len(part.span.logits)]
            for part in parts
        ]
        self.spent += time.thread_time() - before
        return found


def cpu_of(thread: threading.Thread) -> float:
    """Returns the CPU seconds of a thread so far."""
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def ask(port: int, args: argparse.Namespace) -> int:
    """Has another process read the answers; returns their tokens."""
    script = Path(__file__).with_name("serve_client.py")
    command = [sys.executable, str(script), str(port), str(args.streams), str(args.tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Returns the medians of the rounds."""
    with ktrt.load(DEMO, template="deepseek", do_sample=False) as session:
        ready = ReadyLogits(session, args.step_ms / 1e3)
        settings = ServeSettings(model_name="demo", port=0, max_concurrent=args.streams)
        server = HttpServer(create_app(session, settings), settings)
        listener = bind(settings)
        loop = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
        loop.start()
        while not server.started:
            time.sleep(0.01)
        port = listener.getsockname()[1]
        ask(port, args)
        scheduler = next(t for t in threading.enumerate() if t.name == "ktrt-scheduler")
        profile = cProfile.Profile(time.thread_time)
        if args.profile == "loop":
            server.servers[0].get_loop().call_soon_threadsafe(profile.enable)
        elif args.profile:
            session._steps.between(profile.enable)
        rounds = []
        for _ in range(args.rounds):
            before = cpu_of(scheduler) - ready.spent, cpu_of(loop)
            tokens = ask(port, args)
            after = cpu_of(scheduler) - ready.spent, cpu_of(loop)
            rounds.append([1e6 * (b - a) / tokens for a, b in zip(before, after, strict=True)])
        if args.profile == "loop":
            server.servers[0].get_loop().call_soon_threadsafe(profile.disable)
        elif args.profile:
            session._steps.between(profile.disable)
        if args.profile:
            time.sleep(0.2)
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        server.should_exit = True
        loop.join(10)
    best = min(rounds, key=sum)
    return {
        "streams": args.streams,
        "scheduler_us_per_token": round(best[0], 1),
        "loop_us_per_token": round(best[1], 1),
        "us_per_token": round(sum(best), 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=16, help="answers at once")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="the best one counts")
    parser.add_argument("--step-ms", type=float, default=10.0, help="how long a step waits")
    parser.add_argument("--profile", choices=("loop", "scheduler"), help="prints where time goes")
    print(json.dumps(measure(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
