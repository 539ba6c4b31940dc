"""The experts of a model on a GPU's tensors: the CUDA stream itself starts and awaits the engine.

Nothing here waits on the host but ``HandOff.finish``. The wait for the engine goes to a side stream
and is joined by the first operation that reads the result, so that whatever the model computes in
between (shared experts) runs on the GPU meanwhile, in eager mode and in a captured graph alike.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils._pytree import tree_map_only

from ktrt.engine import GpuHandoff
from ktrt.engine.step_rows import IDLE
from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from ktrt.engine import Engine, MoeLayer
    from ktrt.utils.patches import Patches

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
# These read no element: applied to a result under way, they give a result under way.
_VIEWS = {
    _aten.view.default, _aten._unsafe_view.default, _aten.unsqueeze.default, _aten.alias.default,
    _aten.squeeze.dim, _aten.detach.default, _aten.slice.Tensor, _aten.reshape.default,
}  # fmt: skip


class Deferred(torch.Tensor):
    """A tensor that a side stream is still writing.

    It has no memory, so that nothing can read it by accident: every operation but a view first
    makes the current stream wait for the value, and gives plain tensors.
    """

    _value: torch.Tensor
    _join: Callable[[], None]

    @staticmethod
    def __new__(cls, value: torch.Tensor, join: Callable[[], None]) -> Self:
        deferred: Self = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        deferred._value, deferred._join = value, join
        return deferred

    def ready(self) -> torch.Tensor:
        """The value, which what follows on the current stream may read."""
        self._join()
        return self._value

    def plus(self, share: torch.Tensor, dtype: torch.dtype) -> Deferred:
        """The sum with ``share``, of this shape, in ``dtype``: made once the value is read, so that
        nobody waits for it before. Rounded once."""
        total = torch.empty_like(share, dtype=dtype)
        made = False

        def join() -> None:
            nonlocal made
            if not made:
                total.copy_(share + self.ready())
                made = True

        return Deferred(total, join)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # All of them, reshape included, are views of what is contiguous.
        if func in _VIEWS and args[0]._value.is_contiguous():
            deferred, *rest = args
            return cls(func(deferred._value, *rest, **(kwargs or {})), deferred._join)
        args, kwargs = tree_map_only(Deferred, Deferred.ready, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype}, {self.device})"


class HandOff:
    """The slots and streams of one model on one GPU; used by one thread at a time."""

    def __init__(
        self, core: GpuHandoff, device: torch.device, max_qlen: int, cuda: Any = torch.cuda
    ) -> None:
        """``max_qlen``: the most tokens of one engine call. ``cuda`` is replaced in tests."""
        self._core, self._device, self._max_qlen, self._cuda = core, device, max_qlen, cuda
        self._side = cuda.Stream(device)
        self._slots: dict[tuple[int, int, int, torch.dtype, bool], int] = {}
        # A result that is not joined yet, kept alive until it is.
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._recorded: list[int] | None = None
        self._unfinished = False
        # Work of the host while the device computes a forward, which has been issued.
        self.meanwhile: Callable[[], None] | None = None

    def close(self) -> None:
        """Frees the pinned memory and stops serving the stream. Idempotent."""
        self._core.close()

    def run(
        self,
        layer: MoeLayer,
        states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        path: str = "",
        adapters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Enqueues the experts of ``layer`` on states [tokens, hidden_size]; index and weights
        [tokens, k]; ``adapters`` [tokens], each token's LoRA, None: the active ones. A captured
        graph reads all of them when it is launched. Returns their weighted sum, ``Deferred``, of
        the shape and dtype of states.

        Errors of the engine are raised by ``finish``, and name the module's ``path``.
        """
        if states.device != self._device:
            raise KtrtError(
                f"the experts were given tensors on {states.device}, expected {self._device}: the "
                "model cannot be moved after loading"
            )
        parts = []
        for at in range(0, states.shape[0], self._max_qlen):
            part = slice(at, at + self._max_qlen)
            # Slots have fixed sizes, powers of two.
            rows = min(1 << (len(states[part]) - 1).bit_length(), self._max_qlen)
            chosen = None if adapters is None else adapters[part]
            slot = self._slot(layer, rows, index.shape[1], states.dtype, path, chosen is not None)
            parts.append(self._start(slot, rows, states[part], index[part], weights[part], chosen))
        if not parts:
            return torch.empty_like(states)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _start(
        self,
        slot: int,
        rows: int,
        states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens = states.shape[0]
        # An expert of -1 adds nothing and costs nothing.
        states = _padded(states, rows, 0)
        index = _padded(index.to(torch.int64), rows, -1)
        weights = _padded(weights.to(torch.float32), rows, 0)
        if adapters is not None:
            adapters = _padded(adapters.to(torch.int32), rows, IDLE)
        out = torch.empty_like(states)
        self._join_pending()
        main = self._cuda.current_stream(self._device)
        self._unfinished = True
        self._core.submit(
            slot, main.cuda_stream, states.data_ptr(), index.data_ptr(), weights.data_ptr(),
            0 if adapters is None else adapters.data_ptr(),
        )  # fmt: skip
        if self._recorded is not None:
            self._recorded.append(slot)
        self._side.wait_stream(main)
        self._core.wait(slot, self._side.cuda_stream, out.data_ptr())
        done = self._side.record_event()
        self._pending = (out, done)
        return Deferred(out[:tokens], lambda: self._join(done))

    def _slot(
        self, layer: MoeLayer, rows: int, top_k: int, dtype: torch.dtype, path: str, adapters: bool
    ) -> int:
        key = (id(layer), rows, top_k, dtype, adapters)
        if key not in self._slots:
            if self._recorded is not None:
                raise KtrtError(f"no hand-off of {rows} tokens was made before the capture")
            self._slots[key] = self._core.add_slot(
                layer, tokens=rows, top_k=top_k, dtype=_name(dtype), name=path, adapters=adapters
            )
        return self._slots[key]

    def _join(self, done: Any) -> None:
        self._cuda.current_stream(self._device).wait_event(done)
        if self._pending is not None and self._pending[1] is done:
            self._pending = None

    def _join_pending(self) -> None:
        if self._pending is not None:
            self._join(self._pending[1])

    def begin(self) -> None:
        """Before a forward: waits for the work of an interrupted one and drops its result."""
        try:
            self.finish()
        except (RuntimeError, TimeoutError) as error:
            logger.debug("An interrupted forward had failed: %s", error)

    def end(self) -> None:
        """After a forward was issued: ``meanwhile``, then ``finish``."""
        if self.meanwhile is not None and self._unfinished and self._recorded is None:
            self.meanwhile()
        self.finish()

    def finish(self) -> None:
        """After a forward: waits until the current stream has run dry. ``RuntimeError`` with what
        the experts raised, ``TimeoutError`` if they never came. Nothing during a capture."""
        if not self._unfinished or self._recorded is not None:
            return
        try:
            self._join_pending()
            self._core.synchronize(self._cuda.current_stream(self._device).cuda_stream)
        finally:
            self._pending, self._unfinished = None, False

    @contextmanager
    def recording(self) -> Iterator[list[int]]:
        """Within the block, which a graph captures, the list receives the slots in order."""
        unfinished, self._recorded = self._unfinished, []
        try:
            yield self._recorded
        except BaseException:
            # A slot may have been submitted and not waited for.
            unfinished = True
            raise
        finally:
            self._recorded, self._unfinished = None, unfinished
            pending, self._pending = self._pending, None
            if pending is not None:
                # A capture ends only where every stream has joined.
                self._cuda.current_stream(self._device).wait_event(pending[1])

    @contextmanager
    def launching(self, slots: Sequence[int]) -> Iterator[None]:
        """The block launches a graph of these slots; its end is an ``end``."""
        self.begin()
        self._unfinished = True
        self._core.expect(slots)
        yield
        self.end()

    def guard(self, model: nn.Module, patches: Patches) -> None:
        """Makes ``begin`` and ``end`` part of the model's forward: its caller gets finished
        results, or the experts' error."""
        patches.add(model.register_forward_pre_hook(lambda *_: self.begin()).remove)
        patches.add(model.register_forward_hook(lambda *_: self.end()).remove)


def new_hand_off(engine: Engine, device: torch.device) -> HandOff | None:
    """The hand-off of a model on ``device``; None on the CPU, and where the driver cannot do it,
    which is logged: the tensors are then copied by the host, layer by layer."""
    if device.type != "cuda":
        return None
    try:
        core = GpuHandoff(engine)
    except RuntimeError as error:
        logger.warning("The host copies at every layer, which is slower: %s", error)
        return None
    return HandOff(core, device, engine.max_qlen)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _padded(values: torch.Tensor, rows: int, filler: int) -> torch.Tensor:
    """Contiguous, with rows of ``filler`` up to ``rows``."""
    if values.shape[0] == rows:
        return values.contiguous()
    padded = values.new_full((rows, *values.shape[1:]), filler)
    padded[: values.shape[0]] = values
    return padded
