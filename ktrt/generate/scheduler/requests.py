"""A request on its way through the scheduler, and the handle that its caller holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, Self

from ktrt.errors import KtrtError
from ktrt.generate.response import Response

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from ktrt.engine.active_set import AdapterChoice
    from ktrt.generate.response import TokenResponse


class State(Enum):
    """A request's way: ``WAITING`` for a slot, then its prompt, then token by token to one of three
    ends."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self in _ENDS


_ENDS = frozenset((State.FINISHED, State.CANCELLED, State.FAILED))


class Answer(Protocol):
    """An answer that grows token by token: ``ktrt.generate.answer.Answer``."""

    def begin(self, reused: int) -> None:
        """Notes how many tokens of the prompt were held already."""

    def push(self, token: int, logits: Any) -> TokenResponse:
        """Appends a token that was chosen from ``logits`` [vocab_size]."""


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A prompt and how it is answered. At most ``most_tokens`` follow it. ``client`` shares steps
    fairly with others; ``release`` is called at the end. ``streams``: somebody reads the tokens as
    they come, so that they keep the floor of tokens per second. ``progress``: the handle reports
    how much of the prompt was computed."""

    prompt_ids: Sequence[int]
    answer: Answer
    choice: AdapterChoice
    most_tokens: int
    client: Hashable = None
    streams: bool = True
    progress: bool = False
    paused: bool = False
    release: Callable[[], None] = lambda: None


# Makes a request that was checked before one of the scheduler, with some fields given.
Begin = Callable[..., NewRequest]


class Handle:
    """A request of a caller: iterate over its tokens, or take the ``result``. Any thread may use
    it, one at a time for its tokens."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        """``wake`` is called when the handle wants something of the scheduler."""
        self._wake = wake
        self._changed = threading.Condition()
        self._tokens: list[TokenResponse] = []
        self._read = 0
        self._progress: list[tuple[int, int]] = []
        self._error: BaseException | None = None
        self._state = State.WAITING
        self.wants_cancel = False
        self.paused = False

    @property
    def state(self) -> State:
        """Where the request is."""
        return self._state

    def cancel(self) -> None:
        """Ends the request with the next step; what was computed stays reusable. Without effect
        after the end."""
        self.wants_cancel = True
        self._wake()

    def pause(self) -> None:
        """Leaves the request out of steps until ``resume``. It keeps its slot with all that was
        computed."""
        self.paused = True

    def resume(self) -> None:
        """Ends a pause."""
        self.paused = False
        self._wake()

    def __iter__(self) -> Iterator[TokenResponse]:
        return self

    def __next__(self) -> TokenResponse:
        """Waits for the next token. The iteration ends with the answer or its cancellation; a
        failed request raises its error."""
        found = self.take(wait=True)
        if found is None:
            raise StopIteration
        return found

    def take(self, *, wait: bool = False) -> TokenResponse | None:
        """Returns the next token, or None: there is none yet, or (the state tells) none comes."""
        with self._changed:
            while wait and self._read == len(self._tokens) and not self._state.ended:
                self._changed.wait()
            if self._read < len(self._tokens):
                self._read += 1
                return self._tokens[self._read - 1]
            if self._error is not None:
                raise self._error
            return None

    def take_progress(self) -> list[tuple[int, int]]:
        """Returns (done, total) of the prompt's new tokens, as often as they changed since the last
        call."""
        if not self._progress:
            return []
        found, self._progress = self._progress, []
        return found

    def wait_for_event(self) -> None:
        """Waits for a token, for progress or for the end."""
        with self._changed:
            while not (self._progress or self._read < len(self._tokens) or self._state.ended):
                self._changed.wait()

    def result(self, timeout: float | None = None) -> Response:
        """Waits for the whole answer, tokens that were iterated over included. ``KtrtError``: it
        was cancelled, or is not there after ``timeout`` seconds; a failed request raises its
        error."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._state.ended:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise KtrtError(f"the answer is not complete after {timeout:g} s")
                self._changed.wait(left)
            if self._error is not None:
                raise self._error
            if self._state is State.CANCELLED:
                raise KtrtError("the request was cancelled before its answer was complete")
            return Response.whole(self._tokens)

    def put(self, token: TokenResponse) -> None:
        """Appends a token, of the thread that steps."""
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()

    def report(self, done: int, total: int) -> None:
        """Notes progress with the prompt."""
        with self._changed:
            self._progress.append((done, total))
            self._changed.notify_all()

    def enter(self, state: State, error: BaseException | None = None) -> None:
        """Notes the state; ``error`` belongs to ``FAILED``."""
        with self._changed:
            self._state, self._error = state, error
            if state.ended:
                self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Request:
    """A request inside the scheduler."""

    def __init__(self, new: NewRequest, handle: Handle, group: Hashable) -> None:
        self.new, self.handle, self.group = new, handle, group
        self.payer = new.client, new.choice.key
        # The prompt and the tokens chosen so far; a slot holds a prefix of them.
        self.ids = list(new.prompt_ids)
        self.slot: Any = None
        self.reused = 0
        # When its prompt last got something to compute.
        self.served = 0.0

    @property
    def paused(self) -> bool:
        """Whether steps pass it over."""
        return self.handle.paused

    @property
    def total(self) -> int:
        """The tokens that it may come to hold."""
        return len(self.new.prompt_ids) + self.new.most_tokens

    @property
    def held(self) -> int:
        """The tokens that its slot holds."""
        length: int = self.slot.length
        return length

    @property
    def left(self) -> int:
        """The tokens that the next logits need: 1 is a decode row."""
        return len(self.ids) - self.held
