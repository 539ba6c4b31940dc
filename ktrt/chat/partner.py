"""Interface of the model that a chat talks with: a local ``Session``, or a server."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Unpack

from ktrt.chat.status import Counts
from ktrt.config import SamplingArgs, SamplingOptions


class Piece(Counts, Protocol):
    """A piece of an answer, with counts and times up to it; see ``TokenResponse``.

    ``token``: the token's id, or its text where ids are unknown.
    """

    @property
    def text(self) -> str: ...
    @property
    def token(self) -> int | str: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> Sequence[tuple[int | str, float]]: ...

    def summary(self) -> str:
        """Returns counts and speeds for a log line."""
        ...


class PartnerAdapters(Protocol):
    """The adapters to choose from; see ``ktrt.adapter.residents.Adapters``."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def active(self) -> dict[str, float]: ...

    def activate(self, name_or_weights: str | Mapping[str, float]) -> None: ...
    def off(self) -> None: ...
    def on(self) -> None: ...
    def scale(self, factor: float) -> None: ...


class Thinking(Protocol):
    """``thinking`` None: there is no switch, or the server decides."""

    @property
    def thinking(self) -> bool | None: ...


class Partner(Protocol):
    """The members of a session that the chat uses."""

    tokenizer: Any

    @property
    def sampling(self) -> SamplingArgs: ...
    @property
    def context_limit(self) -> int: ...
    @property
    def adapters(self) -> PartnerAdapters: ...
    @property
    def template(self) -> Thinking: ...

    def set_thinking(self, thinking: bool | None) -> None:
        """Switches thinking for the answers from now on; None: as configured. ``ConfigError``:
        there is no such switch."""
        ...

    def fit(
        self, messages: Sequence[Mapping[str, str]], **sampling: Unpack[SamplingOptions]
    ) -> tuple[Sequence[Mapping[str, str]], int]:
        """Returns the messages that the context has room for, and the number of turns dropped."""
        ...

    def stream_responses(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterable[Piece]:
        """Yields the answer. ``on_prefill(done, total)`` is called while nothing comes; an
        exception that it raises ends the answer."""
        ...
