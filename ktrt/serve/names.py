"""The names that ``model`` may have: the base model's, the adapters', and weighted sums of them."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.errors import AdapterError, ConfigError
from ktrt.serve.errors import ApiError
from ktrt.utils.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from ktrt.session import Session

    # A name, weights by name, or None for the base: an ``Adapter`` of a session.
    Chosen = str | Mapping[str, float] | None

# Possessive: a wrong text of n digits is refused in n steps, not n².
_NUMBER = r"[+-]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?"
_SUM = "name*0.5+other*0.3"
# Names that an error lists.
_LISTED = 12
# A sum's characters: 20 names of the longest kind.
_LONGEST = 5000
# Weights beyond it are typing errors, and overflow to NaN in the model.
_HEAVIEST = 1000.0


@dataclass(frozen=True)
class Card:
    """A model that ``model`` may name. ``parent``: the base of an adapter. ``root``: its folder,
    below ``ServeSettings.adapter_root`` if it is there, else the folder's name. ``digest`` tells
    contents apart. ``created``: when the server first had it, in seconds."""

    id: str
    parent: str | None
    root: str
    digest: str | None
    created: int


class Names:
    """Resolves a request's ``model``, and lists what it may be.

    The base has one name, which always answers as the base: whatever is active in the session, and
    never as an adapter, which cannot have this name.
    """

    def __init__(
        self, session: Session, base: str | None = None, adapter_root: Path | None = None
    ) -> None:
        """``base``: the base's name; None: its folder's. ``ConfigError``: an adapter has it."""
        folder = _folder(session)
        self._session, self._root = session, adapter_root
        self.base = base or (folder.name if folder else "base")
        self._folder = folder.name if folder else self.base
        self._digest = _base_digest(session)
        self._started = int(time.time())
        self._lock = threading.Lock()
        # When a load was first seen, by the engine's number, which no other load gets.
        self._seen: dict[int, int] = {}
        if self.base in session.adapters.names:
            raise ConfigError(
                f"the base model and an adapter are both named {self.base!r}; name the base with "
                "--model-name or API_MODEL_NAME"
            )
        self.cards()

    def resolve(self, model: str, weights: Mapping[str, float] | None = None) -> Chosen:
        """Returns the adapter that a request means: None for the base, a name, or weights by name.

        ``model``: the base's name, an adapter's, or a sum such as ``name*0.5+other*0.3``, where a
        missing weight is 1. ``weights``: the request's field ``adapter_weights``, instead of a sum
        in ``model``, which then names the base or nothing.

        ``ApiError`` 404: a name that nobody has; 400: weights that cannot be used.
        """
        if weights is not None:
            return self._given(model, weights)
        if model == self.base:
            return None
        if model in self._session.adapters.names:
            return model
        terms = self._terms(model)
        if terms is None:
            raise self._unknown(model)
        return self._checked(terms, "model")

    def is_sum(self, model: str) -> bool:
        """Returns whether a text means a weighted sum of known names."""
        return self._terms(model) is not None

    def card(self, model: str) -> Card:
        """Returns the card of a name, or of a sum. ``ApiError`` 404: nobody has it."""
        for card in self.cards():
            if card.id == model:
                return card
        adapter = self.resolve(model)
        assert not isinstance(adapter, str)
        resident = self._session.adapters.resident
        weights = dict(adapter or {}).items()
        parts = sorted((resident(name).digest, weight) for name, weight in weights)
        return Card(model, self.base, model, _digest_of(parts), self._started)

    def cards(self) -> list[Card]:
        """Returns the card of the base, then of the adapters in the order of loading."""
        return [self._base_card(), *self._adapter_cards()]

    def known(self) -> str:
        """Lists the names for an error message."""
        names = [self.base, *self._session.adapters.names]
        more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
        return ", ".join(names[:_LISTED]) + more

    def _base_card(self) -> Card:
        return Card(self.base, None, self._folder, self._digest, self._started)

    def _adapter_cards(self) -> Iterator[Card]:
        for name in self._session.adapters.names:
            try:
                resident = self._session.adapters.resident(name)
            except AdapterError:  # unloaded since
                continue
            with self._lock:
                created = self._seen.setdefault(resident.number, int(time.time()))
            root = self._shown(resident.folder) if resident.folder else name
            yield Card(name, self.base, root, resident.digest, created)

    def _shown(self, folder: Path) -> str:
        resolved = folder.resolve()
        if self._root is not None and resolved.is_relative_to(self._root.resolve()):
            return str(resolved.relative_to(self._root.resolve()))
        return resolved.name

    def _given(self, model: str, weights: Mapping[str, float]) -> Chosen:
        if model and self.resolve(model) is not None:
            raise ApiError(
                400, f"adapter_weights: expected with the base's name ({self.base!r}) as model, "
                f"found model {model!r}; name the adapters in one place", param="adapter_weights",
            )  # fmt: skip
        names = self._session.adapters.names
        for name in weights:
            if name not in names:
                raise self._unknown(name, "adapter_weights")
        return self._checked(weights.items(), "adapter_weights")

    def _terms(self, model: str) -> list[tuple[str, float]] | None:
        """Returns the terms of a sum; None: it is none of known names. Names may contain * and
        +."""
        if len(model) > _LONGEST:
            return None
        names = sorted([self.base, *self._session.adapters.names], key=len, reverse=True)
        either = "|".join(map(re.escape, names))
        term = rf"\s*+(?P<name>{either})\s*+(?:\*\s*+(?P<weight>{_NUMBER})\s*+)?"
        terms, start = [], 0
        while found := re.compile(rf"{term}(?P<end>\+|$)").match(model, start):
            terms.append((found["name"], float(found["weight"] or 1)))
            start = found.end()
            if not found["end"]:
                return terms if len(terms) > 1 or found["weight"] else None
        return None

    def _checked(self, terms: Iterable[tuple[str, float]], param: str) -> Chosen:
        weights: dict[str, float] = {}
        for name, weight in terms:
            if name == self.base:
                raise ApiError(
                    400, f"{param}: the base {name!r} is part of every sum; expected adapters",
                    param=param,
                )  # fmt: skip
            if name in weights:
                raise ApiError(400, f"{param}: adapter {name!r} is named twice", param=param)
            if not abs(weight) <= _HEAVIEST:
                raise ApiError(
                    400, f"{param}: the weight of adapter {name!r} is {weight:g}, expected "
                    f"-{_HEAVIEST:g} … {_HEAVIEST:g}", param=param,
                )  # fmt: skip
            weights[name] = weight
        try:
            self._session.adapters.choose(weights)
        except AdapterError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from error
        return weights or None

    def _unknown(self, name: str, param: str = "model") -> ApiError:
        return ApiError(
            404, f"{param}: there is no model {name!r:.200}; expected one of {self.known()}, or a "
            f"sum such as {_SUM}", param=param, code="model_not_found",
        )  # fmt: skip


def _folder(session: Session) -> Path | None:
    return session.base.experts.checkpoint.folder.resolve() if session.base else None


def _base_digest(session: Session) -> str | None:
    """Returns a digest of names, sizes and samples of the weight files: hashing all of them would
    take minutes."""
    if session.base is None:
        return None
    found = fingerprint(session.base.experts.files())
    return _digest_of([(each["name"], each["size"], each["sha256"]) for each in found])


def _digest_of(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
