"""Choosing the next token from logits, as transformers' generate does.

Order and semantics are those of transformers' processors (generation/logits_process.py, 5.23):
repetition penalty, then, when sampling, temperature, top_k, top_p and a multinomial draw, all in
float32. The same logits and seed give the same token.
"""

from collections.abc import Callable, Sequence

import torch

from ktrt.config import SamplingArgs
from ktrt.errors import KtrtError

Sampler = Callable[[torch.Tensor], int]


def make_sampler(args: SamplingArgs, prompt_ids: Sequence[int]) -> Sampler:
    """A function from the next position's logits [vocab_size] (any float dtype) to a token id.

    It remembers what it chose: one sampler serves one answer, called once per token. The repetition
    penalty counts ``prompt_ids`` too. ``KtrtError``: NaN among the logits.
    """
    greedy = not args.do_sample or args.temperature == 0
    generator: torch.Generator | None = None
    seen: torch.Tensor | None = None

    def sample(logits: torch.Tensor) -> int:
        nonlocal generator, seen
        scores = logits.to(torch.float32)
        if torch.isnan(scores).any():
            raise KtrtError(
                "the model's logits hold NaN: weights or adapter are damaged, or infer_dtype "
                "float16 overflowed (try bfloat16)"
            )
        if args.repetition_penalty != 1.0:
            if seen is None:
                seen = torch.zeros_like(scores, dtype=torch.bool)
                seen[list(prompt_ids)] = True
            scores = _penalise(scores, seen, args.repetition_penalty)
        if greedy:
            token = int(scores.argmax())
        else:
            if generator is None:
                generator = _generator(args.seed, scores.device)
            probabilities = _filter(scores / args.temperature, args).softmax(dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if seen is not None:
            seen[token] = True
        return token

    return sample


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalised, scores)


def _filter(scores: torch.Tensor, args: SamplingArgs) -> torch.Tensor:
    """``scores`` with everything outside top_k and top_p at -inf."""
    kept: torch.Tensor | None = None
    if 0 < args.top_k < scores.numel():
        # Ties with the k-th best stay, as in transformers.
        kept = torch.nonzero(scores >= torch.topk(scores, args.top_k).values[-1]).squeeze(-1)
    if args.top_p < 1:
        kept = _top_p(scores, kept, args.top_p)
    if kept is None:
        return scores
    filtered = torch.full_like(scores, float("-inf"))
    filtered[kept] = scores[kept]
    return filtered


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
