"""Log probabilities of a prompt's own tokens, as its chunks are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ktrt.errors import ConfigError, KtrtError
from ktrt.generate.sampling import log_probability_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.response import LogProbabilities, PromptLogProbabilities

# Rows that are float32 at once, twice: 26 MB for a vocabulary of 102400.
_ROWS = 32


# OpenAI's bound of top_logprobs.
_MOST = 20


def check_scored(count: int | None) -> bool:
    """Returns whether a prompt is scored, with the ``count`` likeliest tokens. ``ConfigError``: the
    number is wrong."""
    if count is not None and (type(count) is not int or not 0 <= count <= _MOST):
        raise ConfigError(f"prompt_logprobs: expected 0 … {_MOST}, or None, found {count!r:.80}")
    return count is not None


class PromptScores:
    """Scores ``prompt_ids``, each token by the logits of the one before, with the ``count``
    likeliest tokens in its place."""

    def __init__(self, prompt_ids: Sequence[int], count: int) -> None:
        self._ids, self._count = prompt_ids, count
        # An entry for each token from the second one on.
        self._found: list[LogProbabilities] = []

    def push(self, start: int, logits: torch.Tensor) -> None:
        """Takes the logits [count, vocab_size] of the tokens from ``start`` on; what was scored
        before is not scored again. ``KtrtError``: they hold NaN."""
        for row in range(len(self._found) - start, len(logits), _ROWS):
            tokens = self._ids[start + row + 1 : start + min(row + _ROWS, len(logits)) + 1]
            if not tokens:
                return  # the last token's logits are the answer's
            block = logits[row : row + len(tokens)]
            if torch.isnan(block).any():
                raise KtrtError("the model's logits of the prompt hold NaN: weights are damaged")
            found = log_probability_rows(block, tokens, [self._count] * len(tokens))
            self._found += found

    def whole(self) -> PromptLogProbabilities:
        """Returns an entry for each token of the prompt."""
        return (None, *self._found)
