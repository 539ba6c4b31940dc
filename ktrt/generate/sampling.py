"""Chooses the next token from logits, as transformers' generate does.

Order and semantics are the same as in transformers (generation/logits_process.py, 5.23):
repetition penalty, then, when sampling, temperature, top_k, top_p, min_p and a multinomial draw,
all in float32. OpenAI's presence and frequency penalties, which transformers lacks, follow the
repetition penalty, where its generate puts the caller's processors. Its logit_bias comes first, as
in vLLM; what a constraint excludes is -inf after all of these. The same logits and seed give the
same token, in any company.

``_exact_draw`` is the definition. ``generate.race`` finds the same token among a few candidates, or
finds that rounding could decide, and then the definition does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ktrt.errors import ConfigError, EngineError, KtrtError
from ktrt.generate.race import Filters, draw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ktrt.config import SamplingArgs
    from ktrt.generate.response import LogProbabilities

    Scores = NDArray[np.float32]
    # From scores and counts, which are 1 or more, to scores.
    Rule = Callable[[Scores, Scores], Scores]

Sampler = Callable[[torch.Tensor], int]

# Divided by less, ordinary logits leave float32's range. Two different logits are at least 1e-9
# apart there, so that even at this temperature all but the best have the probability 0.
_COLDEST = 1e-30
# Logits that a thread gets at least: to hand rows to another one takes as long as to choose from
# some 16,384.
_LOGITS_PER_THREAD = 1 << 16
_MOST_THREADS = 16


class Constraint(Protocol):
    """Restricts one answer, to a grammar for example; used by the thread that samples."""

    def mask(self, logits: torch.Tensor) -> None:
        """Sets the logits [vocab_size] float32 of tokens that cannot come next to -inf, in
        place."""

    def accept(self, token: int) -> None:
        """Notes the chosen token."""


def make_sampler(
    args: SamplingArgs, prompt_ids: Sequence[int], constraint: Constraint | None = None
) -> RowSampler:
    """Returns a function from the next position's logits [vocab_size] (any float dtype) to a token
    id.

    It remembers what it chose: one sampler serves one answer, called once per token. The repetition
    penalty counts ``prompt_ids`` too. ``KtrtError``: NaN among the logits, or no token that
    ``constraint`` allows.
    """
    return RowSampler(args, prompt_ids, constraint)


class RowSampler:
    """One answer's settings, penalties, constraint and random numbers."""

    def __init__(
        self, args: SamplingArgs, prompt_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self._args, self._constraint = args, constraint
        self._greedy = not args.do_sample or args.temperature < _COLDEST
        bias = _Bias(args.logit_bias) if args.logit_bias else None
        penalties = _repetition(args, prompt_ids), _openai(args)
        self._penalties = [each for each in penalties if each]
        self._changes = [each for each in (bias, *penalties) if each]
        self._generator: torch.Generator | None = None

    def __call__(self, logits: torch.Tensor) -> int:
        (token,) = sample_rows([self], logits.unsqueeze(0))
        if isinstance(token, KtrtError):
            raise token
        return token

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the largest logit."""
        return self._greedy and not self._changes and self._constraint is None

    def choose(self, scores: Scores) -> int | KtrtError:
        """Returns the token for ``scores`` [vocab_size], the logits in float32."""
        token = int(scores.argmax())  # NaN, if there is one
        if np.isnan(scores[token]):
            return _nan_error()
        if self._changes or self._constraint is not None:
            scores = scores.copy()
            if (error := self._change(scores)) is not None:
                return error
            token = int(scores.argmax())
        if not self._greedy:
            token = self._draw(scores)
        for penalty in self._penalties:
            penalty.count(token)
        return token if self._constraint is None else self._accepted(token)

    def _change(self, scores: Scores) -> KtrtError | None:
        """Changes ``scores`` as the settings say; returns why no token is left."""
        for each in self._changes:
            each.apply(scores)
        if self._constraint is None:
            return None
        try:
            self._constraint.mask(torch.from_numpy(scores))
        except Exception as error:  # noqa: BLE001 - belongs to this row alone
            return _constraint_error(error)
        best = scores.max()
        if np.isnan(best) or best == -np.inf:
            return KtrtError("the answer's constraint allows no token: its grammar has no way on")
        return None

    def _accepted(self, token: int) -> int | KtrtError:
        assert self._constraint is not None
        try:
            self._constraint.accept(token)
        except Exception as error:  # noqa: BLE001 - belongs to this row alone
            return _constraint_error(error)
        return token

    def _draw(self, scores: Scores) -> int:
        if self._generator is None:
            self._generator = _generator(self._args.seed)
        args = self._args
        scores = scores / np.float32(args.temperature)
        token = draw(scores, Filters(args.top_k, args.top_p, args.min_p), self._generator)
        if token is None:
            token = _exact_draw(torch.from_numpy(scores), args, self._generator)
        return token


def sample_rows(
    samplers: Sequence[RowSampler], logits: Sequence[torch.Tensor] | torch.Tensor
) -> list[int | KtrtError]:
    """Returns each row's next token from ``logits``, rows of [vocab_size], or why that row has
    none: NaN among its logits. A row that fails changes neither its sampler nor another row.

    Logits on a GPU come to the CPU in one copy, or only their largest's indices where that is all
    that the rows ask for: a seed gives the same answer on every device.
    """
    if len(samplers) != len(logits):
        raise ValueError(f"{len(samplers)} samplers, {len(logits)} rows of logits")
    if not samplers:
        return []
    with torch.inference_mode():
        if logits[0].device.type != "cpu":
            logits = logits if isinstance(logits, torch.Tensor) else torch.stack(tuple(logits))
            if all(each.plain_greedy for each in samplers):
                return _largest(logits)
            logits = logits.cpu()
        # NumPy, so that a thread per row is one thread: torch's operations start threads.
        rows = [row.to(torch.float32).numpy() for row in logits]
    threads = min(_threads(), len(rows), len(rows) * len(rows[0]) // _LOGITS_PER_THREAD)
    if threads < 2:
        return _choose_all(samplers, rows)
    # This thread takes the first share.
    parts = [slice(n, None, threads) for n in range(threads)]
    others = [_pool().submit(_choose_all, samplers[part], rows[part]) for part in parts[1:]]
    found: list[int | KtrtError] = [0] * len(rows)
    found[parts[0]] = _choose_all(samplers[parts[0]], rows[parts[0]])
    for part, each in zip(parts[1:], others, strict=True):
        found[part] = each.result()
    return found


def _choose_all(samplers: Sequence[RowSampler], rows: Sequence[Scores]) -> list[int | KtrtError]:
    return [_choose(*pair) for pair in zip(samplers, rows, strict=True)]


def _choose(sampler: RowSampler, scores: Scores) -> int | KtrtError:
    try:
        return sampler.choose(scores)
    except Exception as error:  # noqa: BLE001 - belongs to this row alone
        found = EngineError(f"no token can be chosen: {type(error).__name__}: {error}")
        found.__cause__ = error
        return found


def _largest(logits: torch.Tensor) -> list[int | KtrtError]:
    best = logits.to(torch.float32).argmax(dim=-1)
    values = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    found = torch.where(torch.isnan(values), -1, best).tolist()
    return [_nan_error() if token < 0 else token for token in found]


def _nan_error() -> KtrtError:
    return KtrtError(
        "the model's logits hold NaN: weights or adapter are damaged, or infer_dtype float16 "
        "overflowed (try bfloat16)"
    )


def _constraint_error(cause: Exception) -> KtrtError:
    kind = ConfigError if isinstance(cause, ConfigError) else KtrtError
    error = kind(f"the answer's constraint failed: {cause or type(cause).__name__}")
    error.__cause__ = cause
    return error


def _threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="ktrt-sampling")


def log_probabilities(logits: torch.Tensor, token: int, count: int) -> LogProbabilities:
    """Returns the log probability of ``token``, and of the ``count`` likeliest as (id, value), best
    first: from the model's ``logits`` [vocab_size], before penalties, temperature and filters.
    """
    return log_probability_rows(logits.unsqueeze(0), [token], [count])[0]


def log_probability_rows(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[LogProbabilities]:
    """Returns ``log_probabilities`` of each row of ``logits`` [rows, vocab_size].

    A token's value equals the largest of its row exactly where the token is the one that greedy
    decoding takes, the first of the largest logits: where rounding or equal logits make others
    equal, they get the next smaller number.
    """
    with torch.inference_mode():
        values = logits.to(torch.float32).log_softmax(dim=-1)
        greedy = logits.argmax(dim=-1, keepdim=True)
        asked = torch.tensor(tokens, device=values.device).unsqueeze(-1)
        # One more than asked for: an equal one may stand in the place of the greedy one.
        best = torch.topk(values, min(max(counts) + 1, values.shape[-1]))
        found = values.gather(-1, torch.cat([greedy, asked], dim=-1)).tolist()
        rows = zip(
            greedy.squeeze(-1).tolist(), tokens, found, best.indices.tolist(),
            best.values.tolist(), counts, strict=True,
        )  # fmt: skip
        return [_scored(*row) for row in rows]


def _scored(
    greedy: int, token: int, found: list[float], ids: list[int], values: list[float], count: int
) -> LogProbabilities:
    largest = found[0]

    def below(each: int, value: float) -> float:
        equal = each != greedy and value >= largest
        return float(np.nextafter(np.float32(largest), np.float32(-np.inf))) if equal else value

    others = [(each, below(each, v)) for each, v in zip(ids, values, strict=True) if each != greedy]
    return below(token, found[-1]), ((greedy, largest), *others)[:count]


class _Bias:
    """Adds to the scores of some tokens, in place."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = np.fromiter(biases.keys(), np.int64, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))

    def apply(self, scores: Scores) -> None:
        known = self._ids < len(scores)
        scores[self._ids[known]] += self._biases[known]


class _Penalty:
    """Lowers the scores of the tokens that were there, by how often, in place."""

    def __init__(self, rule: Rule, ids: Sequence[int] = ()) -> None:
        self._rule = rule
        self._places = {token: place for place, token in enumerate(dict.fromkeys(ids))}
        self._ids = np.fromiter(self._places, np.int64, len(self._places))
        self._counts = np.ones(len(self._places), np.float32)

    def apply(self, scores: Scores) -> None:
        # A prompt may have words of an adapter that is off: the base cannot answer them.
        known = self._ids < len(scores)
        ids = self._ids[known]
        scores[ids] = self._rule(scores[ids], self._counts[known])

    def count(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids = np.append(self._ids, token)
            self._counts = np.append(self._counts, np.float32(0))
        self._counts[place] += 1


def _repetition(args: SamplingArgs, prompt_ids: Sequence[int]) -> _Penalty | None:
    factor = np.float32(args.repetition_penalty)

    def rule(scores: Scores, _counts: Scores) -> Scores:
        return np.where(scores < 0, scores * factor, scores / factor)

    return None if args.repetition_penalty == 1 else _Penalty(rule, prompt_ids)


def _openai(args: SamplingArgs) -> _Penalty | None:
    presence, frequency = np.float32(args.presence_penalty), np.float32(args.frequency_penalty)

    def rule(scores: Scores, counts: Scores) -> Scores:
        return scores - counts * frequency - presence

    return None if args.presence_penalty == args.frequency_penalty == 0 else _Penalty(rule)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _exact_draw(scores: torch.Tensor, args: SamplingArgs, generator: torch.Generator) -> int:
    probabilities = _filter(scores, args).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _filter(scores: torch.Tensor, args: SamplingArgs) -> torch.Tensor:
    """``scores`` with everything outside top_k, top_p and min_p at -inf."""
    kept: torch.Tensor | None = None
    if 0 < args.top_k < scores.numel():
        # Ties with the k-th best stay, as in transformers.
        kept = torch.nonzero(scores >= torch.topk(scores, args.top_k).values[-1]).squeeze(-1)
    if args.top_p < 1:
        kept = _top_p(scores, kept, args.top_p)
    if kept is not None:
        filtered = torch.full_like(scores, float("-inf"))
        filtered[kept] = scores[kept]
        scores = filtered
    if args.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        too_small = probabilities < args.min_p * probabilities.amax()
        scores = scores.masked_fill(too_small, float("-inf"))
    return scores


def _top_p(scores: torch.Tensor, kept: torch.Tensor | None, top_p: float) -> torch.Tensor:
    """The indices, of those in ``kept`` (None: all), that top_p leaves."""
    if kept is None:
        return _most_probable(scores, top_p)[1]
    # Sorting what top_k left instead of all: 0.1 ms instead of 7 ms for 102400 tokens.
    tied, chosen = _most_probable(scores[kept], top_p)
    if not tied:
        return kept[chosen]
    # Which of two equal scores goes is up to the sort, whose order depends on all its input.
    filtered = torch.full_like(scores, float("-inf"))
    filtered[kept] = scores[kept]
    return _most_probable(filtered, top_p)[1]


def _most_probable(scores: torch.Tensor, top_p: float) -> tuple[bool, torch.Tensor]:
    """Whether equal scores lie on both sides of the cut, and the indices that are kept."""
    ordered, order = torch.sort(scores)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[-1] = False
    cut = int(removed.sum())
    return cut > 0 and bool(ordered[cut - 1] == ordered[cut]), order[cut:]
