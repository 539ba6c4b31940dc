"""Routes: the page, its files, and the facts that it shows of the server."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ktrt.serve.page.assets import asset_response
from ktrt.serve.server import Server, get_server

router = APIRouter()


class PageSampling(BaseModel):
    """The configured sampling, by the names of ``SamplingArgs``."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_new_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop_strings: list[str]
    stop_token_ids: list[int]
    top_logprobs: int


class PageInfo(BaseModel):
    """Facts that stay: ``thinking`` None means that the template has no such switch."""

    context_limit: int
    thinking: bool | None
    sampling: PageSampling


class PageStatus(BaseModel):
    """A moment of the server. ``limit_share``: the bytes that the latest steps read per second over
    the bandwidth of the memory; None until both are measured."""

    running: int
    waiting: int
    generated_tokens: int
    limit_share: float | None


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index(request: Request) -> Response:
    """The page."""
    return asset_response(request, "index.html")


@router.api_route("/page/assets/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def asset(request: Request, path: str) -> Response:
    """A file of the page."""
    return asset_response(request, path)


@router.get("/v1/page/info")
async def info(server: Annotated[Server, Depends(get_server)]) -> PageInfo:
    """Returns the configured values that the page shows."""
    session = server.session
    sampling = {name: getattr(session.sampling, name) for name in PageSampling.model_fields}
    if not session.sampling.do_sample:
        sampling["temperature"] = 0.0
    return PageInfo(
        context_limit=session.context_limit,
        thinking=session.template.thinking,
        sampling=PageSampling.model_validate(sampling),
    )


@router.get("/v1/page/status")
async def status(server: Annotated[Server, Depends(get_server)]) -> PageStatus:
    """Returns the load and the speed of the server."""
    stats = server.session.stats()
    limit = server.memory_limit
    if not limit.is_known and not stats.running and not stats.waiting:
        await asyncio.to_thread(limit.measure)
    return PageStatus(
        running=stats.running,
        waiting=stats.waiting,
        generated_tokens=stats.generated_tokens,
        limit_share=limit.share(stats.read_bandwidth),
    )
