"""A session: a loaded model that answers conversations, and the KV cache between them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from ktrt.adapter.residents import Adapters
from ktrt.config import SamplingArgs, override_sampling
from ktrt.errors import ConfigError, KtrtError
from ktrt.generate.loop import (
    OnPrefill,
    Response,
    check_prompt,
    stream_generate,
)
from ktrt.generate.runner import GraphsFor, KvCache
from ktrt.generate.warm_up import warm_up
from ktrt.prompt.fit import context_limit, drop_turns
from ktrt.prompt.template.base import Template

__all__ = ["Adapters", "AuditView", "Response", "Session", "check_messages"]

_ROLES = ("system", "user", "assistant")


class AuditView(Protocol):
    """The adapter audit, as `ktrt.adapter` makes it; no rows for a base model."""

    @property
    def rows(self) -> Sequence[Any]: ...
    @property
    def found(self) -> int: ...
    @property
    def applied_experts(self) -> int: ...
    @property
    def applied_peft(self) -> int: ...
    @property
    def not_applied(self) -> int: ...
    def table(self) -> str: ...


class Session:
    """A model, its tokenizer and the adapter audit, ready to answer.

    ``model`` is the transformers model with its routed experts replaced, and works as one:
    ``model(input_ids).logits``. Answers may be streamed one after the other or interleaved; a
    conversation that continues the last one computes only its new tokens. ``template`` and
    ``sampling`` are what is configured; ``context_limit`` is how many tokens a conversation with
    its answer may have.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        template: Template,
        sampling: SamplingArgs,
        audit: AuditView,
        close: Callable[[], None],
        graphs: GraphsFor | None = None,
        gpu: Any = None,
        adapters: Adapters | None = None,
        cutoff_len: int | None = None,
        weight_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        """``close`` frees what the model holds; it is called once. ``graphs``, ``gpu``: see
        ``KvCache``; ``adapters``: the model's. ``cutoff_len`` lowers the context's limit;
        ``weight_bytes``: see ``bytes_per_token``."""
        self.model = model
        self.adapters = adapters or Adapters()
        self.tokenizer = tokenizer
        self.audit = audit
        self.template = template
        self.sampling = sampling
        self.context_limit = context_limit(model, cutoff_len)
        self._bound = "cutoff_len allows" if self.context_limit == cutoff_len else ""
        self._close: Callable[[], None] | None = close
        self._graphs = graphs
        self._gpu = gpu
        self._weight_bytes = weight_bytes
        self._idle_cache: tuple[int, KvCache] | None = None
        self._stop_ids = template.stop_ids
        if template.name == "auto":
            self._stop_ids |= _model_stop_ids(model)

    def stream(self, messages: Sequence[Mapping[str, str]], **sampling: object) -> Iterator[str]:
        """The answer to ``messages`` as pieces of text, never half a character.

        ``messages``: an optional system message, then user and assistant in turn, a user's last.
        ``sampling``: fields of ``ktrt.config.SamplingArgs`` that replace the configured ones.

        ``ConfigError``, before the first piece: malformed messages, an unknown sampling argument, a
        conversation longer than the model's context. ``KtrtError``: the session is closed.
        """
        responses = self.stream_responses(messages, on_prefill=None, **sampling)
        return (response.text for response in responses if response.text)

    def stream_responses(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        on_prefill: OnPrefill | None = None,
        **sampling: object,
    ) -> Iterator[Response]:
        """Like ``stream``, with a response for every token: counts, timings, finish reason.

        ``on_prefill(done, total)`` is told of the prompt tokens that are not reused: 0 done first,
        then after every forward. An exception of its own (Ctrl-C, say) ends the answer there, and
        what is done by then need not be computed again.
        """
        self._require_open()
        args = override_sampling(self.sampling, sampling)
        check_messages(messages)
        prompt_ids = self.template.encode(messages)
        max_tokens = check_prompt(self.model, prompt_ids, self.context_limit, self._bound)
        return self._responses(prompt_ids, args, max_tokens, on_prefill)

    def _responses(
        self,
        prompt_ids: Sequence[int],
        args: SamplingArgs,
        max_tokens: int,
        on_prefill: OnPrefill | None,
    ) -> Iterator[Response]:
        # Taken while in use, so that a second answer meanwhile gets a cache of its own.
        # Keys and values, and captured graphs, belong to the adapters that they were made with.
        version = self.adapters.version
        idle, self._idle_cache = self._idle_cache, None
        cache = idle[1] if idle and idle[0] == version else self.new_cache()
        responses = stream_generate(
            self.tokenizer, cache, prompt_ids, args,
            stop_ids=self._stop_ids, max_tokens=max_tokens,
            shown_tokens=self.template.shown_tokens, on_prefill=on_prefill,
        )  # fmt: skip
        try:
            for response in responses:
                yield response
                self._require_open()
                if self.adapters.version != version:
                    raise KtrtError("the adapters were changed during the answer; ask again")
        finally:
            if self._close is not None:
                self._idle_cache = version, cache

    def new_cache(self) -> KvCache:
        """An empty KV cache for the adapters that are active now, as answers use it: for those who
        call ``ktrt.generate.loop`` themselves."""
        return KvCache(self.model, self._graphs, self._gpu, self.adapters.active_set)

    def warm_up(self) -> None:
        """Makes what the first answer needs: kernels, memory, and the graph of a decode step. Takes
        about a second; ``ktrt.load`` has done it."""
        self._require_open()
        cache = self.new_cache()
        warm_up(cache, self.context_limit)
        self._idle_cache = self.adapters.version, cache

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """How many tokens the prompt for ``messages`` has; 0 for none."""
        return len(self.template.encode(messages)) if messages else 0

    def fit(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int | None = None
    ) -> tuple[list[Mapping[str, str]], int]:
        """``messages`` without the oldest turns for which the context has no room, and how many
        turns (a user's message and its answer) those are.

        Room is left for ``max_new_tokens`` (None: the configured number), but no more than half of
        the context. The system message and the last message always stay.
        """
        answer = self.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        return drop_turns(messages, self.count_tokens, self.context_limit, answer)

    def set_thinking(self, thinking: bool) -> None:
        """Whether the model is to think before the answers from now on. ``ConfigError``: the
        template has no such switch (``template.thinking`` is None)."""
        self.template = self.template.with_thinking(thinking)

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of weights that decoding a token reads from the CPU's memory, with the adapter as
        it is now; None if that is not known."""
        return self._weight_bytes()

    def close(self) -> None:
        """Frees threads and memory; the session answers no more. Idempotent."""
        close, self._close = self._close, None
        self._idle_cache = self._graphs = self._gpu = None
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._close is None:
            raise KtrtError("this session is closed; load the model again with ktrt.load")


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """``ConfigError`` naming the first message that is malformed or out of turn."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages: expected a list of messages, found {messages!r:.80}")
    expected = "user"
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ConfigError(f"{where}: expected a mapping of role and content, found {message!r}")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise ConfigError(f"{where}: role: expected {', '.join(_ROLES)}, found {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise ConfigError(f"{where}: content: expected text, not empty, found {content!r}")
        if any(0xD800 <= ord(each) <= 0xDFFF for each in content):
            raise ConfigError(
                f"{where}: content: {content!r:.40} holds half a character (U+D800 …)"
            )
        if role == "system" and index == 0:
            continue
        if role != expected:
            raise ConfigError(
                f"{where}: expected a message of the {expected}, found one of the {role}"
            )
        expected = "assistant" if role == "user" else "user"
    if expected == "user":
        raise ConfigError("messages: expected a last message of the user, nothing to answer")


def _model_stop_ids(model: Any) -> frozenset[int]:
    """The eos_token_id of generation_config.json, a number or a list."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
