"""Numbers of a scheduler for metrics: counted by the thread that steps, read by any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.experts.gpu.following import ResidentCounts

# Weight of the newest step, or answer, in an average of the latest.
_NEWEST = 0.1
# An answer that is longer than the average so far is taken to have this share of it left.
_LONGER = 0.25


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """A moment of a scheduler; fields with "since" count from the start.

    Requests: ``running`` have a slot, ``paused`` of them wait for their caller, ``waiting`` have
    none; ``finished``, ``cancelled`` and ``failed`` since. ``prefix_query_tokens``: of prompts
    since that looked for a prefix, of which ``prefix_hit_tokens`` were held already.
    ``prompt_tokens`` (of completed prompts, held ones included) and ``generated_tokens`` since.

    ``kv_tokens`` and ``kv_bytes`` belong to running requests, ``kv_bytes`` with what they may grow
    to; ``kv_idle_bytes`` hold prefixes and are given up when needed; ``kv_budget_bytes`` bounds
    both (None: nothing does). These four are at most a fifth of a second old.

    Steps: ``steps``, ``failed_steps``, ``step_seconds`` and ``bytes_read`` (of weights, keys and
    values, computed) since; ``last_…`` and ``predicted_step_seconds`` are the latest step's.
    ``distinct_experts``: experts that the latest step read in a layer on average; None: not
    counted. ``read_bandwidth``: bytes per second, median of the latest steps; None: none was
    measured. ``residents``: of experts on a GPU that follow the routing, since; None without some.
    """

    running: int = 0
    paused: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0
    kv_idle_bytes: int = 0
    kv_budget_bytes: int | None = None
    steps: int = 0
    failed_steps: int = 0
    step_seconds: float = 0.0
    bytes_read: float = 0.0
    last_step_seconds: float | None = None
    predicted_step_seconds: float | None = None
    last_step_bytes: float | None = None
    last_step_tokens: int = 0
    distinct_experts: float | None = None
    read_bandwidth: float | None = None
    residents: ResidentCounts | None = None


class Counters:
    """Numbers that one thread writes, each field by itself. Named as in
    ``SchedulerStats``."""

    def __init__(self) -> None:
        self.finished = self.cancelled = self.failed = 0
        self.prefix_query_tokens = self.prefix_hit_tokens = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.kv_tokens = self.kv_bytes = self.kv_idle_bytes = 0
        self.steps = self.failed_steps = 0
        self.step_seconds = self.bytes_read = 0.0
        self.last_step_seconds: float | None = None
        self.predicted_step_seconds: float | None = None
        self.last_step_bytes: float | None = None
        self.last_step_tokens = 0
        self.distinct_experts: float | None = None
        self.read_bandwidth: float | None = None
        # Averages of the latest steps' seconds and of the latest answers' tokens.
        self._pace: float | None = None
        self._length: float | None = None

    def stats(self, **others: Any) -> SchedulerStats:
        """Returns the numbers as they are, with ``others``."""
        own = {name: each for name, each in vars(self).items() if not name.startswith("_")}
        return SchedulerStats(**own, **others)

    def stepped(self, seconds: float, read: float, tokens: int) -> None:
        """Counts a step."""
        self.steps += 1
        self.step_seconds += seconds
        self.bytes_read += read
        self.last_step_seconds, self.last_step_bytes = seconds, read
        self.last_step_tokens = tokens
        self._pace = _average(self._pace, seconds)

    def ended(self, tokens: int) -> None:
        """Counts an answer that came to its end."""
        self.finished += 1
        self._length = _average(self._length, tokens)

    def wait(self, running: Sequence[tuple[int, int]], rows: int, ahead: int) -> float | None:
        """Predicts the seconds until a request that follows ``ahead`` others has one of ``rows``
        places. ``running``: of each request the tokens so far, and the most that may still come.
        None: no step was measured."""
        place = ahead - max(0, rows - len(running))
        if place < 0:
            return 0.0
        if self._pace is None:
            return None
        left = sorted(self._left(*each) for each in running) or [self._length or 1.0]
        rounds, index = divmod(place, len(left))
        return self._pace * (left[index] + rounds * max(left[-1], self._length or 0.0))

    def _left(self, generated: int, most: int) -> float:
        if self._length is None:
            return most
        return min(most, max(self._length - generated, _LONGER * self._length, 1.0))


def _average(before: float | None, new: float) -> float:
    return new if before is None else before + _NEWEST * (new - before)
