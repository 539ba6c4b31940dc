"""The models that a server lists: bases, and adapters of one of them to choose from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktrt.config.check import nearest
from ktrt.errors import AdapterError, KtrtError


@dataclass(frozen=True)
class Model:
    """A model as ``/v1/models`` lists it. ``parent``: the base of an adapter; ``context``: most
    tokens of prompt and answer; None where the server does not say."""

    name: str
    parent: str | None = None
    context: int | None = None
    weighs: bool = False


def read_models(content: object) -> list[Model]:
    """Reads the body of ``/v1/models``; skips entries without a name."""
    found = content.get("data") if isinstance(content, Mapping) else None
    entries = (
        [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
    )
    return [_read_entry(each) for each in entries if isinstance(each.get("id"), str)]


def _read_entry(entry: Mapping[str, Any]) -> Model:
    parent, context = entry.get("parent"), entry.get("max_model_len")
    return Model(
        entry["id"],
        parent if isinstance(parent, str) and parent else None,
        context if isinstance(context, int) and context > 0 else None,
        # Only ktrt's server computes weighted sums.
        entry.get("owned_by") == "ktrt",
    )


def shown_names(models: list[Model]) -> str:
    """Returns the names in one line; of a long list, its beginning."""
    names = [each.name for each in models]
    more = f" … {len(names)} in all" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


class RemoteAdapters:
    """The adapters of one base model on a server; see ``ktrt.adapter.residents.Adapters``.

    The choice is sent as the request's ``model``: the base's name, an adapter's, or, to ktrt's
    server, a weighted sum such as ``a*0.5+b*0.3``. It changes nothing for other clients.
    """

    def __init__(self, base: Model, models: list[Model]) -> None:
        self.base = base
        self.names = tuple(each.name for each in models if each.parent == base.name)
        self._weights: dict[str, float] = {}
        self._factor = 1.0
        self._off = False

    @property
    def active(self) -> dict[str, float]:
        """The chosen adapters with their weights; empty: the base model."""
        weights = {} if self._off else self._weights
        return {name: weight * self._factor for name, weight in weights.items()}

    @property
    def model(self) -> str:
        """The name to send as a request's ``model``."""
        active = self.active
        if not active:
            return self.base.name
        if list(active.values()) == [1.0]:
            return next(iter(active))
        return "+".join(f"{name}*{weight!r}" for name, weight in active.items())

    def activate(self, name_or_weights: str | Mapping[str, float]) -> None:
        """Chooses one adapter, or a weighted sum. ``AdapterError``, nothing changed: an unknown
        name, a weight that is no number, a server that takes no weights."""
        given = {name_or_weights: 1.0} if isinstance(name_or_weights, str) else name_or_weights
        self._choose(dict(given), 1.0)

    def off(self) -> None:
        """Chooses the base model, until ``on``."""
        self._off = True

    def on(self) -> None:
        """Chooses again what ``off`` left."""
        self._off = False

    def scale(self, factor: float) -> None:
        """Multiplies the weights given to ``activate``. ``AdapterError`` if nothing is active, else
        as ``activate``."""
        if self._off or not self._weights:
            raise AdapterError("no adapter is active that could be scaled; activate one first")
        self._choose(self._weights, factor)

    def take(self, before: "RemoteAdapters") -> None:
        """Chooses what ``before`` had chosen, as far as this list still has it."""
        if set(before._weights) <= set(self.names):
            self._weights, self._factor, self._off = before._weights, before._factor, before._off

    def _choose(self, weights: dict[str, float], factor: float) -> None:
        for name, weight in weights.items():
            if name not in self.names:
                known = ", ".join(self.names) or "none"
                raise AdapterError(
                    f"the server has no adapter {name!r} of {self.base.name}"
                    f"{nearest(name, self.names)}; it has {known}"
                )
            if not math.isfinite(weight * factor):
                raise AdapterError(f"adapter {name!r}: expected a finite weight, found {weight:g}")
        plain = len(weights) == 1 and [each * factor for each in weights.values()] == [1.0]
        if weights and not plain and not self.base.weighs:
            raise AdapterError(
                "this server takes no weights: choose one adapter by its name alone, or off"
            )
        if any(set("*+") & set(name) for name in weights) and not plain:
            raise AdapterError("an adapter with * or + in its name cannot be weighed")
        self._weights, self._factor, self._off = dict(weights), factor, False


def choose_model(models: list[Model], wanted: str | None, url: str) -> tuple[Model, str | None]:
    """Returns the base to talk with, and the adapter of it if ``wanted`` names one.

    Without ``wanted``: the only base that the server lists. ``KtrtError``: there are none or
    several, or no such model. A server without a list gets the name as it is.
    """
    if wanted is not None and not models:
        return Model(wanted), None
    if wanted is None:
        bases = [each for each in models if each.parent is None]
        if len(bases) != 1:
            found = f"it lists {len(bases)}: {shown_names(bases)}" if bases else "it lists none"
            raise KtrtError(f"{url}: which model? {found}; choose one by --model NAME")
        return bases[0], None
    known = {each.name: each for each in models}
    found_model = known.get(wanted)
    if found_model is None:
        raise KtrtError(
            f"{url}: no model {wanted!r}{nearest(wanted, known)}; it has {shown_names(models)}"
        )
    base = known.get(found_model.parent or "")
    return (found_model, None) if base is None else (base, wanted)
