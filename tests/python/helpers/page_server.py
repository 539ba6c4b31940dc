"""A server for tests of the page: its own routes, and answers made up from the question.

python tests/python/helpers/page_server.py [PORT]
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request  # noqa: TC002 - FastAPI reads the annotations
from starlette.responses import JSONResponse, Response, StreamingResponse

from ktrt.config import SamplingArgs
from ktrt.serve.errors import ApiError, error_response
from ktrt.serve.memory_limit import MemoryLimit
from ktrt.serve.page import router as page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODELS = ["base", "poet", "terse"]
KEY = "right"
SAID = {
    "base": "LoRA is low-rank adaptation: the weights stay frozen, and two small matrices A and B "
    "are trained and added as a product.",
    "poet": "LoRA is embroidery: the cloth stays as it is, and two thin threads, A and B, draw "
    "the new pattern!",
    "terse": "LoRA: frozen weights, two small matrices A and B, trained.",
}
MARKDOWN = """**Three steps**, in order:

1. Read `config.yaml`
2. Load the base
3. Choose an adapter

```python
with ktrt.load("chat.yaml") as session:
    print(session.chat([{"role": "user", "content": "Hi"}]).text)
```

| format | bytes |
|---|---|
| BF16 | 2 |
| INT8 | 1 |

<img src="http://127.0.0.1:9/x.png" onerror="document.title='hacked'"> <script>1</script>
![picture](http://127.0.0.1:9/y.png) [link](javascript:alert(1)) [site](https://example.org)

a_word_without_a_break_"""
MARKDOWN += "x" * 90


@dataclass
class PageServer:
    """Settings of the tests, and records for them."""

    key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    sampling: SamplingArgs = field(default_factory=SamplingArgs)
    cancelled: int = 0
    running: int = 0


def page_app(state: PageServer) -> FastAPI:
    """Returns the application; ``state`` steers it."""
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(page.router)
    app.state.server = SimpleNamespace(memory_limit=MemoryLimit(), session=_session(state))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, request.url.path)

    app.add_exception_handler(ApiError, refused)

    @app.middleware("http")
    async def keyed(request: Request, call_next: Any) -> Any:
        given = request.headers.get("authorization")
        if state.key and request.url.path.startswith("/v1") and given != f"Bearer {state.key}":
            return error_response(ApiError(401, "a wrong key, or none"), request.url.path)
        return await call_next(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [{"id": each, "object": "model", "parent": MODELS[0]} for each in MODELS]
        return {"object": "list", "data": [{**listed[0], "parent": None}, *listed[1:]]}

    @app.get("/v1/adapters/{name}/audit")
    async def audit(name: str) -> Response:
        if name == "terse":
            raise ApiError(404, "terse: its norms are not kept; load it again")
        return JSONResponse(audit_of(name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        state.requests.append(body)
        _refuse(body)
        return StreamingResponse(_stream(state, body), media_type="text/event-stream")

    return app


def _session(state: PageServer) -> SimpleNamespace:
    def stats() -> SimpleNamespace:
        return SimpleNamespace(
            running=state.running, waiting=0, generated_tokens=0, read_bandwidth=None
        )

    return SimpleNamespace(
        stats=stats, context_limit=4096, sampling=state.sampling,
        template=SimpleNamespace(thinking=True),
    )  # fmt: skip


def _refuse(body: dict[str, Any]) -> None:
    said = body["messages"][-1].get("content") or ""
    if "busy" in said:
        raise ApiError(429, "the queue is full (128 requests)", retry_after=3)
    if body.get("top_k") == 13:
        raise ApiError(400, "top_k: expected another number; found 13", param="top_k")


async def _stream(state: PageServer, body: dict[str, Any]) -> AsyncIterator[str]:
    said = body["messages"][-1].get("content") or ""
    state.running += 1
    done = False
    try:
        yield ": open\n\n"
        yield _chunk({"role": "assistant", "content": ""})
        async for delta in _deltas(body, said):
            yield _chunk(delta, logprobs=_logprobs(delta) if body.get("logprobs") else None)
        if "cut" in said:
            done = True
            return
        if "broken" in said:
            yield f"data: {json.dumps({'error': {'message': 'the engine failed'}})}\n\n"
        else:
            yield _chunk({}, finish="length" if "long" in said else "stop")
            usage: dict[str, Any] = {"prompt_tokens": 9, "completion_tokens": 27}
            usage |= {"prompt_tokens_details": {"cached_tokens": 4}}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        done = True
    finally:
        state.running -= 1
        state.cancelled += not done


async def _deltas(body: dict[str, Any], said: str) -> AsyncIterator[dict[str, Any]]:
    pause = 0.05 if "slow" in said else 0.002
    if "think" in said:
        for piece in _pieces("The user asks about LoRA. I should be brief."):
            yield {"reasoning_content": piece}
            await asyncio.sleep(pause)
    if "weather" in said and body["messages"][-1]["role"] == "user":
        function = {"name": "weather", "arguments": ""}
        yield {"tool_calls": [{"index": 0, "id": "call_1", "function": function}]}
        for piece in ('{"city": ', '"Ulm"}'):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
        return
    text = MARKDOWN if "markdown" in said else SAID.get(body["model"], SAID["poet"])
    for piece in _pieces(text * (20 if "slow" in said else 1)):
        yield {"content": piece}
        await asyncio.sleep(pause)


def _pieces(text: str) -> list[str]:
    return [text[start : start + 6] for start in range(0, len(text), 6)]


def _chunk(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def _logprobs(delta: dict[str, Any]) -> dict[str, Any]:
    token = delta.get("content", "")
    top = [{"token": token, "logprob": -0.4}, {"token": "other", "logprob": -1.3}]
    return {"content": [{"token": token, "logprob": -0.4, "top_logprobs": top}]}


def audit_of(name: str) -> dict[str, Any]:
    """Returns changes of 27 layers: latent attention everywhere, experts from layer 1 on."""
    changes = []
    for layer in range(27):
        for kind in ("q", "kv_a", "kv_b", "o"):
            ratio = 0.004 * (1 + math.sin(layer / 4 + len(kind))) + 0.0005
            changes.append(_change(layer, f"self_attn.{kind}_proj", ratio))
        for kind in ("gate", "up", "down") if layer else ():
            ratio = 0.02 * math.exp(-(((layer - 16) / 7) ** 2)) + 0.001
            experts = [ratio * (1 + 0.6 * math.sin(layer + 3.7 * e)) for e in range(64)]
            experts[7] = 0.0
            changes.append(_change(layer, f"mlp.experts.{kind}_proj", ratio, experts))
    changes[12]["delta"] = changes[12]["ratio"] = 0.0
    changes[20]["ratio"] = None
    kinds = [f"self_attn.{each}_proj" for each in ("q", "kv_a", "kv_b", "o")]
    kinds += [f"mlp.experts.{each}_proj" for each in ("gate", "up", "down")]
    return {
        "name": name, "digest": "d1", "layers": list(range(27)), "changes": changes,
        "kinds": [{"kind": each, "changed": 26, "total": 27} for each in kinds]
        + [{"kind": "lm_head", "changed": 0, "total": 1}],
        "tensors": {"found": 372, "on_experts": 156, "on_other_modules": 216, "without_effect": 0,
                    "not_applied": 0},
        "saved_whole": [], "warnings": ["78 single experts unchanged, in model.layers.1.mlp"],
    }  # fmt: skip


def _change(
    layer: int, kind: str, ratio: float, experts: list[float] | None = None
) -> dict[str, Any]:
    return {
        "module": f"model.layers.{layer}.{kind}", "kind": kind, "layer": layer, "ranks": [8],
        "scalings": [2.0], "delta": 40 * ratio, "weight": 40.0, "ratio": ratio, "experts": experts,
    }  # fmt: skip


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(page_app(PageServer()), port=int(sys.argv[1]) if sys.argv[1:] else 0)
