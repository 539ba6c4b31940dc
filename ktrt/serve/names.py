"""The names that ``model`` may have: the base model's and the adapters'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from ktrt.session import Adapter, Session


class Names:
    """Resolves a request's ``model``."""

    def __init__(self, session: Session, base: str) -> None:
        self._session, self.base = session, base

    def resolve(self, model: str) -> Adapter:
        """Returns the adapter that ``model`` names; None for the base."""
        if model == self.base:
            return None
        if model in self._session.adapters.names:
            return model
        known = ", ".join([self.base, *self._session.adapters.names])
        raise ApiError(
            404, f"model: expected one of {known}; found {model!r}",
            kind="invalid_request_error", param="model", code="model_not_found",
        )  # fmt: skip
