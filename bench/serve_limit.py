"""The share of the memory's limit that a server's streams reach.

The limit is the time in which the bytes that the server's steps read (its own count: the experts
that each step chose, all other weights, keys and values) pass at the bandwidth of a plain read,
measured before and after each round on as many threads while the server waits. Adapters' bytes,
prompts and everything between model and client count as overhead.
"""

from __future__ import annotations

import asyncio
import statistics
import time
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
    engine, probe = Engine(num_threads=num_threads()), _core.ReadProbe(PROBE_BYTES)
    probe.seconds(engine)

    def bandwidth() -> float:
        return statistics.median(probe.nbytes / probe.seconds(engine) for _ in range(5))

    rounds: list[dict[str, float]] = []
    with ServerProcess(place, model, adapters, streams, settings={"kt_backend": backend}) as server:
        client = Client(server.host, server.port)
        models = asyncio.run(client.models(names))
        asyncio.run(_round(client, models, streams, 0))
        speeds = [bandwidth()]
        for number in range(1, ROUNDS + 1):
            found = asyncio.run(_round(client, models, streams, number))
            speeds.append(bandwidth())
            found["share"] = found["bytes"] / statistics.mean(speeds[-2:]) / found["seconds"]
            rounds.append(found)
    median = statistics.median
    return {
        "streams": streams,
        "share_of_limit": round(median(r["share"] for r in rounds), 3),
        "lowest": round(min(r["share"] for r in rounds), 3),
        "highest": round(max(r["share"] for r in rounds), 3),
        "tokens_per_second": round(median(r["tokens"] / r["seconds"] for r in rounds), 2),
        "ms_per_step": round(median(1e3 * r["seconds"] / r["steps"] for r in rounds), 1),
        "gb_per_step": round(median(r["bytes"] / r["steps"] for r in rounds) / 1e9, 3),
        "read_gb_per_s": round(median(speeds) / 1e9, 1),
    }


async def _round(
    client: Client, names: Sequence[str], streams: int, number: int
) -> dict[str, float]:
    """Returns what the server's counters grew by while all streams answered once."""
    before = await _counters(client)
    begin = time.perf_counter()
    answers = await asyncio.gather(*(
        client.chat(
            names[stream % len(names)],
            [{"role": "user", "content": f"{number} {stream}"}],
            max_tokens=TOKENS, temperature=1.0, seed=stream,
        )
        for stream in range(streams)
    ))  # fmt: skip
    seconds = time.perf_counter() - begin
    short = [each for each in answers if not each.done]
    if short:
        raise SystemExit(f"{len(short)} of {streams} answers are incomplete")
    after = await _counters(client)
    read, steps, tokens = (after[name] - before[name] for name in _COUNTERS)
    return {"seconds": seconds, "bytes": read, "steps": steps, "tokens": tokens}


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
