"""Routes: vLLM's loading and unloading of adapters, and the audit of one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse, Response

from ktrt.serve.errors import ErrorBody
from ktrt.serve.server import Server, get_server
from ktrt.serve.vllm.audits import AdapterAudit

router = APIRouter()


class LoadRequest(BaseModel):
    """``lora_path``: a folder below the server's adapter root, absolute or relative to it.
    ``load_inplace``: takes the place of an adapter of this name."""

    model_config = ConfigDict(extra="allow")

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """vLLM's ``lora_int_id`` is not needed."""

    model_config = ConfigDict(extra="allow")

    lora_name: str


def _refusals(*statuses: tuple[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": text} for status, text in statuses}


# With a response class that has a media type, FastAPI documents it for the errors too.
_DONE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


_OFF = (403, "Loading at run time is off, or the key is not the administrator's.")


@router.post(
    "/v1/load_lora_adapter",
    response_class=Response,
    responses=_DONE
    | _refusals(
        (400, "The adapter does not fit, for the reason given."), _OFF,
        (404, "There is no such folder."), (409, "The name is taken, or in use."),
    ),
)  # fmt: skip
async def load_adapter(
    request: LoadRequest, server: Annotated[Server, Depends(get_server)]
) -> PlainTextResponse:
    """Loads an adapter while requests are answered. Its name answers after every tensor has been
    checked against the base and applied."""
    await server.runtime.load(request.lora_name, request.lora_path, replace=request.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    response_class=Response,
    responses=_DONE
    | _refusals(
        (400, "The name is the base's."), _OFF, (404, "There is no such adapter."),
        (409, "Answers use the adapter."),
    ),
)  # fmt: skip
async def unload_adapter(
    request: UnloadRequest, server: Annotated[Server, Depends(get_server)]
) -> PlainTextResponse:
    """Unloads an adapter that no answer uses."""
    await server.runtime.unload(request.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


@router.get(
    "/v1/adapters/{name:path}/audit", responses=_refusals((404, "There is no such adapter."))
)
async def audit_adapter(
    name: str,
    server: Annotated[Server, Depends(get_server)],
    norms: Annotated[bool, Query(description="with ‖W‖, read from the base's files")] = True,
) -> AdapterAudit:
    """Returns the size of every change that an adapter makes, by layer and projection. The first
    request for ‖W‖ reads the base's weights: a second for every few GB."""
    return await server.audits.audit(name, norms=norms)
