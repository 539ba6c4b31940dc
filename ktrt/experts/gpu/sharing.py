"""CPU and GPU share the experts of a prompt's layer: the ones with the most tokens go over the bus,
which costs their bytes whatever they compute; the engine computes the others meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ktrt.utils.pinned import on_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from ktrt.engine import MoeLayer
    from ktrt.experts.gpu.blocks import Call

# Share of the streamed experts that are copied ahead, before the router has chosen: about what the
# bus moves during attention and router.
_LEAD = 0.25
# Sharing must win by this much.
MARGIN = 1.1
# Pieces of a layer's streamed experts: the last one's computation is waited for.
_PIECES = 4


@dataclass(frozen=True)
class Rates:
    """Seconds that were measured on one layer with ``experts`` experts and ``top_k`` of them a
    token: ``copied``, to stream an expert; of a forward of the engine, for each of its tokens,
    experts and rows, a token's sums included that come back over the bus; ``other``, of a shared
    layer in addition. ``most_tokens`` of one forward."""

    experts: int
    top_k: int
    copied: float
    token: float
    expert: float
    row: float
    most_tokens: int
    other: float = 0.0

    def engine(self, tokens: int, experts: int, rows: float) -> float:
        """Seconds of the engine's share."""
        if not experts:
            return 0.0
        return tokens * self.token + experts * self.expert + rows * self.row

    def even(self, tokens: int) -> tuple[float, int]:
        """Seconds of a shared layer whose experts have the same number of rows, and how many of
        them are streamed so that both ends finish together."""
        rows = tokens * self.top_k / self.experts

        def seconds(streamed: int) -> float:
            left = self.experts - streamed
            return max(streamed * self.copied, self.engine(tokens, left, left * rows))

        return min((seconds(streamed) + self.other, streamed) for streamed in range(self.experts))

    def split(self, tokens: int, rows: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """The ``candidates`` to stream, most rows first; the engine computes the others. What was
        copied ahead has arrived by now."""
        order = [expert for expert in candidates if rows[expert]]
        order.sort(key=lambda expert: (-rows[expert], expert))
        left, count = sum(rows[expert] for expert in order), 0
        best = (self.engine(tokens, len(order), left), 0)
        for expert in order:
            left, count = left - rows[expert], count + 1
            engine = self.engine(tokens, len(order) - count, left)
            best = min(best, (max(count * self.copied, engine), count))
        return order[: best[1]]


@dataclass(frozen=True)
class Lead:
    """Experts of a layer that are copied before the router has chosen, and of a piece."""

    experts: int
    piece: int


@lru_cache(maxsize=64)
def lead_of(rates: Rates, tokens: int) -> Lead | None:
    """What is copied ahead for a prompt of ``tokens``; None where streaming all experts is as
    fast."""
    if tokens > rates.most_tokens:
        return None
    seconds, streamed = rates.even(tokens)
    if seconds * MARGIN > rates.experts * rates.copied:
        return None
    return Lead(int(streamed * _LEAD), max(1, -(-streamed // _PIECES)))


class EngineShare:
    """The engine's share of one layer at a time, on a thread of its own."""

    def __init__(self, layers: Sequence[MoeLayer], device: torch.device, most_tokens: int) -> None:
        """Memory for ``most_tokens`` is pinned on the host when it is first needed."""
        self._device, self._most = device, most_tokens
        self._hidden = max(layer.hidden_size for layer in layers)
        self._top_k = max(layer.top_k for layer in layers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine's share")
        self._running: Future[None] | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._stream: Any = None

    def start(
        self, layer: MoeLayer, calls: Sequence[Call], ids: torch.Tensor
    ) -> Callable[[torch.Tensor], None]:
        """Starts the experts ``ids`` [tokens, k] (-1: none) of all calls; returns what adds their
        sums to a float32 tensor [tokens, hidden_size] on the device, and waits for them."""
        self.join()
        adapters = [call.adapters for call in calls if call.adapters is not None]
        arrays = {
            "states": torch.cat([call.states for call in calls]).float(),
            "ids": ids,
            "weights": torch.cat([call.weights for call in calls]).float(),
        }
        if adapters:
            arrays["adapters"] = torch.cat(adapters).to(torch.int32)
        taken, arrived = self._copy(arrays)
        out = self._array("out", arrays["states"].shape, torch.float32)
        chosen = [taken["adapters"]] if adapters else []
        begins = threading.Event()

        def compute() -> None:
            begins.set()
            layer.forward(taken["states"], taken["ids"], taken["weights"], out, *chosen)

        if arrived is not None:
            arrived.synchronize()
        running = self._running = self._thread.submit(compute)
        # While this thread issues work for the GPU, the other one would get Python's lock only
        # every 5 ms (``sys.getswitchinterval``).
        begins.wait()

        def add(total: torch.Tensor) -> None:
            running.result()
            # A copy would wait behind all the experts that are on their way.
            total += on_device(out, self._device)

        return add

    def join(self) -> None:
        """Waits for an interrupted forward's share, whose result nobody wants."""
        running, self._running = self._running, None
        if running is not None:
            running.exception()

    def close(self) -> None:
        """Waits for the engine; frees the memory."""
        self.join()
        self._thread.shutdown()
        self._host.clear()

    def _copy(self, arrays: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """The arrays on the host, and the event of their arrival."""
        taken = {name: self._array(name, a.shape, a.dtype) for name, a in arrays.items()}
        if self._device.type != "cuda":
            for name, array in arrays.items():
                taken[name].copy_(array)
            return taken, None
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, array in arrays.items():
                taken[name].copy_(array, non_blocking=True)
                array.record_stream(self._stream)
            return taken, self._stream.record_event()

    @torch.inference_mode(mode=False)
    def _array(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The first rows of a host array that stays."""
        if name not in self._host:
            wide = {"states": self._hidden, "out": self._hidden, "adapters": 1}
            self._host[name] = torch.empty(
                self._most * wide.get(name, self._top_k), dtype=dtype,
                pin_memory=self._device.type == "cuda",
            )  # fmt: skip
        count = 1
        for size in shape:
            count *= size
        return self._host[name][:count].view(*shape)
