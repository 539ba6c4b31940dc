"""A loaded model with many conversations at once, for bench/batch_curve.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from cpu_decode import model_settings

from ktrt.config import load_config
from ktrt.engine.formats import format_named
from ktrt.engine.probes import peak_of
from ktrt.engine.step_rows import BASE
from ktrt.experts import KTExperts
from ktrt.generate.step import Span, Step
from ktrt.loading.inventory import BASE as BASE_ROWS
from ktrt.loading.inventory import EMBEDDINGS, TABLES, loaded_inventory
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ktrt.engine import MoeLayer
    from ktrt.engine.probes import ArithmeticPeak

# The pool counts whole pages.
_MANY_TOKENS = 1 << 16


class CountedLayer:
    """The engine's layer, which also keeps the expert ids of its last forward.

    Recorded steps run a bound forward, without the module: its arrays stay where they are.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self._layer = layer
        self._index = torch.empty(0, dtype=torch.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def forward(self, states: Any, index: torch.Tensor, *rest: Any) -> None:
        self._index = index
        self._layer.forward(states, index, *rest)

    def bind(self, states: Any, index: torch.Tensor, *rest: Any) -> Any:
        return _CountedForward(self, index, self._layer.bind(states, index, *rest))

    def last(self, index: torch.Tensor) -> None:
        self._index = index

    @property
    def distinct(self) -> int:
        """The number of experts that the last forward read."""
        return int(self._index[self._index >= 0].unique().numel())

    @property
    def bytes_read(self) -> float:
        return self.distinct * self._layer.packed_bytes / self._layer.num_experts


class _CountedForward:
    def __init__(self, layer: CountedLayer, index: torch.Tensor, bound: Any) -> None:
        self._layer, self._index, self._bound = layer, index, bound

    def run(self) -> None:
        self._layer.last(self._index)
        self._bound.run()


class Rows:
    """A loaded model, and conversations of ``context`` tokens, each in its own slot."""

    def __init__(
        self, model: Path, backend: str, adapters: Mapping[str, Path], **settings: object
    ) -> None:
        values = model_settings(model, backend) | settings
        if adapters:
            values["adapters"] = {name: str(path) for name, path in adapters.items()}
        config = load_config(values)
        self.loaded = load_model(config.model, config.adapter, config.experts)
        self.runner = self.loaded.runner
        self._layers = [
            CountedLayer(module.layer)
            for module in self.loaded.model.modules()
            if isinstance(module, KTExperts)
        ]
        counted = iter(self._layers)
        for module in self.loaded.model.modules():
            if isinstance(module, KTExperts):
                module._layer = next(counted)  # type: ignore[assignment]
        inventory = loaded_inventory(self.loaded.model)
        # A row of the embeddings for each conversation, everything else once.
        self._each = inventory.read(TABLES, EMBEDDINGS)
        self._others = inventory.read(*BASE_ROWS) - self._each
        self._vocabulary = int(self.loaded.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._random = torch.Generator().manual_seed(1)
        self._prompts: list[list[int]] = []
        self._slots: list[Any] = []

    def number(self, adapter: str | None) -> int:
        """Returns the engine's number of an adapter; None: the base."""
        return BASE if adapter is None else self.loaded.adapters.number(adapter)

    def tokens(self, count: int) -> list[int]:
        return torch.randint(10, self._vocabulary, (count,), generator=self._random).tolist()

    def open(self, count: int, context: int) -> None:
        """Gives ``count`` conversations of ``context`` tokens a slot. Their prompts are computed
        once, with the base model: what the cache holds does not change the time of a step."""
        while len(self._prompts) < count:
            self._prompts.append(self.tokens(context))
        pool = self.runner.pool
        for slot in self._slots:
            pool.close(slot)
        self._slots = []
        for row, prompt in enumerate(self._prompts[:count]):
            slot = pool.open(("bench", row), prompt)
            self._slots.append(slot)
            while slot.length < len(prompt):
                left = len(prompt) - slot.length
                part = prompt[slot.length :][: self.runner.prefill_chunk(left)]
                self.runner.run(Step((Span(slot=slot, ids=part, adapter=BASE),)))

    def seconds(self, steps: Sequence[Sequence[int]], adapters: Sequence[int]) -> float:
        """Returns seconds per step of one token for each conversation."""
        begin = time.perf_counter()
        for ids in steps:
            rows = zip(self._slots, ids, adapters, strict=True)
            self.runner.run(Step(tuple(Span(slot=slot, ids=[i], adapter=a) for slot, i, a in rows)))
        return (time.perf_counter() - begin) / len(steps)

    @property
    def distinct(self) -> float:
        """Distinct experts of a layer in the last step, on average."""
        return sum(layer.distinct for layer in self._layers) / len(self._layers)

    @property
    def bytes_read(self) -> float:
        """Bytes that the last step had to read, without LoRA."""
        return sum(size for size, _ in self.parts([]))

    def parts(self, peaks: list[ArithmeticPeak]) -> list[tuple[float, float]]:
        """Returns, for each part of the last step, the bytes that it had to read and the seconds
        that its rows' multiplications take at the arithmetic peaks: dense layers in BF16, experts
        in their format, and the KV cache, whose attention is not counted."""
        of_format = format_named(self._layers[0].weight_format)
        dense, experts = peak_of(format_named("bf16"), peaks), peak_of(of_format, peaks)
        rows = len(self._slots)
        each = sum(
            3 * layer.top_k * layer.hidden_size * layer.intermediate_size for layer in self._layers
        )
        held = sum(slot.length for slot in self._slots)
        cache: float = held * self.runner.pool.bytes_of(_MANY_TOKENS) / _MANY_TOKENS
        return [
            (
                self._others + rows * self._each,
                0.0 if dense is None else rows * self._others / dense.all_threads,
            ),
            (
                sum(layer.bytes_read for layer in self._layers),
                0.0 if experts is None else 2 * rows * each / experts.all_threads,
            ),
            (cache, 0.0),
        ]

    def close(self) -> None:
        self.loaded.close()
