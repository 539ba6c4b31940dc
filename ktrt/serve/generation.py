"""From a request of any API to the engine and back: ``Asked`` goes in, tokens come out."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ktrt.generate.response import Response
from ktrt.serve.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
    from concurrent.futures import Future

    from ktrt.generate.response import TokenResponse
    from ktrt.session import Adapter, Handle, Session

# Seconds between two looks for a token, where the handle does not call.
_LOOK = 0.005


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of any API. Either ``messages`` or ``prompt_ids`` is given. ``constraint`` makes
    the constraint of one answer; ``n`` is the number of answers."""

    adapter: Adapter
    messages: Sequence[Mapping[str, object]] | None = None
    prompt_ids: Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool | None = None
    constraint: Callable[[], Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    prompt_logprobs: int | None = None
    n: int = 1
    client: Hashable = None


class Admission:
    """Counts the answers under way, so that no more wait than ``max_waiting``."""

    def __init__(self, session: Session, max_waiting: int) -> None:
        self._session, self.max_waiting = session, max_waiting
        self.live = 0

    def enter(self, count: int) -> None:
        """Takes ``count`` answers. ``ApiError`` 429: the queue is full."""
        if self.live + count > self.max_waiting:
            raise ApiError(
                429, f"the queue is full: {self.live} answers are under way or wait; try later",
                kind="rate_limit_error", code="queue_full", retry_after=1.0,
            )  # fmt: skip
        self.live += count

    def leave(self, count: int) -> None:
        """Gives ``count`` answers back."""
        self.live -= count


class Generation:
    """The answers to one request: an asynchronous context that ends what runs when it is left.

    ``async for choice, token in generation`` yields tokens as they come; ``whole`` waits for all.
    """

    def __init__(self, session: Session, admission: Admission, asked: Asked) -> None:
        self._session, self._admission, self._asked = session, admission, asked
        self._handles: list[Handle] = []
        self._changed = asyncio.Event()
        self._left = False

    async def __aenter__(self) -> Self:
        self._admission.enter(self._asked.n)
        try:
            await self._submit(0)
        except BaseException:
            self._admission.leave(self._asked.n)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left = True
        for handle in self._handles:
            handle.cancel()
        self._admission.leave(self._asked.n)

    @property
    def prompt_logprobs(self) -> Any:
        """The log probabilities of the prompt's tokens, after its prefill."""
        return getattr(self._handles[0], "prompt_logprobs", None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenResponse]]:
        """Yields (choice, token)."""
        while True:
            self._changed.clear()
            ended = all(handle.state.ended for handle in self._handles)
            for choice, handle in enumerate(list(self._handles)):
                while (token := self._take(handle)) is not None:
                    yield choice, token
                    if len(self._handles) < self._asked.n:
                        # The prompt's keys and values are there now; the others start from them.
                        for other in range(1, self._asked.n):
                            await self._submit(other)
                        ended = False
            if ended:
                return
            await self._wait()

    async def whole(self) -> list[Response]:
        """Returns the answers."""
        tokens: list[list[TokenResponse]] = [[] for _ in range(self._asked.n)]
        async for choice, token in self:
            tokens[choice].append(token)
        return [Response.whole(each) for each in tokens]

    def _take(self, handle: Handle) -> TokenResponse | None:
        try:
            return handle.take()
        except Exception as error:
            raise as_api_error(error) from error

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(None if _CALLS else _LOOK):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _submit(self, choice: int) -> None:
        """Submits an answer in a thread: rendering a template takes milliseconds."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(None, self._submitted, choice, loop)
        try:
            self._handles.append(await asyncio.shield(future))
        except asyncio.CancelledError:
            future.add_done_callback(_cancel)
            raise
        except ApiError:
            raise
        except Exception as error:
            raise as_api_error(error) from error

    def _submitted(self, choice: int, loop: asyncio.AbstractEventLoop) -> Handle:
        asked = self._asked
        options: dict[str, Any] = dict(asked.sampling)
        if choice and options.get("seed") is not None:
            options["seed"] += choice
        for name in ("prompt_ids", "tools", "thinking", "prompt_logprobs"):
            if getattr(asked, name) is not None:
                options[name] = getattr(asked, name)
        if asked.constraint is not None:
            options["constraint"] = asked.constraint()
        if _CALLS:
            options["on_change"] = lambda: loop.call_soon_threadsafe(self._changed.set)
        messages: Any = asked.messages
        return self._session.submit(messages, adapter=asked.adapter, client=asked.client, **options)


def _cancel(future: Future[Handle] | asyncio.Future[Handle]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()


def _calls() -> bool:
    from ktrt.session import Session

    return "on_change" in inspect.signature(Session.submit).parameters


_CALLS = _calls()
