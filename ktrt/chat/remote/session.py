"""A server as the chat's partner, in place of a local session."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, Unpack

from ktrt.chat.remote.events import AnswerReader, RemoteToken
from ktrt.chat.remote.http import Address, Call, ServerError, nothing
from ktrt.chat.remote.models import Model, RemoteAdapters, choose_model, read_models
from ktrt.chat.remote.request import sampling_fields, sent_messages
from ktrt.config import SamplingArgs, SamplingOptions, override_sampling
from ktrt.errors import KtrtError
from ktrt.prompt.fit import drop_turns

# Longest wait for the list of models, or for a prompt's length: nothing is computed for them.
_SHORT_SECONDS = 20.0
# A template adds a few tokens to each message, and a few to the whole.
_TEMPLATE_TOKENS = 16


@dataclass(frozen=True)
class RemoteThinking:
    """``thinking`` None: the server decides."""

    thinking: bool | None = None


class RemoteSession:
    """A model of an OpenAI server, ours or another; see ``ktrt.chat.partner.Partner``.

    Only settings that the user made are sent; the server's defaults hold for the others. Nothing
    here changes the server: adapter and thinking are choices of each request.
    """

    # Tokens come as text.
    tokenizer = None

    def __init__(
        self,
        address: Address,
        *,
        model: str | None = None,
        settings: Mapping[str, object] | None = None,
        system: str = "",
        thinking: bool | None = None,
    ) -> None:
        """Asks the server for its models. ``model``: a base or an adapter; ``settings``: sampling
        arguments; ``system``: the prompt of conversations without one.

        ``KtrtError``: the server cannot be reached or refuses, it has no such model;
        ``ConfigError``: a wrong setting.
        """
        self.address = address
        self.settings = dict(settings or {})
        self.sampling = override_sampling(SamplingArgs(), self.settings)
        self._system = system
        self._configured = self.template = RemoteThinking(thinking)
        self.models = self._list(needed=model is None)
        base, adapter = choose_model(self.models, model, address.url)
        self.adapters = RemoteAdapters(base, self.models)
        if adapter is not None:
            self.adapters.activate(adapter)
        self._counts = address.root is not None
        # Fields that this server does not take, with their replacements.
        self._refused: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def name(self) -> str:
        """The partner's name, for people and for saved conversations."""
        return f"{self.adapters.base.name} at {self.address.url}"

    @property
    def context_limit(self) -> int:
        """Most tokens of prompt and answer, as far as the server tells it."""
        return self.adapters.base.context or sys.maxsize

    def use_model(self, name: str) -> None:
        """Talks with another model of the server, or an adapter of one. ``KtrtError``: the server
        has no such model; nothing changed."""
        self.refresh()
        base, adapter = choose_model(self.models, name, self.address.url)
        adapters = RemoteAdapters(base, self.models)
        if adapter is not None:
            adapters.activate(adapter)
        self.adapters = adapters

    def refresh(self) -> None:
        """Asks for the models again; the choice stays. ``KtrtError``."""
        self.models = self._list(needed=False)
        known = {each.name: each for each in self.models}
        base = self.adapters.base
        adapters = RemoteAdapters(known.get(base.name, base), self.models)
        adapters.take(self.adapters)
        self.adapters = adapters

    def _list(self, *, needed: bool) -> list[Model]:
        path = f"{self.address.parts.path}/models"
        try:
            with Call(self.address, "GET", path) as call:
                return read_models(call.json(self._deadline()))
        except ServerError as error:
            if needed or error.status not in (404, 405, 501):
                raise
            return []  # a server with a single model and no list

    def set_thinking(self, thinking: bool | None) -> None:
        """Asks for thinking or against it from now on; None: as configured. A server without such
        a switch ignores the request, or refuses it with the next message."""
        self.template = self._configured if thinking is None else RemoteThinking(thinking)

    def fit(
        self, messages: Sequence[Mapping[str, str]], **sampling: Unpack[SamplingOptions]
    ) -> tuple[Sequence[Mapping[str, str]], int]:
        """Returns ``messages`` without the oldest turns for which the context has no room, and the
        number of turns left out: none if the server tells no limit, or counts no tokens."""
        wanted = override_sampling(self.sampling, sampling).max_new_tokens
        limit = self.context_limit
        room = limit - min(wanted, limit // 2)
        # A token has at least a byte: most conversations fit without a question to the server.
        most = sum(len(each["content"].encode("utf-8", "replace")) for each in messages)
        if not self._counts or most + _TEMPLATE_TOKENS * (len(messages) + 1) <= room:
            return messages, 0
        try:
            return drop_turns(messages, self._count, limit, wanted)
        except ServerError as error:
            if error.status not in (403, 404, 405, 501):
                raise
            self._counts = False
            return messages, 0

    def _count(self, messages: Sequence[Mapping[str, str]]) -> int:
        body = {
            "model": self.adapters.model,
            "messages": sent_messages(messages, self._system),
            **self._thinking_fields(),
        }
        with Call(self.address, "POST", f"{self.address.root}/tokenize", body) as call:
            found = call.json(self._deadline())
        count = found.get("count") if isinstance(found, Mapping) else None
        if not isinstance(count, int):
            raise ServerError(f"{self.address.url}: /tokenize: expected a count", 501)
        return count

    def stream_responses(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[RemoteToken]:
        """Yields the answer. Closing the generator closes the connection, which ends the answer on
        the server too.

        ``on_prefill(0, 0)`` is called every 0.05 s while nothing comes; an exception that it raises
        ends the answer. ``KtrtError``: the server cannot be reached, refuses, or fails.
        """
        fields = sampling_fields(self.settings | sampling)
        wait = nothing if on_prefill is None else lambda: on_prefill(0, 0)
        body: dict[str, Any] = {
            "model": self.adapters.model,
            "messages": sent_messages(messages, self._system),
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
            **self._thinking_fields(),
        }
        path = f"{self.address.parts.path}/chat/completions"
        while True:
            with Call(self.address, "POST", path, self._spoken(body)) as call:
                try:
                    yield from AnswerReader(self.address).read(call.lines(wait))
                except ServerError as error:
                    if not self._learns(error, body):
                        raise
                else:
                    return

    def _thinking_fields(self) -> dict[str, Any]:
        thinking = self.template.thinking
        if thinking is None:
            return {}
        return {"chat_template_kwargs": {"enable_thinking": thinking}}

    def _spoken(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns ``body`` with the field names that this server takes."""
        names = {name: self._refused.get(name, name) for name in body}
        return {names[name] or "": value for name, value in body.items() if names[name]}

    def _learns(self, error: ServerError, body: Mapping[str, Any]) -> bool:
        """Returns whether a refusal is about a field with a known replacement, noted from now on:
        older servers know no ``stream_options``, OpenAI's newer models no ``max_tokens``."""
        if error.status not in (400, 422):
            return False
        text = f"{error.param} {error}"
        for name, instead in (("stream_options", None), ("max_tokens", "max_completion_tokens")):
            if name in body and name not in self._refused and name in text:
                if instead is not None and instead not in text:
                    continue
                self._refused[name] = instead
                return True
        return False

    def _deadline(self) -> Callable[[], None]:
        end = time.monotonic() + _SHORT_SECONDS

        def wait() -> None:
            if time.monotonic() > end:
                raise KtrtError(f"{self.address.url}: no answer within {_SHORT_SECONDS:.0f} s")

        return wait
