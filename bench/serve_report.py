"""Figures of a load: texts, times, shares and memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve_load import Load

SHARE_TOLERANCE = 0.10
# Growth of memory in a minute. A leak of 10 KB per request shows in 5 minutes. In the
# first 75 seconds it grows by 4 %, in a run of 60 s by 0.6 to 0.8 % a minute, then by 0.06 %.
GROWTH_PER_MINUTE, JUDGED_SECONDS = 0.005, 150.0
SHOWN = 5


@dataclass(frozen=True)
class Report:
    """``figures`` are for machines; ``wrong`` are descriptions of wrong answers."""

    figures: Mapping[str, Any]
    wrong: Sequence[str]

    def text(self) -> str:
        """Returns the figures in lines."""
        lines = []
        for name, value in self.figures.items():
            shown = value
            if isinstance(value, dict):
                shown = ", ".join(f"{each} {number}" for each, number in value.items())
            lines.append(f"{name.replace('_', ' ')}: {shown}")
        return "\n".join(lines)

    def problems(self, *, quick: bool) -> list[str]:
        """Returns what must not be; ``quick``: too short for shares and memory."""
        found = list(self.wrong[:SHOWN])
        if len(self.wrong) > SHOWN:
            found.append(f"and {len(self.wrong) - SHOWN} more wrong answers")
        if not self.figures["answers"]:
            found.append("no answer was whole")
        if not self.figures["server_idle_afterwards"]:
            found.append("the server still counts requests")
        if quick:
            return found
        for model, share in self.figures["shares_of_computed_tokens"].items():
            if abs(share - 1) > SHARE_TOLERANCE:
                found.append(f"{model} got {share} of its share")
        is_warm = self.figures["seconds"] >= JUDGED_SECONDS
        if is_warm and self.figures["memory_growth_per_minute"] > GROWTH_PER_MINUTE:
            found.append(f"memory grows: {self.figures['memory_growth_per_minute']:.2%} a minute")
        return found


def report_of(
    load: Load, models: Sequence[str], seconds: float, *, texts: int, idle: bool
) -> Report:
    """Returns the report of a load."""
    whole = [each for each in load.finished if not each.left]
    good = [each.answer for each in whole if each.wrong is None]
    wrong = [f"{each.model}: {each.wrong}" for each in load.finished if each.wrong is not None]
    tokens = sum(each.tokens for each in good)
    computed: Counter[str] = Counter()
    for each in whole:
        answer = each.answer
        computed[each.model] += answer.tokens + answer.prompt_tokens - answer.cached_tokens
    even = sum(computed.values()) / len(models) or 1.0
    memory, growth = slope(load.memory)
    figures = {
        "seconds": round(seconds, 1),
        "answers": len(good),
        "wrong": len(wrong),
        "turns_that_last_bits_sway": load.swaying,
        "answers_that_differ_there": sum(each.swayed for each in load.finished),
        "left_on_purpose": sum(each.left for each in load.finished),
        "refused": dict(load.refused),
        "different_texts": texts,
        "tokens_per_second": round(tokens / seconds, 1),
        "prompt_tokens_reused": _share(sum(a.cached_tokens for a in good),
                                       sum(a.prompt_tokens for a in good)),
        "first_token_ms": _times([a.first for a in good if a.first is not None]),
        "between_tokens_ms": _times([gap for a in good for gap in a.gaps]),
        "shares_of_computed_tokens": {m: round(computed[m] / even, 3) for m in models},
        "memory_mb": round(memory / 1e6),
        "memory_growth_per_minute": round(growth, 5),
        "server_idle_afterwards": idle,
    }  # fmt: skip
    return Report(figures, wrong)


def slope(memory: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the mean of the last two thirds of the samples, and its growth per minute as a share
    of it, by least squares."""
    late = memory[len(memory) // 3 :]
    if len(late) < 3:
        return 0.0, 0.0
    middle = sum(t for t, _ in late) / len(late)
    mean = sum(b for _, b in late) / len(late)
    spread = sum((t - middle) ** 2 for t, _ in late)
    return mean, 60 * sum((t - middle) * (b - mean) for t, b in late) / spread / mean


def _share(part: float, whole: float) -> float:
    return round(part / whole, 3) if whole else 0.0


def _times(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {f"p{p}": round(1e3 * ordered[min(last, len(ordered) * p // 100)], 1) for p in (50, 99)}
