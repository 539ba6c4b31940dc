"""Health, readiness, and the way from a request to the engine."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httpx

from ktrt.serve.generation import Asked

if TYPE_CHECKING:
    from fastapi import FastAPI


def test_health_and_readiness(server_url: str) -> None:
    assert httpx.get(f"{server_url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server_url}/ready").json() == {"status": "ready"}


def test_a_kept_connection_does_not_wait_for_acknowledgements(server_url: str) -> None:
    seconds = []
    with httpx.Client() as client:
        for _ in range(10):
            began = time.perf_counter()
            client.get(f"{server_url}/health")
            seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.03  # a delayed ACK takes 0.04 s


def test_an_unknown_path_gets_openais_error(server_url: str) -> None:
    found = httpx.get(f"{server_url}/v1/nothing")
    assert found.status_code == 404
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_tokens_come_through_a_generation(serve_app: FastAPI) -> None:
    server = serve_app.state.server

    async def ask(n: int) -> list[str]:
        asked = Asked(
            adapter="adapter_a", messages=[{"role": "user", "content": "What is a star?"}], n=n,
            sampling={"max_new_tokens": 8},
        )  # fmt: skip
        async with server.generate(asked) as generation:
            return [each.text for each in await generation.whole()]

    (alone,) = asyncio.run(ask(1))
    assert alone
    assert asyncio.run(ask(2)) == [alone, alone]
    assert server.admission.live == 0
