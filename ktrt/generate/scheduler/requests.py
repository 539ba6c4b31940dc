"""A request on its way through the scheduler, and the handle that its caller holds."""

from __future__ import annotations

import logging
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
    from ktrt.generate.response import PromptLogProbabilities, TokenResponse

logger = logging.getLogger(__name__)


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

    def without_tokens(self) -> Response:
        """Returns the answer that has none."""


class PromptScores(Protocol):
    """Log probabilities of a prompt: ``ktrt.generate.prompt_scores.PromptScores``."""

    def push(self, start: int, logits: Any) -> None:
        """Takes the logits [count, vocab_size] of the tokens from ``start`` on."""

    def whole(self) -> PromptLogProbabilities:
        """Returns an entry for each token of the prompt."""


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A prompt and how it is answered.

    At most ``most_tokens`` follow the prompt; 0: only with ``scores``, which every token of the
    prompt is scored for, so that nothing held is reused. ``client`` shares steps fairly with
    others; ``release`` is called at the end. ``streams``: somebody reads the tokens as they come,
    so that they keep the floor of tokens per second. ``progress``: the handle reports how much of
    the prompt was computed. ``on_change``: see ``Handle``. ``wraps_errors``: the handle raises
    errors that are no ``KtrtError`` as an ``EngineError``. ``owner`` is kept alive until the end.
    """

    prompt_ids: Sequence[int]
    answer: Answer
    choice: AdapterChoice
    most_tokens: int
    scores: PromptScores | None = None
    client: Hashable = None
    streams: bool = True
    progress: bool = False
    paused: bool = False
    wraps_errors: bool = False
    release: Callable[[], None] = lambda: None
    on_change: Callable[[], None] | None = None
    owner: object = None


# Makes a request that was checked before one of the scheduler, with some fields given.
Begin = Callable[..., NewRequest]


class Handle:
    """A request of a caller: iterate over its tokens, or take the ``result``. Any thread may use
    it, one at a time for its tokens.

    ``on_change`` of ``Session.submit`` is called after every step that brought a token, progress or
    a state, in the thread that steps: it only tells somebody to look, with ``take_all`` and
    ``state``, and waits for nothing.
    """

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        drive: Callable[[], bool] = lambda: False,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """``wake`` is called when the handle wants something of the scheduler. ``drive`` runs a
        step for a caller in whose thread the steps run, and returns whether it did."""
        self._wake, self._drive, self._on_change = wake, drive, on_change
        self._changed = threading.Condition()
        self._tokens: list[TokenResponse] = []
        self._read = 0
        self._progress: list[tuple[int, int]] = []
        self._prompt_logprobs: PromptLogProbabilities | None = None
        self._whole: Response | None = None
        self._error: BaseException | None = None
        self._state = State.WAITING
        self.wants_cancel = False
        self.paused = False

    @property
    def state(self) -> State:
        """Where the request is."""
        return self._state

    @property
    def prompt_logprobs(self) -> PromptLogProbabilities | None:
        """For each token of the prompt its log probability and the likeliest tokens' as (id, log
        probability), best first; None for the first token. None altogether until the prompt was
        computed, and where nobody asked."""
        return self._prompt_logprobs

    def cancel(self) -> None:
        """Ends the request with the next step, which frees its slot; what was computed stays
        reusable. Without effect after the end."""
        self.wants_cancel = True
        self._wake()

    def pause(self) -> None:
        """Leaves the request out of steps until ``resume``. It keeps its slot with all that was
        computed, without a bound on time: others may lack the slot, so that whoever pauses requests
        for strangers cancels them after a while."""
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
        if wait:
            self._wait(lambda: self._read < len(self._tokens) or self._state.ended)
        with self._changed:
            if self._read < len(self._tokens):
                self._read += 1
                return self._tokens[self._read - 1]
            if self._error is not None:
                raise self._error
            return None

    def take_all(self) -> list[TokenResponse]:
        """Returns the tokens that are there and were not taken. A failed request raises its error
        where there are none."""
        with self._changed:
            found = self._tokens[self._read :]
            self._read = len(self._tokens)
            if not found and self._error is not None:
                raise self._error
            return found

    def _wait(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        """Waits until ``ready``; returns whether it came within ``seconds``. A caller whose thread
        runs the model steps it meanwhile."""
        end = None if seconds is None else time.monotonic() + seconds
        while not ready() and (end is None or time.monotonic() < end):
            if not self._drive():
                left = None if end is None else end - time.monotonic()
                with self._changed:
                    return self._changed.wait_for(ready, left)
        return ready()

    def take_progress(self) -> list[tuple[int, int]]:
        """Returns (done, total) of the prompt's new tokens, as often as they changed since the last
        call."""
        if not self._progress:
            return []
        found, self._progress = self._progress, []
        return found

    def wait_for_event(self) -> None:
        """Waits for a token, for progress or for the end."""
        self._wait(
            lambda: bool(self._progress) or self._read < len(self._tokens) or self._state.ended
        )

    def result(self, timeout: float | None = None) -> Response:
        """Waits for the whole answer, tokens that were iterated over included. ``KtrtError``: it
        was cancelled, or is not there after ``timeout`` seconds; a failed request raises its
        error."""
        if not self._wait(lambda: self._state.ended, timeout):
            raise KtrtError(f"the answer is not complete after {timeout:g} s")
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._state is State.CANCELLED:
                raise KtrtError("the request was cancelled before its answer was complete")
            return self._whole or Response.whole(self._tokens)

    def put(self, token: TokenResponse) -> None:
        """Appends a token, of the thread that steps."""
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()
        self._tell()

    def put_scores(self, found: PromptLogProbabilities, whole: Response | None) -> None:
        """Notes the prompt's log probabilities; ``whole``: the answer that has no tokens."""
        self._prompt_logprobs, self._whole = found, whole

    def report(self, done: int, total: int) -> None:
        """Notes progress with the prompt."""
        with self._changed:
            self._progress.append((done, total))
            self._changed.notify_all()
        self._tell()

    def enter(self, state: State, error: BaseException | None = None) -> None:
        """Notes the state; ``error`` belongs to ``FAILED``."""
        with self._changed:
            self._state, self._error = state, error
            if state.ended:
                self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        if self._on_change is not None:
            call_quietly(self._on_change)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def call_quietly(change: Callable[[], None]) -> None:
    """Calls an ``on_change``; logs its exceptions."""
    try:
        change()
    except Exception as error:  # noqa: BLE001 - the caller's; an event loop that is closed, say
        logger.debug("on_change of a request failed: %s", error)


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
        # Whether the tokens of its prompt are being scored.
        self.scores_prompt = new.scores is not None

    @property
    def paused(self) -> bool:
        """Whether steps pass it over."""
        return self.handle.paused

    @property
    def generated(self) -> int:
        """The tokens chosen so far."""
        return len(self.ids) - len(self.new.prompt_ids)

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
