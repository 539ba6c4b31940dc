"""The generation loop: token ids in, responses with pieces of text out.

Three layers: ``generate_step`` yields token ids, ``stream_generate`` adds stop ids, text and
timings, and sessions build conversations on both. The model itself runs in ``generate.runner``.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ktrt.config import SamplingArgs
from ktrt.errors import ConfigError
from ktrt.generate.response import FinishReason, TokenResponse
from ktrt.generate.runner import KvCache
from ktrt.generate.sampling import Sampler, log_probabilities, make_sampler
from ktrt.generate.text_stream import Decoder, StopStrings, TextStream

# Told how many of how many new prompt tokens are done: 0 first, then after each forward.
OnPrefill = Callable[[int, int], None]


def generate_step(
    cache: KvCache, ids: Sequence[int], sampler: Sampler, on_prefill: OnPrefill | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Token ids without end, each with the logits [vocab_size] it was chosen from.

    ``ids``: the part of the prompt that ``cache`` does not hold yet. An exception of ``on_prefill``
    ends the prefill between two forwards; what is done by then stays in the cache.
    """
    logits = _prefill(cache, ids, on_prefill or (lambda _done, _total: None))
    while True:
        token = sampler(logits)
        yield token, logits
        logits = cache.forward([token])


def _prefill(cache: KvCache, ids: Sequence[int], on_prefill: OnPrefill) -> torch.Tensor:
    done = 0
    on_prefill(done, len(ids))
    while True:
        left = len(ids) - done
        count = min(left, cache.prefill_chunk(left)) if cache.continues else left
        logits = cache.forward(ids[done : done + count])
        # Marks stay at the prompt's end, and before the last forward for the same prompt again.
        cache.mark(replace=0 < done < len(ids) - count)
        done += count
        on_prefill(done, len(ids))
        if done == len(ids):
            return logits


_CONTEXT_HOLDS = "the model's context holds"


def check_prompt(model: Any, prompt_ids: Sequence[int], limit: int, bound: str = "") -> int:
    """How many tokens can follow the prompt in a context of ``limit`` tokens; ``bound``: where the
    limit comes from, for the message.

    ``ConfigError``: the prompt leaves no room there, or holds ids without an embedding.
    """
    table = model.get_input_embeddings()
    plain = table.get_base_layer() if hasattr(table, "get_base_layer") else table
    # With an adapter that has more words, those can be read while it is off, too.
    rows = getattr(plain, "num_embeddings", None) or table.weight.shape[0]
    if max(prompt_ids) >= rows:
        raise ConfigError(
            f"the prompt holds token id {max(prompt_ids)}, the model has {rows} embeddings: this "
            "tokenizer does not belong to this model"
        )
    if len(prompt_ids) >= limit:
        raise ConfigError(
            f"the conversation has {len(prompt_ids)} tokens, "
            f"{bound or _CONTEXT_HOLDS} {limit}: shorten it, or start anew"
        )
    return limit - len(prompt_ids)


def stream_generate(
    tokenizer: Decoder,
    cache: KvCache,
    prompt_ids: Sequence[int],
    sampling: SamplingArgs,
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    shown_tokens: Mapping[int, str] = MappingProxyType({}),
    on_prefill: OnPrefill | None = None,
) -> Iterator[TokenResponse]:
    """The answer to ``prompt_ids``, a response per token; the text of a stop id or stop string is
    not part of it. ``stop_ids`` and ``max_tokens`` count beside those of ``sampling``, and
    ``shown_tokens`` (see ``TextStream``) beside ``skip_special_tokens``."""
    start = time.perf_counter()
    reused = cache.reuse(prompt_ids)
    sampler = make_sampler(sampling, prompt_ids)
    stream = TextStream(
        tokenizer, skip_special_tokens=sampling.skip_special_tokens, shown=shown_tokens
    )
    text = _AnswerText(stream, sampling, stop_ids, min(max_tokens, sampling.max_new_tokens))
    first = start
    steps = generate_step(cache, prompt_ids[reused:], sampler, on_prefill)
    for count, (token, logits) in enumerate(steps, start=1):
        piece, reason = text.push(token, count)
        scored = None
        if sampling.logprobs:
            scored = log_probabilities(logits, token, sampling.top_logprobs)
        now = time.perf_counter()
        if count == 1:
            first = now
        yield TokenResponse(
            text=piece,
            token=token,
            finish_reason=reason,
            prompt_tokens=len(prompt_ids),
            reused_tokens=reused,
            generated_tokens=count,
            prefill_seconds=first - start,
            decode_seconds=now - first,
            logprob=scored[0] if scored else None,
            top_logprobs=scored[1] if scored else (),
        )
        if reason:
            return


class _AnswerText:
    """An answer's text as it may be shown, and its end."""

    def __init__(
        self, text: TextStream, args: SamplingArgs, stop_ids: Collection[int], max_tokens: int
    ) -> None:
        self._text = text
        self._strings = StopStrings(args.stop_strings)
        self._stop_ids = {*stop_ids, *args.stop_token_ids}
        self._max_tokens = max_tokens

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
