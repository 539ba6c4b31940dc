"""The generation loop: token ids in, responses with pieces of text out.

Three layers: ``generate_step`` yields token ids, ``stream_generate`` adds stop ids, text and
timings, and sessions build conversations on both. The model itself runs in ``generate.runner``.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

from ktrt.config import SamplingArgs
from ktrt.generate.answer import Answer
from ktrt.generate.response import TokenResponse
from ktrt.generate.runner import KvCache
from ktrt.generate.sampling import Sampler
from ktrt.generate.text_stream import Decoder

# Called with (done, total) of the new prompt tokens: 0 done first, then after each forward.
OnPrefill = Callable[[int, int], None]


def generate_step(
    cache: KvCache, ids: Sequence[int], sampler: Sampler, on_prefill: OnPrefill | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields token ids without end, each with the logits [vocab_size] it was chosen from.

    ``ids``: the part of the prompt that ``cache`` does not hold yet. An exception of ``on_prefill``
    ends the prefill between two forwards; the tokens so far stay in the cache.
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
    """Yields the answer to ``prompt_ids``, a response per token, without the text of a stop id or
    stop string. ``stop_ids`` and ``max_tokens`` apply in addition to those in ``sampling``;
    ``shown_tokens`` are shown despite ``skip_special_tokens`` (see ``TextStream``)."""
    answer = Answer(
        tokenizer, prompt_ids, sampling,
        stop_ids=stop_ids, max_tokens=max_tokens, shown_tokens=shown_tokens,
    )  # fmt: skip
    reused = cache.reuse(prompt_ids)
    answer.begin(reused)
    for token, logits in generate_step(cache, prompt_ids[reused:], answer.sampler, on_prefill):
        response = answer.push(token, logits)
        yield response
        if response.finish_reason:
            return
