"""Routes: whether the process lives, and whether it answers."""

from typing import Annotated

from fastapi import APIRouter, Depends

from ktrt.serve.errors import ApiError
from ktrt.serve.server import Server, get_server

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Answers while the process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(server: Annotated[Server, Depends(get_server)]) -> dict[str, str]:
    """Answers while the engine takes requests."""
    if not getattr(server.session, "alive", True):
        raise ApiError(503, "the engine has failed", kind="server_error")
    return {"status": "ready"}
