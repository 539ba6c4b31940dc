"""A session: a loaded model that answers conversations, of one caller or of many at once."""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Self, Unpack

from ktrt.adapter.residents import Adapters
from ktrt.config import SamplingArgs, SamplingOptions, override_sampling
from ktrt.errors import ConfigError, KtrtError, engine_errors
from ktrt.experts import GpuExperts
from ktrt.generate.answer import Answer
from ktrt.generate.loop import OnPrefill
from ktrt.generate.prompt_scores import PromptScores, check_scored
from ktrt.generate.prompts import check_biased, check_ids, check_prompt
from ktrt.generate.response import Response, TokenResponse
from ktrt.generate.runner import KvCache
from ktrt.generate.sampling import Constraint
from ktrt.generate.scheduler import (
    Begin,
    Driver,
    Handle,
    NewRequest,
    SchedulerLimits,
    SchedulerStats,
)
from ktrt.generate.warm_up import warm_up
from ktrt.loading.model import LoadedModel
from ktrt.loading.plan import BaseCheckpoint
from ktrt.loading.scheduler import make_scheduler, use_device
from ktrt.prompt.fit import check_characters, context_limit, count_characters, drop_turns
from ktrt.prompt.messages import check_messages, plain_messages, plain_tools
from ktrt.prompt.template.base import Message, Template

__all__ = ["Adapters", "Handle", "Response", "Session", "TokenResponse"]

# As callers give them; content is text or a list of OpenAI's text parts.
Messages = Sequence[Mapping[str, object]]
Tools = Sequence[Mapping[str, object]]
# A name, weights of a sum by name, None for the base; left out (...): the active adapters.
Adapter = str | Mapping[str, float] | EllipsisType | None


class Session:
    """A model, its tokenizer and its adapters, ready to answer.

    ``model`` is the transformers model with its routed experts replaced, and works as one:
    ``model(input_ids).logits``. ``template`` and ``sampling`` hold the configured values;
    ``context_limit`` bounds the tokens of a conversation with its answer; ``audit`` lists the first
    adapter's tensors.

    Answers of ``chat``, ``stream`` and ``stream_responses`` are computed in the thread that reads
    them: one thread at a time, another one that asks meanwhile gets a ``KtrtError``. Within a
    thread they may be streamed one after another or interleaved. ``submit`` starts a thread that
    owns the model; from then on any number of threads may ask at once, and what they ask for shares
    the model's steps. A conversation that continues an earlier one computes only its new tokens.

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
        limits: SchedulerLimits | None = None,
    ) -> None:
        """Takes ``loaded``, which ``close`` closes. ``cutoff_len`` lowers the context's limit;
        ``limits`` bound what runs at once."""
        self._loaded: LoadedModel | None = loaded
        self.model: Any = loaded.model
        self.adapters = loaded.adapters
        self.audit = loaded.audit
        self.tokenizer = tokenizer
        self.template = self._configured_template = template
        self.sampling = sampling
        self.context_limit = context_limit(loaded.model, cutoff_len)
        self._bound = "cutoff_len allows" if self.context_limit == cutoff_len else ""
        self._encoding = threading.Lock()
        # The most rows of a decode step.
        self._rows = (limits or SchedulerLimits()).rows
        self._steps = Driver(partial(make_scheduler, loaded, limits), partial(use_device, loaded))
        self.adapters.between = self._steps.between
        # Nobody can ask a session that nobody has: its thread and memory go.
        weakref.finalize(self, self._steps.abandon, _closed(), loaded.close).atexit = False
        self._stop_ids = template.stop_ids
        if template.name == "auto":
            self._stop_ids |= _model_stop_ids(loaded.model)

    def chat(
        self,
        messages: Messages,
        *,
        adapter: Adapter = ...,
        on_prefill: OnPrefill | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Response:
        """Returns the whole answer to ``messages``; see ``stream`` and ``stream_responses``."""
        found = self.stream_responses(messages, adapter=adapter, on_prefill=on_prefill, **sampling)
        return Response.whole(found)

    def stream(
        self, messages: Messages, *, adapter: Adapter = ..., **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """Yields the answer to ``messages`` in pieces of text, never half a character.

        ``messages``: an optional system message, then user and assistant in turn, a user's last.
        ``adapter``: a resident one, weights of a sum by name, or None for the base; left out, the
        adapters that are active now. ``sampling``: fields of ``SamplingArgs`` that replace the
        configured ones.

        ``ConfigError``, before the first piece: malformed messages, an unknown sampling argument, a
        conversation longer than the model's context. ``AdapterError``: an adapter that is not
        there. ``KtrtError``: the session is closed.
        """
        responses = self.stream_responses(messages, adapter=adapter, **sampling)
        return (response.text for response in responses if response.text)

    def stream_responses(
        self,
        messages: Messages,
        *,
        adapter: Adapter = ...,
        on_prefill: OnPrefill | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[TokenResponse]:
        """Like ``stream``, but yields every token, with counts, times and the finish reason.

        ``on_prefill(done, total)`` is called with the number of prompt tokens computed so far: 0
        first, then after every forward. Reused tokens are not counted. An exception that it raises
        (Ctrl-C, for example) ends the answer; the next one reuses what was computed.
        """
        begin = self._prepare(messages, adapter, sampling)
        return self._steps.stream(begin, on_prefill)

    def submit(
        self,
        messages: Messages | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        adapter: Adapter = ...,
        client: Hashable = None,
        tools: Tools | None = None,
        thinking: bool | None = None,
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
        on_change: Callable[[], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Handle:
        """Asks for an answer and returns at once: iterate over the handle for its tokens, or take
        its ``result``; ``cancel`` ends it.

        Starts the thread that owns the model, if there is none. Any thread may call this; requests
        share steps, fairly among clients and adapters. Raises what ``stream`` raises.

        ``prompt_ids``: the prompt itself, in place of ``messages``. ``tools``: functions that the
        model may call, as OpenAI's JSON; ``thinking``: the template's switch for this answer.
        ``constraint``: what the answer may say. ``prompt_logprobs``: the handle has the log
        probability of every token of the prompt and of that many likeliest ones, 20 at most;
        nothing held is reused then, and ``max_new_tokens`` may be 0. ``on_change``: see ``Handle``.
        """
        prompt = self._prompt(messages, prompt_ids, tools, thinking)
        begin = self._prepare_prompt(prompt, adapter, sampling, constraint, prompt_logprobs)
        self._steps.start()
        new = begin(client=client, on_change=on_change, wraps_errors=True, owner=self)
        return self._steps.submit(new)

    def render(
        self, messages: Messages, *, tools: Tools | None = None, thinking: bool | None = None
    ) -> list[int]:
        """Returns the prompt's token ids for ``messages``, as ``submit`` would answer it."""
        self._open()
        return self._prompt(messages, None, tools, thinking)

    def stats(self) -> SchedulerStats:
        """Returns what was computed so far and what is going on. Cheap, for any thread."""
        gpu, stats = self._open().gpu, self._steps.scheduler.stats()
        if gpu is None or gpu.following is None:
            return stats
        return replace(stats, residents=replace(gpu.following.numbers))

    def predicted_wait(self) -> float | None:
        """Predicts the seconds until one more request would get a slot; 0: at once; None: nothing
        is known yet. Cheap, for any thread."""
        self._open()
        return self._steps.scheduler.predicted_wait()

    @property
    def alive(self) -> bool:
        """Whether the session answers: it is not closed, and its thread has not failed."""
        return self._loaded is not None and self._steps.alive

    def batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Response]:
        """Returns the answers to several conversations, which share the model's steps.

        Each request has ``messages``, and may have ``adapter`` and fields of ``SamplingArgs``, with
        the meanings that ``stream`` gives them. The first one that fails ends all. ``ConfigError``
        and ``AdapterError``, before anything runs, name the request by its index.
        """
        begins = []
        for index, request in enumerate(requests):
            try:
                begins.append(self._prepare_one(request))
            except KtrtError as error:
                raise type(error)(f"request {index}: {error}") from error
        return self._steps.batch(begins)

    def _prepare_one(self, request: Mapping[str, Any]) -> Begin:
        if not isinstance(request, Mapping) or "messages" not in request:
            raise ConfigError(f"expected a mapping with messages, found {request!r:.80}")
        options = dict(request)
        return self._prepare(options.pop("messages"), options.pop("adapter", ...), options)

    def _prepare(
        self, messages: Messages, adapter: Adapter, sampling: Mapping[str, object]
    ) -> Begin:
        """Checks a request; calling the result makes it one of the scheduler."""
        self._open()
        return self._prepare_prompt(self._prompt(messages), adapter, sampling)

    def _prompt(
        self,
        messages: Messages | None,
        prompt_ids: Sequence[int] | None = None,
        tools: Tools | None = None,
        thinking: bool | None = None,
    ) -> list[int]:
        if (messages is None) == (prompt_ids is None):
            raise ConfigError("expected messages or prompt_ids, and not both")
        if prompt_ids is not None:
            if tools or thinking is not None:
                raise ConfigError("tools and thinking belong to messages: prompt_ids are a prompt")
            return check_ids(prompt_ids)
        template = self.template if thinking is None else self.template.with_thinking(thinking)
        checked, functions = check_messages(messages or ()), plain_tools(tools)
        check_characters(count_characters([checked, functions]), self.context_limit)
        with self._encoding:
            return template.encode(checked, functions)

    def _prepare_prompt(
        self,
        prompt_ids: list[int],
        adapter: Adapter,
        sampling: Mapping[str, object],
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> Begin:
        loaded = self._open()
        scored = check_scored(prompt_logprobs)
        options = dict(sampling)
        answered = not (scored and options.get("max_new_tokens") == 0)
        if not answered:
            del options["max_new_tokens"]
        args = override_sampling(self.sampling, options)
        check_biased(loaded.model, args.logit_bias)
        limit, bound = self._room(loaded)
        room = check_prompt(loaded.model, prompt_ids, limit, bound, answered=answered)
        choice = self.adapters.choose(adapter)
        template, stop_ids = self.template, self._stop_ids

        def begin(**options: Any) -> NewRequest:
            self._open()
            answer = Answer(
                self.tokenizer, prompt_ids, args, stop_ids=stop_ids, max_tokens=room,
                shown_tokens=template.shown_tokens, constraint=constraint,
            )  # fmt: skip
            scores = PromptScores(prompt_ids, prompt_logprobs or 0) if scored else None
            return NewRequest(
                prompt_ids=prompt_ids, answer=answer, choice=choice, scores=scores,
                most_tokens=answer.most_tokens if answered else 0,
                release=self.adapters.hold(choice), **options,
            )  # fmt: skip

        return begin

    def _room(self, loaded: LoadedModel) -> tuple[int, str]:
        """Returns the most tokens of a conversation, and what bounds them, for a message."""
        held = loaded.runner.pool.most_tokens(self.context_limit)
        if held < self.context_limit:
            return held, "the memory for keys and values holds"
        return self.context_limit, self._bound

    def new_cache(self) -> KvCache:
        """Returns an empty KV cache for the adapters that are active now, for callers of
        ``ktrt.generate.loop``."""
        return self._open().new_cache()

    def warm_up(self) -> None:
        """Prepares the first answer: kernels, memory, and the graph of a decode step. Takes about a
        second; ``ktrt.load`` has called it."""
        self._steps.between(self._warm_up)

    def _warm_up(self) -> None:
        with engine_errors():
            warm_up(self.new_cache(), self.context_limit, self._rows)
            self._steps.begin()  # counts the model's bytes

    def count_tokens(self, messages: Messages) -> int:
        """Returns the number of tokens of the prompt for ``messages``; 0 for none."""
        return self._count(plain_messages(messages))

    def _count(self, messages: Sequence[Message]) -> int:
        with self._encoding:
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

    def set_thinking(self, thinking: bool | None) -> None:
        """Switches the model's thinking on or off for the answers from now on; None: as configured.
        ``ConfigError``: the template has no such switch (``template.thinking`` is None)."""
        configured = self._configured_template
        self.template = configured if thinking is None else configured.with_thinking(thinking)

    @property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer, whatever a request adds: the template's, and the
        model's where the template is its own."""
        return self._stop_ids

    @property
    def base(self) -> BaseCheckpoint | None:
        """The checked folder of the base model; None for a model that came from elsewhere."""
        return self._open().base

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
        """Ends all answers, frees threads and memory; the session answers no more. Idempotent.
        Another thread's token is waited for."""
        # First, so that a thread with an answer under way reads why it ends.
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._steps.close(_closed(), loaded.close)

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
            raise _closed()
        return self._loaded


def _closed() -> KtrtError:
    return KtrtError("this session is closed; load the model again with ktrt.load")


def _model_stop_ids(model: Any) -> frozenset[int]:
    """Returns the eos_token_id of generation_config.json, which is a number or a list."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
