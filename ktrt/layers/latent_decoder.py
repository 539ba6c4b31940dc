"""Single tokens of latent attention on the CPU: on the latents as they lie, in the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine import LatentAttention
from ktrt.layers.engine_attention import head_array, slot_array, slot_rows
from ktrt.layers.forward import DenseForward, LoraForward

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder
    from ktrt.engine.step_rows import StepRows

# Arguments of some models that change an attention's result.
_UNUSUAL = ("s_aux", "softcap", "sliding_window", "position_bias", "cache")


class LatentDecoder:
    """One layer's kv_b_proj [heads · (nope + v), kv_lora_rank] as its halves."""

    def __init__(self, module: Any, engine: Engine) -> None:
        forward: DenseForward = module.kv_b_proj.forward
        self._module = module
        self.heads = int(module.num_heads)
        self.nope, self.value = int(module.qk_nope_head_dim), int(module.v_head_dim)
        self.rank = forward.base.in_features
        weight = forward.base.weight.detach().view(self.heads, -1, self.rank)
        self._address = forward.base.weight.data_ptr()
        # U of every head, transposed: each of the products below is then one of rows of a weight.
        self._keys = weight[:, : self.nope].transpose(1, 2).reshape(-1, self.nope).contiguous()
        self._values = weight[:, self.nope :].reshape(-1, self.rank).contiguous()
        self._engine, self._steps = engine, dict[float, _Step]()

    @property
    def _projection(self) -> DenseForward | None:
        """The present one: adapters that are loaded later put PEFT's layer in its place."""
        forward = self._module.kv_b_proj.__dict__.get("forward")
        return forward if isinstance(forward, DenseForward) else None

    def takes(self, query: torch.Tensor, mask: torch.Tensor | None, options: Any) -> bool:
        """Whether this is one token's query, over all latents and of the present kv_b_proj."""
        return (
            query.shape[0] == 1
            and query.shape[2] == 1
            and mask is None
            and self.takes_rows(query)
            and not any(options.get(name) is not None for name in _UNUSUAL)
        )

    def takes_rows(self, query: torch.Tensor) -> bool:
        """Whether the engine computes queries of this kind."""
        projection = self._projection
        if projection is not None:
            projection.follow()
        return (
            query.dtype == torch.bfloat16
            and query.stride(-1) == 1
            and projection is not None
            and self._holds(projection)
            and projection.usual
            and not torch.is_grad_enabled()
        )

    def decode(
        self, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """query [1, heads, 1, nope + rope], latents [1, 1, L, rank], positions [1, 1, L, rope];
        returns [1, 1, heads, v]."""
        out = query.new_empty(1, 1, self.heads, self.value)
        places = latents[0, 0], positions[0, 0], out[0, 0]
        self.bind(query.view(self.heads, -1), *places, scaling)(latents.shape[2])
        return out

    def record(
        self,
        recorder: Recorder,
        length: Callable[[], int],
        query: torch.Tensor,
        latents: torch.Tensor,
        positions: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """``decode`` over as many tokens as ``length`` says whenever the step runs."""

        def bind(out: torch.Tensor) -> Callable[[], None]:
            step = self.bind(
                query.view(self.heads, -1), latents[0, 0], positions[0, 0], out[0, 0], scaling
            )
            return lambda: step(length())

        shape = 1, 1, self.heads, self.value
        return recorder.call(shape, (query, latents, positions), bind)

    def bind(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        scaling: float,
    ) -> Callable[[int], None]:
        """A function of ``length``, which fills ``out`` [heads, v], contiguous, with the attention
        of ``query`` [heads, nope + rope] over the first ``length`` of latents [capacity, rank] and
        positions [capacity, rope], all bfloat16, as they are when it is called.

        The tensors are kept, and must stay where they are; kv_b_proj's LoRA is that of the call,
        which raises ``RuntimeError`` where ``takes`` would say no. ``ValueError``: shapes, dtypes,
        layouts.
        """
        if out.shape != (self.heads, self.value) or not out.is_contiguous():
            raise ValueError(
                f"out is {[*out.shape]}, expected [{self.heads}, {self.value}], contiguous"
            )
        step = self._step(scaling, query.shape[1] - self.nope)
        first, last = head_array(query[:, None]), head_array(out[:, None])
        cached = head_array(latents[None]), head_array(positions[None])

        def attend(length: int, _kept: object = (query, latents, positions, out)) -> None:
            step.follow(self._present())
            step.attention.forward(first, *cached, last, length)

        return attend

    def bind_rows(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        rows: StepRows,
        scaling: float,
    ) -> Callable[[], None]:
        """A function that fills ``out`` with the attention of ``rows``' decode rows, each over the
        first positions of its slot and with its own adapter, as ``rows`` and the arrays say when it
        is called.

        query [heads, rows, nope + rope], latents [slots, 1, capacity, rank], positions [slots, 1,
        capacity, rope], out [rows, heads, v]; the rest is as in ``bind``.
        """
        step = self._step(scaling, query.shape[2] - self.nope)
        arrays = head_array(query), slot_array(latents), slot_array(positions)
        last, sequences = head_array(out.transpose(0, 1)), slot_rows(rows, latents)
        active_set, forward = self._present().active_set, step.attention.forward_rows
        seen, ids = -1, 0

        def attend(_kept: object = (query, latents, positions, out, rows)) -> None:
            nonlocal seen, ids
            if seen != active_set.changes:
                projection = self._present()
                step.follow(projection)
                # Without adapters of kv_b_proj, none has a number there.
                ids = rows.adapters.data_ptr() if isinstance(projection, LoraForward) else 0
                seen = active_set.changes
            forward(*arrays, last, sequences, ids)

        return attend

    def _present(self) -> DenseForward:
        projection = self._projection
        if projection is not None:
            projection.follow()
        if projection is None or not projection.usual or not self._holds(projection):
            raise RuntimeError(
                "kv_b_proj has other weights, or an adapter that the engine does not compute: this "
                "step was made for what it had before"
            )
        return projection

    def _holds(self, projection: DenseForward) -> bool:
        return projection.base.weight.data_ptr() == self._address

    def _step(self, scaling: float, rope: int) -> _Step:
        if scaling not in self._steps:
            self._steps[scaling] = _Step(
                LatentAttention(
                    self._engine, self._keys, self._values, heads=self.heads, rope=rope,
                    scaling=scaling,
                )
            )  # fmt: skip
        return self._steps[scaling]


class _Step:
    """The engine's attention, which has kv_b_proj's adapters."""

    def __init__(self, attention: LatentAttention) -> None:
        self.attention = attention
        self._projection: DenseForward | None = None

    def follow(self, projection: DenseForward) -> None:
        if projection is not self._projection:
            if isinstance(projection, LoraForward):
                projection.loras.add(self.attention)
            self._projection = projection
