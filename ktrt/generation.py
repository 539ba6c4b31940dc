"""Generation over the model's forward: token ids in, responses with text pieces out.

Three layers: ``generate_step`` yields token ids, ``stream_generate`` adds stop ids, text and
timings; sessions build conversations on it.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol

import torch
from transformers import DynamicCache

from ktrt.config import SamplingArgs
from ktrt.decode_graph import DecodeGraphs
from ktrt.errors import ConfigError
from ktrt.kv_cache import StaticKv, makes_own_cache, unusual_layers
from ktrt.sampling import Sampler, make_sampler

# Tokens per forward of the prompt: enough for GEMMs to be at their best, and few enough that
# Ctrl-C and the attention's memory stay small.
PREFILL_CHUNK = 512
# With a GPU: what one call of the engine takes, since every forward reads all experts' weights.
GPU_PREFILL_CHUNK = 1024

FinishReason = Literal["stop", "length"]
# Makes the CUDA graphs that decode on a cache.
GraphsFor = Callable[[StaticKv], DecodeGraphs]


class Decoder(Protocol):
    """What is used of a transformers tokenizer here."""

    def decode(self, token_ids: list[int], **options: Any) -> str: ...


@dataclass(frozen=True)
class Response:
    """One step of an answer.

    ``text`` may be empty while a character is incomplete; ``finish_reason`` is set on the last one.
    ``prompt_tokens`` includes ``reused_tokens``, those found in the KV cache. ``prefill_seconds``
    ends with the first token, ``decode_seconds`` counts from there.
    """

    text: str
    token: int
    finish_reason: FinishReason | None
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float

    def summary(self) -> str:
        """Counts and speeds so far, for a log line."""
        decoded = self.generated_tokens - 1
        rate = decoded / self.decode_seconds if decoded else 0.0
        return (
            f"prompt {self.prompt_tokens} tokens ({self.reused_tokens} reused), "
            f"first token after {self.prefill_seconds:.2f} s; "
            f"{self.generated_tokens} tokens, {rate:.1f} per second, "
            f"{self.finish_reason or 'interrupted'}"
        )


class KvCache:
    """A model's KV cache together with the token ids it holds."""

    def __init__(self, model: Any, graphs: GraphsFor | None = None) -> None:
        """Without ``graphs``, and where the cache is not ``plain``, the host launches each step."""
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        # The GPU's share of the routed experts, and what graphs know of its memory.
        self._gpu: Any = getattr(model, "kt_gpu_experts", None)
        self._gpu_version = -1
        self._own_cache = makes_own_cache(model)
        self.plain = not unusual_layers(model)
        self._graphs: DecodeGraphs | None = None
        self._cache: Any = None
        if graphs is not None and self.plain:
            self._cache = StaticKv(model.config)
            self._graphs = graphs(self._cache)
        self._reset()

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps have been captured, and replays are used."""
        return self._graphs is not None and self._graphs.count > 0

    def _reset(self) -> None:
        self._ids: list[int] = []
        if self._graphs is not None:
            self._cache.reset()
        else:
            self._cache = None if self._own_cache else DynamicCache(config=self._model.config)

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Crops to what it shares with the prompt's start; returns how many tokens that is.

        The last token of the prompt is never counted: its logits are needed.
        """
        pairs = zip(self._ids, prompt_ids[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared == 0 or not self.plain:
            self._reset()
            return 0
        if shared < len(self._ids):
            self._cache.crop(shared - len(self._ids))
            del self._ids[shared:]
        return shared

    def prefill_chunk(self, remaining: int) -> int:
        """Tokens of a prompt's next forward."""
        streamed: int | None = None
        if self._gpu is not None:
            streamed = self._gpu.prefill_chunk(remaining)
        return streamed or (GPU_PREFILL_CHUNK if self._device.type == "cuda" else PREFILL_CHUNK)

    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Runs the model on the next ``ids``; returns the last position's logits [vocab_size]."""
        held, self._ids = self._ids, []
        if self._graphs is None:
            logits = self._plain_forward(ids)
        else:
            logits = self._graph_forward(self._graphs, held, ids)
        # Only now: after an exception, Ctrl-C included, the layers may differ in length, and no ids
        # make the next `reuse` start anew.
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
        if found is not None:
            self._cache.set_length(len(held) + 1)
            return found[0]
        logits = self._plain_forward(ids)
        if not graphs.prepare(ids, [len(held)], logits.unsqueeze(0)):
            # It may have stored anything anywhere.
            self._cache.reset()
            everything = [*held, *ids]
            for start in range(0, len(everything), PREFILL_CHUNK):
                logits = self._plain_forward(everything[start : start + PREFILL_CHUNK])
        return logits

    def _plain_forward(self, ids: Sequence[int]) -> torch.Tensor:
        inputs = torch.tensor([list(ids)], device=self._device)
        with torch.inference_mode():
            output = self._model(
                input_ids=inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        if self._cache is None:
            self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[0, -1]
        return logits


class TextStream:
    """Token ids in, text out, never half a character.

    Bytes of a character still incomplete decode to a trailing U+FFFD, which is held back. Only a
    window of the last tokens is decoded, so a token's cost does not grow with the answer.
    """

    _WINDOW = 32
    _CONTEXT = 8

    def __init__(self, tokenizer: Decoder, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is complete now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = text.endswith("\ufffd")
        piece = text[self._shown : len(text) - held]
        self._shown += len(piece)
        if len(self._ids) > self._WINDOW:
            # A character has four bytes at most: behind so many tokens, the next ones read as they
            # do behind all. Special tokens that are skipped hold none, hence the condition.
            context = self._decode(self._ids[-self._CONTEXT :])
            if context:
                del self._ids[: -self._CONTEXT]
                self._shown = len(context) - held
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )


def generate_step(cache: KvCache, ids: Sequence[int], sampler: Sampler) -> Iterator[int]:
    """Token ids without end. ``ids``: the part of the prompt that ``cache`` does not hold yet."""
    pending = list(ids)
    while cache.plain and len(pending) > (chunk := cache.prefill_chunk(len(pending))):
        cache.forward(pending[:chunk])
        del pending[:chunk]
    while True:
        token = sampler(cache.forward(pending))
        yield token
        pending = [token]


def check_prompt(model: Any, prompt_ids: Sequence[int]) -> int:
    """How many tokens can follow the prompt.

    ``ConfigError``: the prompt leaves no room in the model's context, or holds ids without an
    embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if max(prompt_ids) >= rows:
        raise ConfigError(
            f"the prompt holds token id {max(prompt_ids)}, the model has {rows} embeddings: this "
            "tokenizer does not belong to this model"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return sys.maxsize
    if len(prompt_ids) >= limit:
        raise ConfigError(
            f"the conversation has {len(prompt_ids)} tokens, the model's context holds {limit}: "
            "shorten it, or start anew"
        )
    return int(limit) - len(prompt_ids)


def stream_generate(
    tokenizer: Decoder,
    cache: KvCache,
    prompt_ids: Sequence[int],
    sampling: SamplingArgs,
    *,
    stop_ids: Collection[int],
    max_tokens: int,
) -> Iterator[Response]:
    """The answer to ``prompt_ids``, a response per token; a stop id's text is not part of it."""
    start = time.perf_counter()
    reused = cache.reuse(prompt_ids)
    sampler = make_sampler(sampling, prompt_ids)
    text = TextStream(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
    first = start
    for count, token in enumerate(generate_step(cache, prompt_ids[reused:], sampler), start=1):
        now = time.perf_counter()
        if count == 1:
            first = now
        reason: FinishReason | None = "length" if count == max_tokens else None
        if token in stop_ids:
            reason = "stop"
        yield Response(
            text="" if reason == "stop" else text.push(token),
            token=token,
            finish_reason=reason,
            prompt_tokens=len(prompt_ids),
            reused_tokens=reused,
            generated_tokens=count,
            prefill_seconds=first - start,
            decode_seconds=now - first,
        )
        if reason:
            return
