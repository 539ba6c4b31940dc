"""Routes: whether the process lives, whether it answers, and its metrics."""

from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ktrt.serve.server import Server, get_server

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Answers while the process lives, whatever the engine does."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(server: Annotated[Server, Depends(get_server)]) -> dict[str, str]:
    """Answers while the server takes requests."""
    server.check_ready()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
def metrics(server: Annotated[Server, Depends(get_server)]) -> Response:
    """Returns the metrics in Prometheus' text format."""
    return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})
