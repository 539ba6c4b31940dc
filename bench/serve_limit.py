"""The share of the memory's limit that a server's streams reach.

The limit is the time in which the bytes that the server's steps read (its own count: the experts
that each step chose, all other weights, keys and values) pass at the bandwidth of a plain read on
as many threads. On a shared host that bandwidth may double or halve from one second to the next, so
the server's process is stopped every half second while it is measured; those pauses are not
counted. Adapters' bytes, prompts and everything between model and client count as overhead.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from cpu_decode import PROBE_BYTES, write_adapter
from serve_client import Client
from serve_process import ServerProcess

from ktrt import _core
from ktrt.engine import Engine
from ktrt.engine.threads import num_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ROUNDS = 5
TOKENS = 64
EVERY = 0.5  # seconds between two looks at the memory
_COUNTERS = ("ktrt:bytes_read_total", "ktrt:steps_total", "vllm:generation_tokens_total")


def measure_limit(
    folder: Path, model: Path, names: Sequence[str], backend: str, streams: int
) -> dict[str, float]:
    """Returns figures of ``streams`` streams, each with an adapter of ``names`` in turn (``base``:
    none), on a server for as many; medians over rounds."""
    place = folder / f"streams{streams}"
    place.mkdir()
    adapters = {
        name: write_adapter(model, place / name, rank=8, seed=seed)
        for seed, name in enumerate(names) if name != "base"
    }  # fmt: skip
    rounds: list[dict[str, float]] = []
    with ServerProcess(place, model, adapters, streams, settings={"kt_backend": backend}) as server:
        client, pauses = Client(server.host, server.port), Pauses(server.pid)
        models = asyncio.run(client.models(names))
        for number in range(ROUNDS + 1):
            found = asyncio.run(_round(client, pauses, models, streams, number))
            found["share"] = found["bytes"] / found["bandwidth"] / found["seconds"]
            rounds.append(found)
    del rounds[0]  # a warm-up
    median = statistics.median
    return {
        "streams": streams,
        "share_of_limit": round(median(r["share"] for r in rounds), 3),
        "lowest": round(min(r["share"] for r in rounds), 3),
        "highest": round(max(r["share"] for r in rounds), 3),
        "tokens_per_second": round(median(r["tokens"] / r["seconds"] for r in rounds), 2),
        "ms_per_step": round(median(1e3 * r["seconds"] / r["steps"] for r in rounds), 1),
        "gb_per_step": round(median(r["bytes"] / r["steps"] for r in rounds) / 1e9, 3),
        "read_gb_per_s": round(median(r["bandwidth"] for r in rounds) / 1e9, 1),
    }


class Pauses:
    """Stops a process now and then, to measure what the memory gives meanwhile."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._engine = Engine(num_threads=num_threads())
        self._probe = _core.ReadProbe(PROBE_BYTES)
        self._probe.seconds(self._engine)
        self.clear()

    def clear(self) -> None:
        self.seconds = 0.0
        self._speeds: list[float] = []

    @property
    def bandwidth(self) -> float:
        """Bytes per second, on average over time."""
        return statistics.mean(self._speeds)

    def pause(self) -> None:
        begin = time.perf_counter()
        os.kill(self._pid, signal.SIGSTOP)
        try:
            passes = [self._probe.seconds(self._engine) for _ in range(3)]
        finally:
            os.kill(self._pid, signal.SIGCONT)
        self._speeds.append(self._probe.nbytes / statistics.median(passes))
        self.seconds += time.perf_counter() - begin

    async def run(self) -> None:
        """Pauses the process until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            self.pause()


async def _round(
    client: Client, pauses: Pauses, names: Sequence[str], streams: int, number: int
) -> dict[str, float]:
    """Returns what the server's counters grew by while all streams answered once."""
    before = await _counters(client)
    pauses.clear()
    begin = time.perf_counter()
    watch = asyncio.create_task(pauses.run())
    answers = await asyncio.gather(*(
        client.chat(
            names[stream % len(names)],
            [{"role": "user", "content": f"{number} {stream}"}],
            max_tokens=TOKENS, temperature=1.0, seed=stream,
        )
        for stream in range(streams)
    ))  # fmt: skip
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    seconds = time.perf_counter() - begin - pauses.seconds
    pauses.pause()  # a short round has none yet
    short = [each for each in answers if not each.done]
    if short:
        raise SystemExit(f"{len(short)} of {streams} answers are incomplete")
    after = await _counters(client)
    read, steps, tokens = (after[name] - before[name] for name in _COUNTERS)
    return {
        "seconds": seconds, "bytes": read, "steps": steps, "tokens": tokens,
        "bandwidth": pauses.bandwidth,
    }  # fmt: skip


async def _counters(client: Client) -> dict[str, float]:
    lines = (await client.get("/metrics")).decode().splitlines()
    found = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        found[name.partition("{")[0]] = float(value) if not line.startswith("#") else 0.0
    missing = [name for name in _COUNTERS if name not in found]
    if missing:
        raise SystemExit(f"/metrics has no {', '.join(missing)}")
    return found
