"""When streaming experts to the GPU beats computing them on the CPU: by measurement."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ktrt.experts.gpu.residents import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import MoeLayer
    from ktrt.experts.gpu.residents import GpuExperts, GpuLayer

logger = logging.getLogger(__name__)

# Streaming must win by this much: measurements of one layer are not exact.
_MARGIN = 1.1
_STEP = 32
_GPU_TOKENS = (256, 4096)


@dataclass(frozen=True)
class Line:
    """Seconds that one layer takes, by two measurements (tokens, seconds)."""

    few: tuple[int, float]
    many: tuple[int, float]

    def seconds(self, tokens: int) -> float:
        """On the line through both, never below the first: a copy does not get shorter."""
        (x0, y0), (x1, y1) = self.few, self.many
        return y0 + max(0.0, (y1 - y0) / (x1 - x0)) * max(0, tokens - x0)


def streaming_threshold(cpu: Line, gpu: Line, max_qlen: int) -> int:
    """The fewest tokens of a forward from which streaming is faster; 0 if it never is.

    ``cpu``: of one engine call, at most ``max_qlen`` tokens; longer forwards are several.
    """
    for tokens in range(_STEP, BLOCK_TOKENS + 1, _STEP):
        calls, rest = divmod(tokens, max_qlen)
        seconds = calls * cpu.seconds(max_qlen) + (cpu.seconds(rest) if rest else 0.0)
        if gpu.seconds(tokens) * _MARGIN < seconds:
            return tokens
    return 0


def measure_engine(layer: MoeLayer, max_qlen: int) -> Line:
    """The engine's time on this layer, random tokens and routing."""
    few, many = max(1, max_qlen // 8), max_qlen

    def seconds(tokens: int) -> float:
        states, ids, weights = _sample(layer, tokens, torch.device("cpu"))
        out = torch.empty_like(states)
        return _best(lambda: layer.forward(states, ids, weights, out), lambda: None)

    return Line((few, seconds(few)), (many, seconds(many)))


def measure_gpu(experts: GpuExperts, gpu: GpuLayer, layer: MoeLayer) -> Line:
    """The time of streaming this layer, copies included."""
    device = experts.device

    def seconds(tokens: int) -> float:
        states, ids, weights = _sample(layer, tokens, device)

        def forget() -> None:
            experts.stream.reset()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        def run() -> None:
            gpu.forward_streamed(states, ids, weights)
            # Not for what is copied ahead.
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        return _best(run, forget)

    few, many = _GPU_TOKENS
    return Line((few, seconds(few)), (many, seconds(many)))


def _sample(
    layer: MoeLayer, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, layer.hidden_size, generator=generator)
    scores = torch.rand(tokens, layer.num_experts, generator=generator)
    ids = scores.topk(layer.top_k).indices
    weights = torch.full((tokens, layer.top_k), 1 / layer.top_k)
    return states.to(device, torch.bfloat16), ids.to(device), weights.to(device)


def _best(run: Callable[[], None], prepare: Callable[[], None]) -> float:
    """Seconds of the fastest of three runs, the first of which warms up."""
    times = []
    for _ in range(3):
        prepare()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
