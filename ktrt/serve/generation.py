"""From a request of any API to the engine and back: ``Asked`` goes in, tokens come out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from ktrt.generate.scheduler import State
from ktrt.serve.context import current
from ktrt.serve.errors import ApiError, as_api_error
from ktrt.serve.wakes import Wakes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Sequence
    from concurrent.futures import Executor

    from ktrt.generate.response import PromptLogProbabilities, Response, TokenResponse
    from ktrt.generate.sampling import Constraint
    from ktrt.serve.admission import Admission
    from ktrt.serve.metrics import Metrics, Observer
    from ktrt.session import Adapter, Handle, Session

# Seeds are below it.
SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of any API.

    Either ``messages`` or ``prompt_ids`` is given; ``sampling`` holds fields of ``SamplingArgs``.
    ``constraint`` makes the constraint of one answer; ``n`` is the number of answers. Answers share
    the engine fairly among ``client``s; None: the address that the request came from.
    """

    adapter: Adapter
    messages: Sequence[Mapping[str, object]] | None = None
    prompt_ids: Sequence[int] | None = None
    tools: Sequence[Mapping[str, object]] | None = None
    thinking: bool | None = None
    constraint: Callable[[], Constraint] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    prompt_logprobs: int | None = None
    n: int = 1
    client: Hashable = None


class Engine(Protocol):
    """``Server``, as far as answers need it."""

    session: Session
    metrics: Metrics
    admission: Admission
    threads: Executor

    def wakes(self) -> Wakes: ...
    def check_ready(self) -> None: ...


@dataclass
class _Choice:
    """One of the answers."""

    handle: Handle
    observer: Observer


class Generation:
    """The answers to one request: an asynchronous context that ends what runs when it is left.

    ``async for choice, token in generation`` yields tokens as they come; ``whole`` waits for all.
    Both raise ``ApiError``: the queue is full, the request is wrong, or the engine failed.
    """

    def __init__(self, server: Engine, asked: Asked) -> None:
        self._server, self._asked = server, asked
        self._choices: list[_Choice] = []
        self._changed = asyncio.Event()
        self._facts = current.get()
        self._client = asked.client
        if self._client is None and self._facts is not None:
            self._client = self._facts.client

    async def __aenter__(self) -> Self:
        self._check()
        self._server.admission.enter(self._asked.n, self._client)
        try:
            await self._submit(0)
        except BaseException:
            self._server.admission.leave(self._asked.n, self._client)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in self._choices:
            each.handle.cancel()
            each.observer.left()
        self._server.admission.leave(self._asked.n, self._client)

    @property
    def prompt_logprobs(self) -> PromptLogProbabilities | None:
        """The log probabilities of the prompt's tokens, once they were computed."""
        return self._choices[0].handle.prompt_logprobs

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenResponse]]:
        """Yields (choice, token) in the order in which the tokens come."""
        while True:
            self._changed.clear()
            # Looked at before the tokens: the last one comes before the end.
            ended = all(each.handle.state.ended for each in self._choices)
            for number, choice in enumerate(list(self._choices)):
                # Once more at the end, which may be an error.
                while tokens := _taken(choice):
                    for token in tokens:
                        if len(self._choices) < self._asked.n:
                            await self._fork()
                            ended = False
                        self._note(choice, token)
                        yield number, token
                    if not ended:
                        break
            if ended:
                return
            await self._changed.wait()

    async def whole(self) -> list[Response]:
        """Returns the answers."""
        async for _ in self:
            pass
        return [each.handle.result(0) for each in self._choices]

    def _check(self) -> None:
        self._server.check_ready()
        if self._asked.n < 1:
            raise ApiError(400, f"n: expected 1 or more, found {self._asked.n}", param="n")

    async def _fork(self) -> None:
        """Submits the other answers. The first one's slot holds the prompt's keys and values now,
        from which they start."""
        for number in range(1, self._asked.n):
            await self._submit(number)

    async def _submit(self, number: int) -> None:
        """Submits an answer in another thread: rendering a long prompt takes a while."""
        loop, wakes = asyncio.get_running_loop(), self._server.wakes()
        adapter = self._asked.adapter
        summands = tuple(adapter) if isinstance(adapter, Mapping) else ()
        observer = self._server.metrics.observe(_shown(adapter), summands)
        future = loop.run_in_executor(self._server.threads, self._submitted, number, wakes)
        try:
            handle = await asyncio.shield(future)
        except BaseException as error:
            observer.left()
            if isinstance(error, asyncio.CancelledError):
                future.add_done_callback(_cancel)
            if not isinstance(error, Exception):
                raise
            raise as_api_error(error) from error
        self._choices.append(_Choice(handle, observer))
        self._notice()  # it may have a slot since before it was in the list

    def _submitted(self, number: int, wakes: Wakes) -> Handle:
        asked = self._asked
        sampling = dict(asked.sampling)
        if number and sampling.get("seed") is not None:
            # As in vLLM: answers of one request differ, and come again with the request.
            sampling["seed"] = (sampling["seed"] + number) % SEEDS
        return self._server.session.submit(
            asked.messages,
            prompt_ids=asked.prompt_ids,
            adapter=asked.adapter,
            client=self._client,
            tools=asked.tools,
            thinking=asked.thinking,
            constraint=asked.constraint() if asked.constraint else None,
            prompt_logprobs=asked.prompt_logprobs,
            on_change=lambda: wakes.post(self._notice),
            **sampling,
        )

    def _notice(self) -> None:
        for each in self._choices:
            if not each.observer.has_slot and each.handle.state is not State.WAITING:
                each.observer.started()
        self._changed.set()

    def _note(self, choice: _Choice, token: TokenResponse) -> None:
        choice.observer.token()
        if token.finish_reason is None:
            return
        choice.observer.finished(token.finish_reason)
        if self._facts is not None:
            more = self._facts.more
            more["adapter"] = _shown(self._asked.adapter)
            more["prompt_tokens"] = token.prompt_tokens
            more["reused_tokens"] = token.reused_tokens
            more["generated_tokens"] = more.get("generated_tokens", 0) + token.generated_tokens


def _taken(choice: _Choice) -> list[TokenResponse]:
    try:
        return choice.handle.take_all()
    except Exception as error:
        raise as_api_error(error) from error


def _cancel(future: asyncio.Future[Handle]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()


def _shown(adapter: Adapter) -> str:
    """Returns an adapter's name, or a sum's terms; "" for the base."""
    if isinstance(adapter, str):
        return adapter
    if not adapter or adapter is ...:
        return ""
    return "+".join(f"{name}*{weight:g}" for name, weight in adapter.items())
