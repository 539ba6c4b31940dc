"""A session: a loaded model that answers conversations, and the KV cache between them."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

from ktrt.adapter.residents import Adapters
from ktrt.config import SamplingArgs, SamplingOptions, override_sampling
from ktrt.errors import KtrtError, engine_errors
from ktrt.experts import GpuExperts
from ktrt.generate.loop import OnPrefill, check_prompt, stream_generate
from ktrt.generate.response import Response, TokenResponse
from ktrt.generate.runner import KvCache
from ktrt.generate.warm_up import warm_up
from ktrt.loading.model import LoadedModel
from ktrt.prompt.fit import context_limit, drop_turns
from ktrt.prompt.messages import check_messages, plain_messages
from ktrt.prompt.template.base import Message, Template

__all__ = ["Adapters", "Response", "Session", "TokenResponse"]

# As callers give them; content is text or a list of OpenAI's text parts.
Messages = Sequence[Mapping[str, object]]


class Session:
    """A model, its tokenizer and its adapters, ready to answer.

    ``model`` is the transformers model with its routed experts replaced, and works as one:
    ``model(input_ids).logits``. ``template`` and ``sampling`` hold the configured values;
    ``context_limit`` bounds the tokens of a conversation with its answer; ``audit`` lists the first
    adapter's tensors.

    One thread at a time uses a session, with its model and adapters. Within a thread, answers may
    be streamed one after another or interleaved; a conversation that continues the last one
    computes only its new tokens. A thread that asks for a token while another one computes gets a
    ``KtrtError``.

    ``EngineError``, from every method that runs the model: the engine failed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Any,
        template: Template,
        sampling: SamplingArgs,
        *,
        cutoff_len: int | None = None,
    ) -> None:
        """Takes ``loaded``, which ``close`` closes. ``cutoff_len`` lowers the context's limit."""
        self._loaded: LoadedModel | None = loaded
        self.model: Any = loaded.model
        self.adapters = loaded.adapters
        self.audit = loaded.audit
        self.tokenizer = tokenizer
        self.template = template
        self.sampling = sampling
        self.context_limit = context_limit(loaded.model, cutoff_len)
        self._bound = "cutoff_len allows" if self.context_limit == cutoff_len else ""
        self._running = threading.RLock()
        self._idle_cache: tuple[int, KvCache] | None = None
        self._stop_ids = template.stop_ids
        if template.name == "auto":
            self._stop_ids |= _model_stop_ids(loaded.model)

    def chat(
        self,
        messages: Messages,
        *,
        on_prefill: OnPrefill | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Response:
        """Returns the whole answer to ``messages``; see ``stream`` and ``stream_responses``."""
        return Response.whole(self.stream_responses(messages, on_prefill=on_prefill, **sampling))

    def stream(self, messages: Messages, **sampling: Unpack[SamplingOptions]) -> Iterator[str]:
        """Yields the answer to ``messages`` in pieces of text, never half a character.

        ``messages``: an optional system message, then user and assistant in turn, a user's last.
        ``sampling``: fields of ``SamplingArgs`` that replace the configured ones.

        ``ConfigError``, before the first piece: malformed messages, an unknown sampling argument, a
        conversation longer than the model's context. ``KtrtError``: the session is closed.
        """
        responses = self.stream_responses(messages, **sampling)
        return (response.text for response in responses if response.text)

    def stream_responses(
        self,
        messages: Messages,
        *,
        on_prefill: OnPrefill | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[TokenResponse]:
        """Like ``stream``, but yields every token, with counts, times and the finish reason.

        ``on_prefill(done, total)`` is called with the number of prompt tokens computed so far: 0
        first, then after every forward. Reused tokens are not counted. An exception that it raises
        (Ctrl-C, for example) ends the answer; the next one reuses what was computed.
        """
        loaded = self._open()
        args = override_sampling(self.sampling, sampling)
        prompt_ids = self.template.encode(check_messages(messages))
        max_tokens = check_prompt(loaded.model, prompt_ids, self.context_limit, self._bound)
        return self._responses(prompt_ids, args, max_tokens, on_prefill)

    def _responses(
        self,
        prompt_ids: Sequence[int],
        args: SamplingArgs,
        max_tokens: int,
        on_prefill: OnPrefill | None,
    ) -> Iterator[TokenResponse]:
        # Taken while in use: a second answer meanwhile gets another cache. Keys, values and
        # captured graphs belong to the adapters that they were made with.
        version = self.adapters.version
        idle, self._idle_cache = self._idle_cache, None
        cache = idle[1] if idle and idle[0] == version else self.new_cache()
        responses = stream_generate(
            self.tokenizer, cache, prompt_ids, args,
            stop_ids=self._stop_ids, max_tokens=max_tokens,
            shown_tokens=self.template.shown_tokens, on_prefill=on_prefill,
        )  # fmt: skip
        try:
            while True:
                with self._run():
                    response = next(responses, None)
                if response is None:
                    return
                yield response
                self._open()
                if self.adapters.version != version:
                    raise KtrtError("the adapters were changed during the answer; ask again")
        finally:
            if self._loaded is not None:
                self._idle_cache = version, cache

    def new_cache(self) -> KvCache:
        """Returns an empty KV cache for the adapters that are active now, for callers of
        ``ktrt.generate.loop``."""
        return self._open().new_cache()

    def warm_up(self) -> None:
        """Prepares the first answer: kernels, memory, and the graph of a decode step. Takes about a
        second; ``ktrt.load`` has called it."""
        with self._run():
            cache = self.new_cache()
            warm_up(cache, self.context_limit)
        self._idle_cache = self.adapters.version, cache

    def count_tokens(self, messages: Messages) -> int:
        """Returns the number of tokens of the prompt for ``messages``; 0 for none."""
        return self._count(plain_messages(messages))

    def _count(self, messages: Sequence[Message]) -> int:
        return len(self.template.encode(messages)) if messages else 0

    def fit(
        self, messages: Messages, **sampling: Unpack[SamplingOptions]
    ) -> tuple[list[Message], int]:
        """Returns ``messages`` without the oldest turns (a user's message and its answer) for which
        the context has no room, and the number of turns left out.

        Leaves room for ``max_new_tokens`` of ``sampling``, but no more than half of the context.
        The system message and the last message always stay.
        """
        args = override_sampling(self.sampling, sampling)
        plain = check_messages(messages)
        return drop_turns(plain, self._count, self.context_limit, args.max_new_tokens)

    def set_thinking(self, thinking: bool) -> None:
        """Switches the model's thinking on or off for the answers from now on. ``ConfigError``: the
        template has no such switch (``template.thinking`` is None)."""
        self.template = self.template.with_thinking(thinking)

    @property
    def gpu(self) -> GpuExperts | None:
        """The GPU's share of the routed experts; None without one."""
        return self._open().gpu

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of weights that decoding a token reads from the CPU's memory, with the adapters
        that are active now; None if that is not known."""
        return self._open().bytes_per_token()

    def close(self) -> None:
        """Frees threads and memory; the session answers no more. Idempotent. Another thread's
        token is waited for."""
        # First, so that a thread with an answer under way reads why it ends.
        loaded, self._loaded = self._loaded, None
        with self._running:
            self._idle_cache = None
            if loaded is not None:
                loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> LoadedModel:
        if self._loaded is None:
            raise KtrtError("this session is closed; load the model again with ktrt.load")
        return self._loaded

    @contextmanager
    def _run(self) -> Iterator[None]:
        """Within the block the model runs. ``KtrtError``: the session is closed, or another thread
        is in such a block."""
        self._open()
        # Reentrant: `on_prefill` may ask the session for something.
        if not self._running.acquire(blocking=False):
            raise KtrtError(
                "another thread is using this session: one thread at a time may; use a lock, or a "
                "queue to the thread that owns it"
            )
        try:
            self._open()
            with engine_errors():
                yield
        finally:
            self._running.release()


def _model_stop_ids(model: Any) -> frozenset[int]:
    """Returns the eos_token_id of generation_config.json, which is a number or a list."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
