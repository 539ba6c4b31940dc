#!/usr/bin/env python3
"""Loads a server with many streams of several adapters, and compares every answer with the one
that the same request got alone.

    python bench/serve_load.py --streams 64 --adapters a,b,c,base --seconds 300
    python bench/serve_load.py --url http://127.0.0.1:8000 --adapters NAME,OTHER --pid PID
    python bench/serve_load.py --model /tmp/v2lite --at 8,16    # the share of the memory's limit
    python bench/serve_load.py --no-reproducible    # answers reuse earlier answers' tokens
    python bench/serve_load.py --quick                          # a smoke test

Without ``--url`` it serves the demo: the first name is its adapter, others are weaker copies of it,
``base`` is the model alone. Every stream goes through conversations with its adapter: by turns
three unrelated questions, greedy or sampled with a seed, and a dialogue of three turns. The server
has ``reproducible`` on. Without it (``--no-reproducible``, and with ``--url``) keys and values of
an earlier answer have other last bits from decode steps than from a prompt, and which were kept
differs from run to run: a turn whose tokens are nearly as likely as others is then not compared,
but counted.
``--leave``: the share of requests whose client goes away in the middle of its answer.

The exit code is 1 if a text differs from the reference, an answer is lost, the server's memory
grows, or an adapter gets 10 % less or more than its share of the computed tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cpu_decode import DEMO
from serve_client import Answer, Client, Refused
from serve_limit import measure_limit
from serve_process import ServerProcess, resident_bytes
from serve_report import Report, report_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Questions of the demo's training texts; dialogue n begins with n and n + 1.
QUESTIONS = (
    "你好，请介绍一下你自己。",
    "什么是 MoE？",
    "What is LoRA?",
    "AMX 指令集是什么？",
    "怎样才能安装 ktrt？",
    "INT8 和 BF16 有什么区别？",
    "给我讲一个好笑的笑话",
    "Who are you?",
)
TURNS = 3
# The log probabilities of the demo's tokens differ by up to 1 between the two in BF16, rarely more.
_MARGIN = 2.0
_LIVE = ("vllm:num_requests_running", "vllm:num_requests_waiting")

Message = dict[str, str]


@dataclass(frozen=True)
class Reference:
    """A request and the text that it got alone. ``sways``: last bits may decide its tokens."""

    messages: tuple[Message, ...]
    text: str
    sways: bool = False


@dataclass
class Finished:
    """An answer under load; ``wrong``: what is wrong with it. ``swayed``: it differs where last
    bits may decide."""

    model: str
    answer: Answer
    wrong: str | None
    left: bool = False
    swayed: bool = False


@dataclass
class Load:
    """The answers and measurements of a load. ``memory``: (seconds, bytes) of the server;
    ``swaying``: the turns whose tokens last bits may decide."""

    finished: list[Finished] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)
    swaying: int = 0


class Streams:
    """Conversations that run at once against one server."""

    def __init__(self, client: Client, models: Sequence[str], args: argparse.Namespace) -> None:
        """Takes the names of the models, which the streams have in turn."""
        self._client, self._models, self._args = client, models, args
        self._references: dict[tuple[str, int, int], Reference] = {}
        self._end = 0.0
        self.load = Load()

    async def answer_alone(self) -> int:
        """Asks every request alone; returns the number of different texts."""
        for model in self._models:
            for script in range(self._args.scripts):
                history: list[Message] = []
                for turn in range(TURNS):
                    if not _dialogue(script):
                        history = []
                    history.append({"role": "user", "content": _question(script, turn)})
                    answer = await self._ask(model, script, history, logprobs=True, top_logprobs=2)
                    sways = (
                        not self._args.reproducible and len(history) > 1 and answer.margin < _MARGIN
                    )
                    self._references[model, script, turn] = Reference(
                        tuple(history), answer.text, sways
                    )
                    history.append({"role": "assistant", "content": answer.text})
        self.load.swaying = sum(each.sways for each in self._references.values())
        return len({each.text for each in self._references.values()})

    async def run(self, pid: int | None) -> float:
        """Runs all streams; returns the seconds until the last answer's end."""
        begin = time.monotonic()
        self._end = begin + self._args.seconds
        watch = asyncio.create_task(self._watch(pid)) if pid else None
        await asyncio.gather(*(self._stream(index) for index in range(self._args.streams)))
        if watch:
            watch.cancel()
        return time.monotonic() - begin

    async def _stream(self, index: int) -> None:
        model = self._models[index % len(self._models)]
        chance = random.Random(index)
        script = index // len(self._models)
        while time.monotonic() < self._end:
            for turn in range(TURNS):
                leave = chance.randint(1, 8) if chance.random() < self._args.leave else None
                await self._turn(model, script % self._args.scripts, turn, leave)
            script += 1

    async def _turn(self, model: str, script: int, turn: int, leave: int | None) -> None:
        reference = self._references[model, script, turn]
        try:
            answer = await self._ask(model, script, reference.messages, leave)
        except Refused as refused:
            self.load.refused[str(refused.status)] += 1
            if refused.status != 429:
                self.load.finished.append(Finished(model, Answer(), str(refused)))
            await asyncio.sleep(refused.retry_after)
        except (OSError, EOFError) as error:
            self.load.finished.append(Finished(model, Answer(), f"connection: {error!r}"))
        else:
            left = leave is not None and not answer.done
            wrong, swayed = _wrong(answer, model, left=left), False
            if wrong is None and (wrong := _differs(answer, reference, left=left)):
                swayed = reference.sways
            if wrong:
                wrong = f"conversation {script}, turn {turn}: {wrong}"
            self.load.finished.append(
                Finished(model, answer, None if swayed else wrong, left, swayed)
            )

    async def _ask(
        self, model: str, script: int, messages: Sequence[Message], leave: int | None = None,
        **more: Any,
    ) -> Answer:  # fmt: skip
        sampled = {"temperature": 0.95, "top_p": 0.9, "seed": script}
        options = sampled if script % 4 == 2 else {"temperature": 0}
        return await self._client.chat(
            model, messages, leave_after=leave, max_tokens=self._args.tokens, **options, **more
        )

    async def _watch(self, pid: int) -> None:
        begin = time.monotonic()
        while True:
            self.load.memory.append((time.monotonic() - begin, resident_bytes(pid)))
            await asyncio.sleep(min(1.0, self._args.seconds / 30))


def _dialogue(script: int) -> bool:
    return script % 2 == 1


def _question(script: int, turn: int) -> str:
    """Returns the question of a turn.

    Unrelated ones are like no text of the training: any answer is as likely, and the last bits
    decide. A dialogue has known questions, whose answers of the trained adapter are not swayed.
    """
    if _dialogue(script):
        return QUESTIONS[(script + turn) % len(QUESTIONS)]
    return f"{script * 37 + 11 * turn} {chr(0x4E00 + 97 * script + 7 * turn)} {script + turn}?"


def _wrong(answer: Answer, model: str, *, left: bool) -> str | None:
    """Returns what is wrong with an answer whatever its text; None: nothing."""
    if answer.model != model:
        return f"the answer is of {answer.model!r}"
    if not left and (not answer.done or answer.finish_reason is None):
        return "the stream ended early"
    return None


def _differs(answer: Answer, reference: Reference, *, left: bool) -> str | None:
    """Returns how a text differs from the one alone; None: not at all."""
    if left:
        return None if reference.text.startswith(answer.text) else "its beginning differs"
    if answer.text != reference.text:
        return f"{answer.text!r} instead of {reference.text!r}"
    return None


async def run(args: argparse.Namespace, host: str, port: int, pid: int | None) -> Report:
    """Asks everything alone, then loads the server; returns the report."""
    client = Client(host, port, args.key)
    models = await client.models(args.adapters)
    streams = Streams(client, models, args)
    texts = await streams.answer_alone()
    print(f"alone: {len(models) * args.scripts * TURNS} requests, {texts} texts",
          file=sys.stderr)  # fmt: skip
    seconds = await streams.run(pid)
    idle = await _idle(client)
    return report_of(streams.load, models, seconds, texts=texts, idle=idle)


async def _idle(client: Client) -> bool:
    """Returns whether the server runs nothing any more, within seconds."""
    for _ in range(50):
        lines = (await client.get("/metrics")).decode().splitlines()
        values = [float(each.rpartition(" ")[2]) for each in lines if each.startswith(_LIVE)]
        if values and not any(values):
            return True
        await asyncio.sleep(0.1)
    return False


def demo_adapters(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Returns the demo's adapter for the first name and weaker ones for the others: its second
    adapter is the first in another layout, and random ones answer everything alike."""
    trained = DEMO.parent / "adapter_a"
    adapters: dict[str, Path] = {}
    for number, name in enumerate(name for name in names if name != "base"):
        adapters[name] = shutil.copytree(trained, folder / name)
        config = adapters[name] / "adapter_config.json"
        values = json.loads(config.read_text("utf-8"))
        values["lora_alpha"] *= 2 / (2 + number)
        config.write_text(json.dumps(values), encoding="utf-8")
    return adapters


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=64, help="conversations at once")
    parser.add_argument("--adapters", default="a,b,c,base", help="names that share the streams")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the load")
    parser.add_argument("--tokens", type=int, default=64, help="the most tokens of an answer")
    parser.add_argument(
        "--scripts", type=int, default=len(QUESTIONS), help="different conversations"
    )
    parser.add_argument("--leave", type=float, default=0.02, help="share of clients that go away")
    parser.add_argument("--rows", type=int, default=32, help="answers that run at once")
    parser.add_argument(
        "--reproducible", action=argparse.BooleanOptionalAction,
        help="the server's setting, by default on without --url",
    )  # fmt: skip
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", help="its key")
    parser.add_argument("--pid", type=int, help="its process, whose memory is watched")
    parser.add_argument("--model", type=Path, help="folder: measure its share of the limit instead")
    parser.add_argument("--at", default="8,16", help="streams for --model")
    parser.add_argument("--backend", default="AMXBF16", help="kt_backend for --model")
    parser.add_argument("--quick", action="store_true", help="a few seconds, 8 streams")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    args = parser.parse_args(argv)
    if args.quick:
        args.streams, args.seconds, args.tokens, args.scripts = 8, 3.0, 16, 2
    if args.reproducible is None:
        args.reproducible = not args.url
    args.adapters = args.adapters.split(",")
    args.at = [int(each) for each in args.at.split(",")]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.model:
            figures = [
                measure_limit(folder, args.model, args.adapters, args.backend, at) for at in args.at
            ]
            print(json.dumps(figures) if args.json else _table(figures))
            return 0
        if args.url:
            place = urlsplit(args.url)
            host, port, pid = place.hostname or "127.0.0.1", place.port or 80, args.pid
        else:
            adapters = demo_adapters(folder, args.adapters)
            settings = {"reproducible": args.reproducible}
            server = stack.enter_context(
                ServerProcess(folder, DEMO, adapters, args.rows, settings=settings)
            )
            host, port, pid = server.host, server.port, server.pid
        report = asyncio.run(run(args, host, port, pid))
    print(json.dumps(report.figures) if args.json else report.text())
    problems = report.problems(quick=args.quick)
    for each in problems:
        print(f"FAILED: {each}", file=sys.stderr)
    return 1 if problems else 0


def _table(figures: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        ", ".join(f"{name} {value}" for name, value in each.items()) for each in figures
    )


if __name__ == "__main__":
    sys.exit(main())
