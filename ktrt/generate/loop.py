"""Generation over the model's forward: token ids in, responses with text pieces out.

Three layers: ``generate_step`` yields token ids, ``stream_generate`` adds stop ids, text and
timings; sessions build conversations on it.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import torch
from transformers import DynamicCache

from ktrt.config import SamplingArgs
from ktrt.errors import ConfigError
from ktrt.generate.graphs import DecodeGraphs
from ktrt.generate.response import FinishReason, TokenResponse
from ktrt.generate.sampling import Sampler, log_probabilities, make_sampler
from ktrt.generate.text_stream import Decoder, StopStrings, TextStream
from ktrt.kv.snapshots import (
    Mark,
    continues,
    crop,
    needs_marks,
)
from ktrt.kv.static import (
    StaticKv,
    cache_argument,
    makes_own_cache,
    unusual_layers,
)

# Tokens per forward of the prompt: enough for GEMMs to be at their best, and few enough that
# Ctrl-C and the attention's memory stay small.
PREFILL_CHUNK = 512
# With a GPU: what one call of the engine takes, since every forward reads all experts' weights.
GPU_PREFILL_CHUNK = 1024
# Places to go back to that a cache with windows or states keeps: three for each of two turns.
_MOST_MARKS = 6

# Makes the CUDA graphs that decode on a cache.
GraphsFor = Callable[[StaticKv], DecodeGraphs]
# Told how many of how many new prompt tokens are done: 0 first, then after each forward.
OnPrefill = Callable[[int, int], None]


class KvCache:
    """A model's KV cache together with the token ids it holds."""

    def __init__(self, model: Any, graphs: GraphsFor | None = None) -> None:
        """Without ``graphs``, and where the cache is not ``plain``, the host launches each step."""
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        # The GPU's share of the routed experts, and what graphs know of its memory.
        self._gpu: Any = getattr(model, "kt_gpu_experts", None)
        self._gpu_version = -1
        self._intact = True
        self._own_cache = makes_own_cache(model)
        self._argument = cache_argument(model)
        self.plain = not unusual_layers(model)
        # Whether several tokens at once can follow what is held.
        self.continues = continues(model)
        self._graphs: DecodeGraphs | None = None
        # Of the last plain forward; the first tokens of a prompt always are one.
        self._logits = torch.empty(0)
        self._cache: Any = None
        if graphs is not None and self.plain:
            self._cache = StaticKv(model.config)
            self._graphs = graphs(self._cache)
        self._reset()

    @property
    def length(self) -> int:
        """How many tokens are held."""
        return len(self._ids)

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps have been captured, and replays are used."""
        return self._graphs is not None and self._graphs.count > 0

    def capture_ahead(self, length: int) -> None:
        """Captures the decode steps for up to ``length`` positions, after a decode step whose graph
        was compared with the plain forward's; nothing where there are no graphs."""
        if self._graphs is not None and self.has_graphs:
            self._graphs.capture_up_to(min(length, self._cache.capacity))

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._marks: list[Mark] = []
        if self._graphs is not None:
            self._cache.reset()
        else:
            self._cache = None if self._own_cache else DynamicCache(config=self.model.config)

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Goes back to what it shares with the prompt's start, or as near as the cache's kind
        allows; returns how many tokens it then holds.

        The last token of the prompt is never counted: its logits are needed.
        """
        pairs = zip(self._ids, prompt_ids[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared == 0 or not self.continues:
            self._reset()
        elif shared < len(self._ids):
            self._go_back(self._ids, shared)
        self.mark()
        return len(self._ids)

    def mark(self, *, replace: bool = False) -> None:
        """Makes what is held now a place to go back to, where cropping may not get there;
        ``replace``: instead of the latest such place."""
        if not self._ids or not self.continues or not needs_marks(self._cache):
            return
        if replace and self._marks:
            self._marks.pop()
        if all(mark.length != len(self._ids) for mark in self._marks):
            self._marks = [*self._marks[1 - _MOST_MARKS :], Mark.of(self._cache, len(self._ids))]

    def _go_back(self, ids: Sequence[int], length: int) -> None:
        """Brings the cache, which held ``ids`` and perhaps the beginnings of more, to ``length`` of
        them or fewer."""
        self._ids = []  # an exception in here leaves nothing that is trusted
        marks = [mark for mark in self._marks if mark.length <= length]
        if not crop(self._cache, length):
            length = marks[-1].length if marks else 0
            if not marks or not marks[-1].restore(self._cache):
                self._reset()
                return
        self._marks = marks
        self._ids = list(ids[:length])

    def prefill_chunk(self, remaining: int) -> int:
        """Tokens of a prompt's next forward."""
        streamed: int | None = None
        if self._gpu is not None:
            streamed = self._gpu.prefill_chunk(remaining)
        return streamed or (GPU_PREFILL_CHUNK if self.device.type == "cuda" else PREFILL_CHUNK)

    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Runs the model on the next ``ids``; returns the last position's logits [vocab_size]."""
        held, self._ids = self._ids, []
        self._intact = True
        try:
            if self._graphs is None:
                logits = self._plain_forward(ids)
            else:
                logits = self._graph_forward(self._graphs, held, ids)
        except KeyboardInterrupt:
            # Some layers hold the new tokens by now and others do not.
            if self._intact and self._cache is not None:
                with suppress(Exception):
                    self._go_back(held, len(held))
            raise
        # Only now: after any other exception nothing is trusted, and no ids make the next `reuse`
        # start anew.
        held.extend(ids)
        self._ids = held
        return logits

    def _graph_forward(
        self, graphs: DecodeGraphs, held: Sequence[int], ids: Sequence[int]
    ) -> torch.Tensor:
        moved = self._cache.reserve(len(held) + len(ids))
        if self._gpu is not None:
            self._gpu.refresh()
            moved |= self._gpu.version != self._gpu_version
            self._gpu_version = self._gpu.version
        if moved:
            graphs.clear()
        if len(ids) > 1:
            return self._plain_forward(ids)
        found = graphs.step(ids, [len(held)])
        if found is None:
            found = graphs.capture(ids, [len(held)], self._logits)
        if found is not None:
            self._cache.set_length(len(held) + 1)
            return found[0]
        logits = self._plain_forward(ids)
        self._intact = False
        if not graphs.prepare(ids, [len(held)], logits.unsqueeze(0)):
            # It may have stored anything anywhere.
            self._cache.reset()
            everything = [*held, *ids]
            for start in range(0, len(everything), PREFILL_CHUNK):
                logits = self._plain_forward(everything[start : start + PREFILL_CHUNK])
        return logits

    def _plain_forward(self, ids: Sequence[int]) -> torch.Tensor:
        inputs = torch.tensor([list(ids)], device=self.device)
        with torch.inference_mode():
            held = {self._argument: self._cache}
            output = self.model(input_ids=inputs, use_cache=True, logits_to_keep=1, **held)
        if self._cache is None:
            self._cache = getattr(output, self._argument)
        self._logits = output.logits[0, -1]
        return self._logits


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
