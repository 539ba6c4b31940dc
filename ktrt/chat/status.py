"""The cost of an answer: the line under it, a row of JSON, the totals of a chat."""

from dataclasses import dataclass
from typing import Any, Protocol


class Counts(Protocol):
    """The counts of an answer: a ``Response``, or its last ``TokenResponse``. None: a server has
    not told the number."""

    @property
    def finish_reason(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def reused_tokens(self) -> int | None: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def prefill_seconds(self) -> float: ...
    @property
    def decode_seconds(self) -> float: ...


_ENDINGS = {"stop": "", "length": " · cut at max_new_tokens", None: " · stopped by you"}
# Servers have more reasons: a content filter, for example.
_OTHER_ENDING = " · ended by {}"


def status_line(last: Counts, limit: float | None = None) -> str:
    """Returns counts and speeds of an answer in one line. ``limit``: the limit in tokens per second
    that the memory's bandwidth sets; None if it is not known."""
    parts = [_count(last.generated_tokens, "token")]
    if rate := _decode_rate(last):
        parts[0] += f", {rate:.1f}/s"
        if limit:
            parts[0] += f" ({rate / limit:.0%} of the memory's limit)"
    parts.append(f"first after {last.prefill_seconds:.2f} s")
    if last.prompt_tokens is not None:
        parts.append(_prompt(last, last.prompt_tokens))
    other = _OTHER_ENDING.format(last.finish_reason)
    return " · ".join(parts) + _ENDINGS.get(last.finish_reason, other)


def _prompt(last: Counts, tokens: int) -> str:
    read = _read(last)
    if read is None:
        return f"prompt {tokens}"
    text = f"prompt {tokens}: {last.reused_tokens} reused, {read} read"
    if last.prefill_seconds > 0:
        text += f" at {read / last.prefill_seconds:.0f}/s"
    return text


def as_dict(last: Counts, limit: float | None = None) -> dict[str, Any]:
    """Returns the same for JSON: seconds, and tokens per second (None if not measured)."""
    read = _read(last)
    rate = _decode_rate(last)
    return {
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "reused_tokens": last.reused_tokens,
        "generated_tokens": last.generated_tokens,
        "first_token_seconds": round(last.prefill_seconds, 6),
        "decode_seconds": round(last.decode_seconds, 6),
        "prefill_tokens_per_second": _rounded(_ratio(read or 0, last.prefill_seconds)),
        "decode_tokens_per_second": _rounded(rate),
        "share_of_bandwidth_limit": _rounded(rate / limit if rate and limit else None),
    }


@dataclass
class Totals:
    """Sums over a chat's answers, including stopped ones."""

    answers: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, last: Counts) -> None:
        """Adds an answer, by its last response."""
        self.answers += 1
        self.prompt_tokens += last.prompt_tokens or 0
        self.reused_tokens += last.reused_tokens or 0
        self.generated_tokens += last.generated_tokens
        self.decoded_tokens += last.generated_tokens - 1
        self.prefill_seconds += last.prefill_seconds
        self.decode_seconds += last.decode_seconds

    def lines(self) -> list[str]:
        """Returns the totals for people, one fact per line."""
        read = self.prompt_tokens - self.reused_tokens
        return [
            f"answers           {self.answers}",
            f"prompt tokens     {self.prompt_tokens:,}: {self.reused_tokens:,} reused, {read:,} "
            f"read{_at(_ratio(read, self.prefill_seconds))}",
            f"generated tokens  {self.generated_tokens:,}"
            f"{_at(_ratio(self.decoded_tokens, self.decode_seconds))}",
        ]


def _read(last: Counts) -> int | None:
    if last.prompt_tokens is None or last.reused_tokens is None:
        return None
    return last.prompt_tokens - last.reused_tokens


def _decode_rate(last: Counts) -> float | None:
    # The first token belongs to the prefill.
    return _ratio(last.generated_tokens - 1, last.decode_seconds)


def _ratio(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _at(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f}/s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
