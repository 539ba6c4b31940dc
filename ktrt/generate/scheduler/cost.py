"""Predicts how long a step takes, from its bytes and from the steps so far.

A step reads everything but the routed experts once, the union of the experts that its tokens chose,
and the keys and values of its sequences. About 32 tokens choose nearly all experts, so a small
chunk of a prompt costs nearly as much as a large one. The bandwidth is the one of the steps
themselves; the arithmetic of a prompt's tokens comes on top.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

# Steps whose median an estimate is: one that was slow for another reason changes nothing.
_STEPS = 31
# Until the first step was measured.
_BANDWIDTH = 2e10


@dataclass(frozen=True)
class CostFacts:
    """A model's bytes: ``other_bytes`` are read once in every step, ``expert_bytes`` are all routed
    experts', of which a token chooses the share ``share``. ``bandwidth`` (bytes/s) and
    ``token_seconds`` (arithmetic of a prompt's token) hold until steps were measured. ``mixes``:
    the sequences of a step share one forward. ``experts``: a layer's, on average."""

    other_bytes: float = 0.0
    expert_bytes: float = 0.0
    share: float = 1.0
    kv_token_bytes: float = 0.0
    bandwidth: float = _BANDWIDTH
    token_seconds: float = 0.0
    mixes: bool = True
    experts: int = 0


@dataclass(frozen=True)
class StepSize:
    """Sizes of a step: one token of each of ``rows`` sequences, ``prompt`` tokens of
    ``prompts`` others; ``held``: the positions before them all."""

    rows: int
    prompt: int = 0
    prompts: int = 0
    held: int = 0


class CostModel:
    """Predicts steps, and learns from them."""

    def __init__(self, facts: CostFacts) -> None:
        self._facts = facts
        self._bandwidths: deque[float] = deque(maxlen=_STEPS)
        self._token_seconds: deque[float] = deque(maxlen=_STEPS)
        # Measured unions as a share of even routing's: related texts choose fewer experts.
        self._unions: deque[float] = deque(maxlen=_STEPS)

    @property
    def experts(self) -> int:
        """The experts of a layer."""
        return self._facts.experts

    @property
    def measured_bandwidth(self) -> float | None:
        """Bytes per second of the latest steps; None: there were none."""
        return median(self._bandwidths) if self._bandwidths else None

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the latest steps, or what was assumed before them."""
        return self.measured_bandwidth or self._facts.bandwidth

    @property
    def token_seconds(self) -> float:
        """Seconds that a prompt's token adds to a step."""
        return median(self._token_seconds) if self._token_seconds else self._facts.token_seconds

    def union(self, tokens: int) -> float:
        """Returns the share of the experts that a forward of ``tokens`` reads."""
        if not tokens:
            return 0.0
        measured = median(self._unions) if self._unions else 1.0
        return max(self._facts.share, min(1.0, measured * self._even(tokens)))

    def _even(self, tokens: int) -> float:
        return 1.0 - (1.0 - self._facts.share) ** tokens

    def bytes_of(self, size: StepSize, union: float | None = None) -> float:
        """Returns the bytes that a step reads; ``union``: the share of the experts that it chose,
        if that is known."""
        facts = self._facts
        held = facts.kv_token_bytes * size.held
        if facts.mixes:
            share = self.union(size.rows + size.prompt) if union is None else union
            return facts.other_bytes + share * facts.expert_bytes + held
        alone = facts.other_bytes + facts.share * facts.expert_bytes
        each = size.prompt // max(1, size.prompts)
        prompts = facts.other_bytes + self.union(each) * facts.expert_bytes
        return size.rows * alone + size.prompts * prompts + held

    def seconds(self, size: StepSize) -> float:
        """Predicts a step."""
        return self.bytes_of(size) / self.bandwidth + size.prompt * self.token_seconds

    def observe(self, size: StepSize, seconds: float, union: float | None = None) -> None:
        """Learns from a step that took ``seconds``; ``union``: the share of the experts that it
        chose, if that was counted."""
        tokens = size.rows + size.prompt
        if union is not None and tokens:
            self._unions.append(union / self._even(tokens))
        read = self.bytes_of(size, union)
        if seconds <= 0 or read <= 0:
            return
        if not size.prompt:
            self._bandwidths.append(read / seconds)
        elif self._bandwidths:
            more = seconds - read / self.bandwidth
            self._token_seconds.append(max(0.0, more) / size.prompt)
