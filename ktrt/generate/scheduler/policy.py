"""The scheduler's decisions, without model and clock: whose turn it is, who comes next, and how
much of the prompts a step computes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ktrt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

# Chunks of a prompt end at multiples of this, wherever they start: so no result depends on what was
# reused or on what shared the steps.
BORDER = 128
# Payers without requests whose tokens are remembered.
_REMEMBERED = 1000


@dataclass(frozen=True)
class SchedulerLimits:
    """``rows``: the most requests that run at once with the same turn. ``min_tokens_per_second``:
    what every stream keeps at least, by predictions; 0: no bound. Requests that cannot share steps
    take turns of at most ``turn_steps`` steps or ``turn_seconds`` where others wait.
    ``prompt_seconds``: a prompt gets a chunk after that time even where the floor has no room.
    ``reproducible``: an answer has the same bits in any company and after any others."""

    rows: int = 32
    min_tokens_per_second: float = 1.0
    turn_steps: int = 32
    turn_seconds: float = 2.0
    prompt_seconds: float = 2.0
    reproducible: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("turn_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, found {getattr(self, name)}")
        for name in ("min_tokens_per_second", "turn_seconds", "prompt_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}")

    @property
    def step_seconds(self) -> float:
        """How long a step may take for streams to keep the floor."""
        floor = self.min_tokens_per_second
        return 1 / floor if floor else float("inf")


class _Waits(Protocol):
    """A request, as far as queues look at it. ``group``: whose turn it needs; ``payer``: whom its
    tokens are counted for; ``paused``: it is passed over."""

    @property
    def group(self) -> Hashable: ...

    @property
    def payer(self) -> Hashable: ...

    @property
    def paused(self) -> bool: ...


R = TypeVar("R", bound=_Waits)


class FairQueue(Generic[R]):
    """Requests that wait: first come, first served for each payer, and the payer that got the
    fewest tokens first.

    A payer who comes back counts from the least served of the others on, so that nobody saves up
    tokens by being away.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[Hashable, Hashable], deque[R]] = {}
        self._served: dict[Hashable, float] = {}
        self._at_work: dict[Hashable, int] = {}
        # A number by itself, which other threads may read.
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[R]:
        for queue in self._queues.values():
            yield from queue

    def add(self, request: R) -> None:
        """Appends a request, which counts for its payer until ``leave``."""
        payer = request.payer
        if payer not in self._at_work:
            least = min((self._served[each] for each in self._at_work), default=0.0)
            self._served[payer] = max(self._served.get(payer, 0.0), least)
            if not self._at_work:  # nobody to be fair to
                self._served = {payer: 0.0}
        self._at_work[payer] = self._at_work.get(payer, 0) + 1
        self._count += 1
        self._queues.setdefault((request.group, payer), deque()).append(request)

    def first(self, group: Hashable) -> R | None:
        """Returns the next request of a group; None: none waits."""
        heads = [
            next((each for each in queue if not each.paused), None)
            for (of, _), queue in self._queues.items()
            if of == group
        ]
        waiting = [each for each in heads if each is not None]
        return min(waiting, key=self.served, default=None)

    def groups(self) -> list[Hashable]:
        """Returns the groups that have waiting requests."""
        return [
            group for (group, _), queue in self._queues.items() if any(not r.paused for r in queue)
        ]

    def take(self, request: R) -> None:
        """Removes a waiting request, which still counts for its payer."""
        key = request.group, request.payer
        self._queues[key].remove(request)
        self._count -= 1
        if not self._queues[key]:
            del self._queues[key]

    def leave(self, request: R) -> None:
        """Ends a request that was taken."""
        self._at_work[request.payer] -= 1
        if not self._at_work[request.payer]:
            del self._at_work[request.payer]
            if len(self._served) > _REMEMBERED:
                self._served = {each: self._served[each] for each in self._at_work}

    def charge(self, request: R, tokens: int) -> None:
        """Counts computed tokens for the request's payer."""
        self._served[request.payer] = self._served.get(request.payer, 0.0) + tokens

    def served(self, request: R) -> float:
        """Returns the tokens counted for the request's payer."""
        return self._served.get(request.payer, 0.0)


class Turns:
    """Whose turn it is among groups that cannot share a step.

    A turn ends when its group has nothing to do, or after ``steps`` steps or ``seconds`` while
    another one waits. The next turn is the group's that waits for longest.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self._most_steps, self._most_seconds = steps, seconds
        self._current: Hashable = None
        self._steps = 0
        self._since = 0.0
        # The groups that wait, in the order in which they began to.
        self._waiting: dict[Hashable, None] = {}
        self._contested = False

    def order(self, groups: Iterable[Hashable], now: float) -> list[Hashable]:
        """Returns the groups that have work in the order in which a step should try them."""
        here = dict.fromkeys(groups)
        self._waiting = {each: None for each in self._waiting if each in here}
        for each in here:
            if each != self._current:
                self._waiting.setdefault(each)
        if not self._waiting or not self._contested:
            # The bound is on waiting: a turn counts from where somebody waits.
            self._steps, self._since = 0, now
        self._contested = bool(self._waiting)
        others = list(self._waiting)
        if self._current not in here:
            return others
        over = self._steps >= self._most_steps or now - self._since >= self._most_seconds
        return [*others, self._current] if over and others else [self._current, *others]

    def stepped(self, group: Hashable, now: float) -> None:
        """Notes that a step of ``group`` begins."""
        if group != self._current:
            self._waiting.pop(group, None)
            self._current, self._steps, self._since = group, 0, now
        self._steps += 1


class Pace:
    """How long a step may take so that streams keep their floor on average: faster steps save up
    for slower ones, at most one step's time."""

    def __init__(self, step_seconds: float) -> None:
        self._budget = step_seconds
        self._saved = 0.0

    def allowance(self, *, streams: bool) -> float:
        """Returns the seconds that the next step may take; without ``streams`` any time."""
        return self._budget + self._saved if streams else float("inf")

    def stepped(self, seconds: float, *, streams: bool) -> None:
        """Notes how long a step took."""
        if not streams or self._budget == float("inf"):
            self._saved = 0.0
            return
        saved = self._saved + self._budget - seconds
        self._saved = max(-self._budget, min(self._budget, saved))


class _Prompt(Protocol):
    """A request whose prompt is computed: ``held`` tokens are, ``left`` are missing."""

    @property
    def held(self) -> int: ...

    @property
    def left(self) -> int: ...


P = TypeVar("P", bound=_Prompt)


def share_prompts(
    prompts: Sequence[P],
    most: int,
    seconds: Callable[[int, int], float],
    allowance: float,
    *,
    must: bool,
    whole: bool = False,
    alike: bool = False,
) -> list[tuple[P, int]]:
    """Chooses how many tokens of which ``prompts`` a step computes, in their order: as many as are
    predicted to fit ``allowance``, and ``most`` at most.

    ``seconds(tokens, prompts)`` predicts the step with that much of prompts. ``must``: the first
    one gets a chunk whatever it costs, and a larger one where that costs little more. ``whole``:
    prompts are not divided; ``alike``: all into chunks of ``most``.
    """
    chosen: list[tuple[P, int]] = []
    total = 0
    for prompt in prompts:
        if whole or alike:
            counts = [prompt.left if whole else min(prompt.left, most)]
            if chosen and counts[0] > most - total:
                break
        else:
            counts = _counts(prompt.held, prompt.left, most - total)
        if not counts and not chosen:
            counts = [most]  # smaller than the way to the next border
        if must and not chosen and counts:
            allowance = max(allowance, 1.25 * seconds(counts[-1], 1))
        count = next((n for n in counts if seconds(total + n, len(chosen) + 1) <= allowance), None)
        if count is None:
            break
        chosen.append((prompt, count))
        total += count
    return chosen


def _counts(held: int, left: int, most: int) -> list[int]:
    """Returns the lengths that a chunk after ``held`` tokens can have, the longest first: up to
    multiples of ``BORDER``, or all that is left. Never 1, a row by the order of sums of an answer's
    tokens: its bits are others."""
    last = (held + min(left, most)) // BORDER * BORDER
    counts = [end - held for end in range(last, held + 1, -BORDER)]
    if left <= most and left not in counts:
        counts.insert(0, left)
    return counts
