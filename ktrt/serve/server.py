"""The server's state, which endpoints get by ``Depends(get_server)``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request

from ktrt.serve.generation import Admission, Asked, Generation
from ktrt.serve.names import Names

if TYPE_CHECKING:
    from ktrt.serve.settings import ServeSettings
    from ktrt.session import Session


class Server:
    """A session with its settings, the names of its models and its metrics."""

    def __init__(self, session: Session, settings: ServeSettings) -> None:
        self.session, self.settings = session, settings
        root = settings.adapter_root
        self.names = Names(session, settings.model_name, Path(root) if root else None)
        self.admission = Admission(session, settings.max_waiting)

    def generate(self, asked: Asked) -> Generation:
        """Returns the answers to a request, to be entered as a context."""
        return Generation(self.session, self.admission, asked)


def get_server(request: Request) -> Server:
    """Returns the server of a request's app."""
    server: Server = request.app.state.server
    return server
