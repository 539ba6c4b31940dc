"""A bounded queue: who may wait for a slot, and when the others should come back."""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import TYPE_CHECKING

from ktrt.config import SchedulerArgs
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ktrt.serve.settings import ServeSettings
    from ktrt.session import Session

# Without a setting: the default of max_num_seqs.
_CONCURRENT = SchedulerArgs.max_num_seqs
# Seconds for clients to wait: while no step was measured; and at most, since a client that waits
# for an hour because of one long queue is a client lost.
_UNKNOWN, _LONGEST = 1.0, 120.0


class Admission:
    """Counts the answers under way: as many as the scheduler runs at once and ``max_waiting`` more,
    of which one client may have ``most_of_client``. The scheduler is fair among clients, but only
    to requests that it has.

    All methods belong to the event loop's thread.
    """

    def __init__(self, session: Session, settings: ServeSettings) -> None:
        self._session = session
        self.most = (settings.max_concurrent or _CONCURRENT) + settings.max_waiting
        self.most_of_client = ceil(self.most * settings.max_client_share)
        self.live = 0
        self._of_client: Counter[Hashable] = Counter()

    def enter(self, count: int, client: Hashable = None) -> None:
        """Takes ``count`` answers. ``ApiError``: 429, the queue or the client's share of it is
        full; 400, it could never take that many."""
        most = self.most_of_client
        if count > most:
            raise ApiError(400, f"n: expected {most} or less, found {count}", param="n")
        own = self._of_client[client]
        if self.live + count > self.most:
            raise self._full(f"{self.live} answers run or wait")
        if own + count > most:
            raise self._full(f"{own} answers of this client run or wait, {most} may")
        self.live += count
        self._of_client[client] += count

    def leave(self, count: int, client: Hashable = None) -> None:
        """Gives ``count`` answers back."""
        self.live -= count
        self._of_client[client] -= count
        if not self._of_client[client]:
            del self._of_client[client]

    def _full(self, reason: str) -> ApiError:
        return ApiError(
            429, f"the queue is full: {reason}; try again later",
            kind="rate_limit_error", code="queue_full", retry_after=self._wait(),
        )  # fmt: skip

    def _wait(self) -> float:
        predicted = self._session.predicted_wait()
        return min(_LONGEST, _UNKNOWN if predicted is None else predicted)
