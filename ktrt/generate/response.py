"""The types of answers: a token as it comes, and the whole answer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

FinishReason = Literal["stop", "length"]
# A token's log probability, and the likeliest tokens' by id, best first.
LogProbabilities = tuple[float, tuple[tuple[int, float], ...]]
# An entry for each token of a prompt; None for the first one, which nothing precedes.
PromptLogProbabilities = tuple[LogProbabilities | None, ...]


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """``prompt_tokens`` includes ``reused_tokens``, which the KV cache held. ``prefill_seconds``
    ends with the first token, where ``decode_seconds`` starts. ``finish_reason`` "stop": a stop id
    or stop string came; "length": max_new_tokens or the context ended the answer. ``stop_string``:
    the one that came; None for a stop id.
    """

    finish_reason: FinishReason | None
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stop_string: str | None = None

    def summary(self) -> str:
        """Returns counts and speeds for a log line."""
        decoded = self.generated_tokens - 1
        rate = decoded / self.decode_seconds if decoded else 0.0
        return (
            f"prompt {self.prompt_tokens} tokens ({self.reused_tokens} reused), "
            f"first token after {self.prefill_seconds:.2f} s; "
            f"{self.generated_tokens} tokens, {rate:.1f} per second, "
            f"{self.finish_reason or 'interrupted'}"
        )


@dataclass(frozen=True, kw_only=True)
class TokenResponse(_Counts):
    """One token of an answer, with counts and times up to it.

    ``text`` is the piece of the answer that the token completes, empty while a character or a stop
    string is incomplete. ``finish_reason`` is None until the last token. With ``logprobs``,
    ``logprob`` is the token's, and ``top_logprobs`` holds (token id, logprob) of the likeliest
    tokens, best first.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Response(_Counts):
    """A whole answer.

    ``text`` has neither the stop id nor the stop string that ended it; ``token_ids`` holds all
    generated tokens, a stop id included. With ``logprobs``, ``logprobs`` and ``top_logprobs`` have
    one entry per token, see ``TokenResponse``; otherwise they are empty.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()

    @classmethod
    def whole(cls, tokens: Iterable[TokenResponse]) -> Response:
        """Returns the answer that consists of ``tokens``; the last one has a finish reason."""
        parts = list(tokens)
        counts = {each.name: getattr(parts[-1], each.name) for each in fields(_Counts)}
        with_logprobs = parts[-1].logprob is not None
        return cls(
            text="".join(each.text for each in parts),
            token_ids=tuple(each.token for each in parts),
            logprobs=tuple(each.logprob for each in parts if each.logprob is not None),
            top_logprobs=tuple(each.top_logprobs for each in parts) if with_logprobs else (),
            **counts,
        )
