"""Measures for ``ktrt.bench``: a loaded session's phases, compared with the machine's limits."""

from __future__ import annotations

import random
import resource
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.formats import format_named
from ktrt.engine.probes import (
    BandwidthProbe,
    arithmetic_peaks,
    gpu_rates,
    peak_of,
)
from ktrt.engine.threads import num_threads
from ktrt.experts import KTExperts
from ktrt.generate.loop import generate_step
from ktrt.loading.inventory import loaded_inventory
from ktrt.loading.work import ModelWork
from ktrt.machine.memory import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ktrt.config import ExpertArgs
    from ktrt.engine import MoeLayer
    from ktrt.experts import ExpertsSpec
    from ktrt.session import Session

Row = dict[str, Any]
# Number of words in a conversation's first and second message.
_LONG, _SHORT = 256, 8
# Steps that warm up and, on a GPU, capture the graph of a decode step.
_WARM_UP = 3


class Bench:
    """Measures one loaded session. With an adapter, each phase runs with and without it by turns;
    a read of the memory before and after each run gives its limit."""

    def __init__(self, session: Session, experts: ExpertArgs, specs: Sequence[ExpertsSpec]) -> None:
        """``specs`` describe the routed experts. Times with an adapter are also compared with the
        limits of the base model."""
        self._session = session
        session.adapters.off()
        inventory = loaded_inventory(session.model, specs)
        self._work = work = ModelWork(inventory)
        # Only what was loaded is in there.
        self._kt_backend = next(iter(inventory.experts))
        session.adapters.on()
        model: Any = session.model
        self._model = model
        self._threads = num_threads(experts.kt_num_threads)
        self._probe = BandwidthProbe(self._threads)
        self._states = (True, False) if session.adapters.names else (False,)
        peaks = arithmetic_peaks(self._threads)
        self._expert_peak = peak_of(format_named(self._layer().weight_format), peaks)
        self._other_peak = peak_of(format_named(work.other_format), peaks)
        self._gpu = gpu_rates()
        self._vocab = min(model.get_input_embeddings().weight.shape[0], len(session.tokenizer))

    @property
    def context(self) -> int:
        """Length of the model's context in tokens."""
        config = self._model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 20)

    def _layer(self) -> MoeLayer:
        """The last layer: of a model whose layers differ, the first ones are plain."""
        return [m.layer for m in self._model.modules() if isinstance(m, KTExperts)][-1]

    def close(self) -> None:
        """Stops the threads of the probe; the session stays."""
        self._probe.close()

    def settings(self) -> Row:
        """Returns the kernels and threads that ran, and the measured limits."""
        return {
            "kt_backend": self._kt_backend,
            "threads": self._threads,
            "torch_threads": torch.get_num_threads(),
            "kernels": self._layer().last_kernels(),
            "gpu": self._gpu.name if self._gpu else None,
            "arithmetic_peak": self._expert_peak.all_threads if self._expert_peak else None,
        }

    def phases(
        self, prefill: Sequence[int], decode: int, decode_prompt: int, rounds: int
    ) -> list[Row]:
        """Returns a row per phase and adapter state, with medians over the rounds."""
        adapters = self._session.adapters
        cases = [("prefill", size) for size in prefill] + [("decode", decode)]
        samples: dict[tuple[str, int, bool], list[tuple[float, float]]] = {}
        self._times("decode", _WARM_UP, decode_prompt, 0)
        for number in range(rounds):
            for phase, size in cases:
                for adapter in self._states if number % 2 else self._states[::-1]:
                    (adapters.on if adapter else adapters.off)()
                    rates = [self._probe.rate()]
                    seconds = self._times(phase, size, decode_prompt, number)
                    rates.append(self._probe.rate())
                    pair = (seconds, statistics.mean(rates))
                    samples.setdefault((phase, size, adapter), []).append(pair)
        adapters.on()
        return [self._row(phase, size, adapter, samples) for phase, size, adapter in samples]

    def _times(self, phase: str, size: int, decode_prompt: int, seed: int) -> float:
        """Returns the seconds from a prompt of ``size`` tokens to its first token, or the seconds
        per token of ``size`` decoded ones."""
        draw = random.Random(seed)
        length = size if phase == "prefill" else decode_prompt
        ids = [draw.randrange(self._vocab) for _ in range(length)]
        cache = self._session.new_cache()
        steps = generate_step(cache, ids, lambda _: draw.randrange(self._vocab))
        start = time.perf_counter()
        next(steps)
        self._wait_for_gpu()
        if phase == "prefill":
            return time.perf_counter() - start
        warm = min(_WARM_UP, size - 1) if self._gpu else 0
        for _ in range(warm):
            next(steps)
        self._wait_for_gpu()
        start = time.perf_counter()
        for _ in range(size - warm):
            next(steps)
        self._wait_for_gpu()
        return (time.perf_counter() - start) / (size - warm)

    def _wait_for_gpu(self) -> None:
        if self._gpu is not None:
            torch.cuda.synchronize()

    def _row(
        self,
        phase: str,
        size: int,
        adapter: bool,
        samples: dict[tuple[str, int, bool], list[tuple[float, float]]],
    ) -> Row:
        pairs = samples[phase, size, adapter]
        seconds = statistics.median(each for each, _ in pairs)
        row: Row = {"phase": phase, "tokens": size, "adapter": adapter, "seconds": seconds}
        row["tokens_per_s"] = (size if phase == "prefill" else 1) / seconds
        row["samples"] = [each for each, _ in pairs]
        row["read_bandwidth"] = statistics.median(rate for _, rate in pairs)
        row["of_limit"] = None
        limits = [self._limit(phase, size, rate) for _, rate in pairs]
        if None not in limits:
            shares = [limit / each for limit, (each, _) in zip(limits, pairs, strict=True) if limit]
            row["of_limit"] = statistics.median(shares)
        row["adapter_cost"] = None
        base = samples.get((phase, size, False))
        if adapter and base:
            ratios = [with_it[0] / one[0] for with_it, one in zip(pairs, base, strict=True)]
            row["adapter_cost"] = statistics.median(ratios) - 1
        return row

    def _limit(self, phase: str, size: int, rate: float) -> float | None:
        """Returns the lower bound in seconds from the base model's bytes and multiplications."""
        gpu_rate = self._gpu.read if self._gpu else None
        if phase == "decode":
            return self._work.decode_seconds(self._kt_backend, rate, gpu_rate)
        if self._expert_peak is None:
            return None
        others = None if self._gpu else self._other_peak
        return self._work.prefill_seconds(
            self._kt_backend, size, rate, self._expert_peak.all_threads,
            others.all_threads if others else None,
        )  # fmt: skip

    def first_token(self, rounds: int) -> Row:
        """Returns the seconds to the first token of a conversation's first turn, with an empty
        cache, and of its short second turn, which reuses the first."""
        self._session.adapters.on()
        turns: list[list[Any]] = [[], []]
        for number in range(rounds):
            messages: list[dict[str, str]] = []
            for turn, answers in enumerate(turns):
                count = _SHORT if turn else min(_LONG, self.context // 8)
                text = " ".join(_words(number, turn, count))
                messages.append({"role": "user", "content": text})
                responses = list(
                    self._session.stream_responses(messages, do_sample=False, max_new_tokens=4)
                )
                answers.append(responses[-1])
                content = "".join(each.text for each in responses).strip() or "ok"
                messages.append({"role": "assistant", "content": content})
        return {
            name: {
                "seconds": statistics.median(each.prefill_seconds for each in answers),
                "prompt_tokens": answers[-1].prompt_tokens,
                "reused_tokens": answers[-1].reused_tokens,
            }
            for name, answers in zip(("cold", "reuse"), turns, strict=True)
        }

    def memory(self) -> Row:
        """Returns the resident bytes, their peak, and the GPU's."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resident = resident_bytes()
        # The kernel updates the peak at intervals.
        found: Row = {"resident": resident, "peak_resident": max(peak, resident), "gpu_peak": None}
        if self._gpu is not None:
            found["gpu_peak"] = torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            found["gpu_used"] = total - free
        return found


def _words(number: int, turn: int, count: int) -> Iterator[str]:
    """Yields words; no two prompts begin with the same text."""
    draw = random.Random(f"{number} {turn}")
    for _ in range(count):
        yield draw.choice(("river", "stone", "seven", "light", "paper", "green", "north", "music"))
