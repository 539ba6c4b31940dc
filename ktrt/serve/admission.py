"""A bounded queue: who may wait for a slot, and when the others should come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.config import SchedulerArgs
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from ktrt.serve.settings import ServeSettings
    from ktrt.session import Session

# Without a setting: the default of max_num_seqs.
_CONCURRENT = SchedulerArgs.max_num_seqs
# Seconds for clients to wait: while no step was measured; and at most, since a client that waits
# for an hour because of one long queue is a client lost.
_UNKNOWN, _LONGEST = 1.0, 120.0


class Admission:
    """Counts the answers under way: as many as the scheduler runs at once and ``max_waiting`` more.

    All methods belong to the event loop's thread.
    """

    def __init__(self, session: Session, settings: ServeSettings) -> None:
        self._session = session
        self.most = (settings.max_concurrent or _CONCURRENT) + settings.max_waiting
        self.live = 0

    def enter(self, count: int) -> None:
        """Takes ``count`` answers. ``ApiError``: 429, the queue is full; 400, it could never take
        that many."""
        if count > self.most:
            raise ApiError(400, f"n: expected {self.most} or less, found {count}", param="n")
        if self.live + count > self.most:
            raise ApiError(
                429, f"the queue is full: {self.live} answers run or wait; try again later",
                kind="rate_limit_error", code="queue_full", retry_after=self._wait(),
            )  # fmt: skip
        self.live += count

    def leave(self, count: int) -> None:
        """Gives ``count`` answers back."""
        self.live -= count

    def _wait(self) -> float:
        predicted = self._session.predicted_wait()
        return min(_LONGEST, _UNKNOWN if predicted is None else predicted)
