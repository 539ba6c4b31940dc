"""The slots of a model's KV cache: who holds which tokens, and what a new prompt can reuse.

A slot holds the keys and values of one sequence under a *key*, a hashable that says which numbers
they were computed with (adapters by contents and weights). A closed slot keeps them until its place
or its memory is needed; the slot that was not used for longest goes first.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from itertools import count
from typing import TYPE_CHECKING, Literal

import numpy as np

from ktrt.errors import KtrtError
from ktrt.kv.slot import Slot

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ktrt.kv.stores import Store

__all__ = ["MOST_SLOTS", "KvPool", "Slot"]

logger = logging.getLogger(__name__)

# The most slots of a pool, unless the caller says.
MOST_SLOTS = 64
# Which held tokens a prompt reuses: all that it begins with, only those that chunks of a prompt
# computed, or none.
Reuse = Literal["all", "prompts", "none"]
# An idle slot is taken over, and what differs from the prompt is lost, where at least this share of
# its tokens is reused; where less is, the beginning of a long sequence, it is copied.
_TAKEN_SHARE = 0.5


class KvPool:
    """Slots of different lengths, and a bound on their memory."""

    def __init__(self, store: Store, *, continues: bool = True, budget: int | None = None) -> None:
        """``continues``: several tokens can follow held ones; if not, nothing is reused.
        ``budget``: bytes; None: no bound."""
        self.store, self.continues, self.budget_bytes = store, continues, budget
        self.reuse_of: Reuse = "all" if continues else "none"
        self.slots: list[Slot] = []
        self._clock = count(1)

    @property
    def slots_in_use(self) -> int:
        """How many slots are open."""
        return sum(slot.in_use for slot in self.slots)

    @property
    def most_slots(self) -> int:
        """How many slots can be open at once."""
        return self.store.slots

    @property
    def committed_bytes(self) -> int:
        """The memory that all slots take, the closed ones' too."""
        return sum(self.store.written_bytes(slot) for slot in self.slots)

    def usage(self) -> tuple[int, int]:
        """Returns the memory of the open slots, with what they were promised, and of the closed
        ones."""
        used = sum(self._bytes(slot) for slot in self.slots if slot.in_use)
        idle = sum(self._bytes(slot) for slot in self.slots if not slot.in_use)
        return used, idle

    def bytes_of(self, tokens: int) -> int:
        """Returns the memory of a slot of ``tokens``; 0 before the first forward."""
        return self.store.bytes_of(tokens)

    def most_tokens(self, limit: int) -> int:
        """Returns how many tokens, up to ``limit``, a slot can hold within the budget: all where
        that is not known beforehand."""
        budget = self.budget_bytes
        if budget is None or not self.store.knows_sizes or self.bytes_of(limit) <= budget:
            return limit
        return bisect_right(range(limit + 1), budget, key=self.bytes_of) - 1

    def open(self, key: Hashable, prompt_ids: Sequence[int]) -> Slot:
        """Returns a slot that holds the longest prefix of the prompt that any slot of the same key
        holds and ``reuse_of`` allows, without the prompt's last token, whose logits are needed.

        Takes an idle slot over, or copies the prefix from one that is in use, or that holds much
        more. ``KtrtError``: all slots are in use.
        """
        start = time.perf_counter()
        ids = np.asarray(prompt_ids[:-1], np.int64)
        best, shared = self._longest(key, ids)
        if best is not None and not best.in_use and self._is_taken(best, shared):
            slot = best
            self._keep(slot, shared)
        else:
            slot = self._empty(best)
            if best is not None and best is not slot:
                self._copy(best, slot, shared)
        slot.key = key
        self.touch(slot)
        self.mark(slot)
        # Last: nobody would close a slot that nobody got.
        slot.in_use = True
        logger.debug(
            "Slot %d holds %d of %d tokens, after %.1f ms", slot.index, slot.length,
            len(prompt_ids), 1e3 * (time.perf_counter() - start),
        )  # fmt: skip
        return slot

    def reuse(self, slot: Slot, prompt_ids: Sequence[int]) -> int:
        """Keeps the longest usable prefix of the prompt in an open slot; returns its length. It
        never includes the prompt's last token."""
        self._keep(slot, self._reusable(slot, np.asarray(prompt_ids[:-1], np.int64)))
        self.mark(slot)
        self.touch(slot)
        return slot.length

    def _longest(self, key: Hashable, ids: np.ndarray) -> tuple[Slot | None, int]:
        best: tuple[Slot | None, int] = None, 0
        for slot in self.slots:
            shared = self._reusable(slot, ids) if slot.key == key else 0
            # Idle before open: it needs no copy.
            if shared > best[1] or (shared and shared == best[1] and not slot.in_use):
                best = slot, shared
        return best

    def _reusable(self, slot: Slot, ids: np.ndarray) -> int:
        """Returns how many of the first ``ids`` the slot holds and a prompt may reuse."""
        if self.reuse_of == "none":
            return 0
        shared = slot.shared(ids)
        return min(shared, slot.prompted) if self.reuse_of == "prompts" else shared

    def _is_taken(self, slot: Slot, shared: int) -> bool:
        return shared >= _TAKEN_SHARE * slot.length or self._free() is None

    def _copy(self, source: Slot, target: Slot, length: int) -> None:
        room = self.budget_bytes is None or self._evict_for(self.bytes_of(length), keep=source)
        if room:
            copied = self.store.copy(source, target, length)
            target.put(source._tokens[:copied], prompted=source.prompted)

    def _free(self) -> Slot | None:
        """Returns the first slot without tokens that is not in use, or a new one if there may be:
        where memory would grow for it, only if no slot is idle."""
        for slot in self.slots:
            if not slot.in_use and not slot.length:
                return slot
        if self.store.grows and not all(slot.in_use for slot in self.slots):
            return None
        if len(self.slots) < self.store.slots:
            self.slots.append(Slot(len(self.slots)))
            return self.slots[-1]
        return None

    def _empty(self, keep: Slot | None) -> Slot:
        """Returns a slot without tokens, if need be one whose tokens are given up: ``keep``'s only
        where there is no other."""
        if (free := self._free()) is not None:
            return free
        idle = [slot for slot in self.slots if not slot.in_use]
        if not idle:
            raise KtrtError(
                f"all {len(self.slots)} slots of the KV cache are in use: close one first"
            )
        slot = min(idle, key=lambda each: (each is keep, each.used))
        self.empty(slot)
        return slot

    def close(self, slot: Slot, *, keep: bool = True) -> None:
        """Takes the slot back. What a prompt may reuse stays until its place or memory is needed;
        without ``keep`` all memory is freed at once."""
        slot.in_use, slot.promised = False, 0
        self.touch(slot)
        if keep and self.reuse_of != "all":
            self._keep(slot, slot.prompted if self.reuse_of == "prompts" else 0)
        if not keep:
            self.empty(slot)
            if not any(each.in_use or each.length for each in self.slots):
                self.store.shrink()

    def reserve(self, slot: Slot, tokens: int) -> bool:
        """Promises an open slot memory for ``tokens`` in all; False, with nothing promised, where
        the budget has none even without the idle slots. Gives up idle ones as needed."""
        needed = max(0, self.bytes_of(tokens) - self._bytes(slot))
        if not self._evict_for(needed, keep=slot):
            return False
        slot.promised = max(slot.promised, tokens)
        return True

    def room_for(self, tokens: int) -> bool:
        """Returns whether another slot of ``tokens`` can be opened and kept; gives up idle slots
        as needed."""
        slots = any(not slot.in_use for slot in self.slots) or len(self.slots) < self.store.slots
        return slots and self._evict_for(self.bytes_of(tokens))

    def make_room(self, slots: Sequence[Slot], ends: Sequence[int]) -> None:
        """Gives up idle slots, as far as needed, before open ``slots`` grow to ``ends``."""
        if self.budget_bytes is None or all(
            end <= slot.promised for slot, end in zip(slots, ends, strict=True)
        ):
            return
        if not any(slot.length and not slot.in_use for slot in self.slots):
            return
        more = sum(
            max(0, self.bytes_of(end) - self._bytes(slot))
            for slot, end in zip(slots, ends, strict=True)
        )
        if more and not self._evict_for(more):
            # Beyond the budget all the same: the caller has promised nothing.
            for slot in self.slots:
                if not slot.in_use:
                    self.empty(slot)

    def _bytes(self, slot: Slot) -> int:
        """Returns the memory that the slot takes, or may come to take by promise."""
        promised = self.bytes_of(slot.promised) if slot.promised else 0
        return max(promised, self.store.written_bytes(slot))

    def _evict_for(self, needed: int, keep: Slot | None = None) -> bool:
        """Gives up idle slots until ``needed`` more bytes fit into the budget."""
        if self.budget_bytes is None:
            return True
        sizes = {slot.index: self._bytes(slot) for slot in self.slots}
        taken = sum(sizes.values())
        idle = [s for s in self.slots if not s.in_use and s is not keep and sizes[s.index]]
        if taken - sum(sizes[slot.index] for slot in idle) + needed > self.budget_bytes:
            return False
        for slot in sorted(idle, key=lambda each: each.used):
            if taken + needed <= self.budget_bytes:
                break
            self.empty(slot)
            taken -= sizes[slot.index]
        return True

    def touch(self, slot: Slot) -> None:
        """Notes a use."""
        slot.used = next(self._clock)

    def step_back(self, slot: Slot) -> None:
        """Forgets the slot's last token, where that loses no other."""
        if slot.length and self.store.reaches(slot, slot.length - 1):
            self.rollback(slot, slot.length - 1)

    def mark(self, slot: Slot, *, replace: bool = False) -> None:
        """Saves a snapshot of the slot where cropping may be impossible later; ``replace``: in
        place of the latest snapshot."""
        if slot.length and self.continues:
            self.store.mark(slot, replace=replace)

    def rollback(self, slot: Slot, length: int) -> None:
        """Makes the slot hold its first ``length`` tokens, or fewer; an interrupted forward may
        have stored more."""
        tokens = slot.take()  # an exception in here leaves nothing that is trusted
        del tokens[self.store.truncate(slot, length) :]
        slot.put(tokens)

    def _keep(self, slot: Slot, length: int) -> None:
        # A cache that cannot be cropped need not be where all of it is kept; a slot without tokens
        # may have leftovers of an interrupted forward.
        if length < slot.length or not length:
            self.rollback(slot, length)

    def empty(self, slot: Slot) -> None:
        """Forgets the slot's tokens and frees their memory."""
        slot.take()
        self.store.truncate(slot, 0)
