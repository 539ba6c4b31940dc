"""Routes: the models that a request may name, with OpenAI's fields and Anthropic's, so that both
clients read them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from ktrt.serve.server import Server, get_server

if TYPE_CHECKING:
    from ktrt.serve.names import Card

router = APIRouter()


class ModelCard(BaseModel):
    """A model: the base, an adapter, or a weighted sum of adapters.

    ``parent``: an adapter's base; ``root``: the folder that it was loaded from; ``digest`` tells
    contents apart, whatever the name. ``type``, ``display_name`` and ``created_at`` are Anthropic's
    fields.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ktrt"
    root: str
    parent: str | None
    digest: str | None
    max_model_len: int
    type: Literal["model"] = "model"
    display_name: str
    created_at: str


class ModelList(BaseModel):
    """All models. ``has_more``, ``first_id`` and ``last_id`` are Anthropic's."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: bool = False
    first_id: str
    last_id: str


@router.get("/v1/models")
async def models(server: Annotated[Server, Depends(get_server)]) -> ModelList:
    """Lists the base and every adapter."""
    data = [_model_card(card, server) for card in server.names.cards()]
    return ModelList(data=data, first_id=data[0].id, last_id=data[-1].id)


# An adapter's name may contain slashes.
@router.get("/v1/models/{model:path}")
async def model(model: str, server: Annotated[Server, Depends(get_server)]) -> ModelCard:
    """Describes one model; a weighted sum too, since ``model`` may name one."""
    return _model_card(server.names.card(model), server)


def _model_card(card: Card, server: Server) -> ModelCard:
    return ModelCard(
        id=card.id, created=card.created, root=card.root, parent=card.parent, digest=card.digest,
        max_model_len=server.session.context_limit, display_name=card.id,
        created_at=datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z"),
    )  # fmt: skip
