"""One answer: the choice of its tokens from logits, their text, and its end."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from ktrt.generate.response import Response, TokenResponse
from ktrt.generate.sampling import (
    log_probabilities,
    log_probability_rows,
    make_sampler,
    sample_rows,
)
from ktrt.generate.text_stream import StopStrings, TextStream

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ktrt.config import SamplingArgs
    from ktrt.errors import KtrtError
    from ktrt.generate.response import FinishReason, LogProbabilities
    from ktrt.generate.sampling import Constraint
    from ktrt.generate.text_stream import Decoder


class Answer:
    """An answer to ``prompt_ids`` that grows token by token, without the text of a stop id or stop
    string.

    ``stop_ids`` and ``max_tokens`` apply in addition to those in ``sampling``; ``shown_tokens`` are
    shown despite ``skip_special_tokens`` (see ``TextStream``). ``constraint`` bounds what it says;
    log probabilities are those before it. Its times count from here.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_ids: Sequence[int],
        sampling: SamplingArgs,
        *,
        stop_ids: Collection[int],
        max_tokens: int,
        shown_tokens: Mapping[int, str] = MappingProxyType({}),
        constraint: Constraint | None = None,
    ) -> None:
        self._start = self._first = time.perf_counter()
        # How many tokens are listed with their log probabilities, next to the chosen one; -1: none
        # is scored.
        self.top_logprobs = sampling.top_logprobs if sampling.logprobs else -1
        # The next token's, where they were computed for the rows of a step at once.
        self.scored: LogProbabilities | None = None
        self.sampler = make_sampler(sampling, prompt_ids, constraint)
        stream = TextStream(
            tokenizer, skip_special_tokens=sampling.skip_special_tokens, shown=shown_tokens
        )
        self.most_tokens = min(max_tokens, sampling.max_new_tokens)
        self._text = _AnswerText(stream, sampling, stop_ids, self.most_tokens)
        self._prompt, self._reused, self._count = len(prompt_ids), 0, 0

    def begin(self, reused: int) -> None:
        """Notes how many tokens of the prompt were held already."""
        self._reused = reused

    def push(self, token: int, logits: torch.Tensor) -> TokenResponse:
        """Appends a token that ``sampler`` chose from ``logits`` [vocab_size]."""
        self._count += 1
        piece, reason = self._text.push(token, self._count)
        scored, self.scored = self.scored, None
        if scored is None and self.top_logprobs >= 0:
            scored = log_probabilities(logits, token, self.top_logprobs)
        now = time.perf_counter()
        if self._count == 1:
            self._first = now
        return TokenResponse(
            text=piece,
            token=token,
            finish_reason=reason,
            prompt_tokens=self._prompt,
            reused_tokens=self._reused,
            generated_tokens=self._count,
            prefill_seconds=self._first - self._start,
            decode_seconds=now - self._first,
            logprob=scored[0] if scored else None,
            top_logprobs=scored[1] if scored else (),
            stop_string=self._text.stop_string,
        )

    def without_tokens(self) -> Response:
        """Returns the answer that has none."""
        return Response(
            text="",
            token_ids=(),
            finish_reason="length",
            prompt_tokens=self._prompt,
            reused_tokens=self._reused,
            generated_tokens=0,
            prefill_seconds=time.perf_counter() - self._start,
            decode_seconds=0.0,
        )


def next_tokens(answers: Sequence[Answer], logits: Sequence[torch.Tensor]) -> list[int | KtrtError]:
    """Returns the next token of each answer from its ``logits`` [1, vocab_size], or why it has
    none."""
    rows = [row[0] for row in logits]
    tokens = sample_rows([answer.sampler for answer in answers], rows)
    chosen = zip(answers, rows, tokens, strict=True)
    scored = [(a, row, t) for a, row, t in chosen if a.top_logprobs >= 0 and isinstance(t, int)]
    if scored:
        asked, wanted, ids = zip(*scored, strict=True)
        found = log_probability_rows(
            torch.stack(wanted), ids, [each.top_logprobs for each in asked]
        )
        for answer, each in zip(asked, found, strict=True):
            answer.scored = each
    return tokens


class _AnswerText:
    """An answer's text as it may be shown, and its end."""

    def __init__(
        self, text: TextStream, args: SamplingArgs, stop_ids: Collection[int], max_tokens: int
    ) -> None:
        self._text = text
        self._strings = StopStrings(args.stop_strings)
        self._stop_ids = {*stop_ids, *args.stop_token_ids}
        self._max_tokens = max_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._strings.found

    def push(self, token: int, count: int) -> tuple[str, FinishReason | None]:
        """The text to show after the ``count``-th token, and why the answer ends with it, if it
        does."""
        if token in self._stop_ids:
            return self._strings.flush(), "stop"
        piece = self._strings.push(self._text.push(token))
        if self._strings.found:
            return piece, "stop"
        if count == self._max_tokens:
            return piece + self._strings.flush(), "length"
        return piece, None
