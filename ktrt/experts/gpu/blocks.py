"""Forwards of consecutive blocks of one prompt, layer by layer: a layer's experts pass over the bus
once for all of them.

Between two layers of experts every block is an ordinary forward, with the shapes and the memory of
a short prompt: models, masks and caches need no change. A forward stops where it needs its experts
until the other blocks are there too, so each has a thread. One of them runs at a time, in the order
of the prompt: a block's keys are in the cache before the next block attends.
"""

from __future__ import annotations

import contextvars
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
S = TypeVar("S")


class StreamedLayer(Protocol):
    """``ktrt.experts.gpu.residents.GpuLayer``, as far as it is used here."""

    def streamed(self, calls: Sequence[Call]) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Call:
    """The arguments of ``GpuLayer.forward_streamed``, of one forward."""

    layer: StreamedLayer
    states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    adapters: torch.Tensor | None


class _Stopped(BaseException):
    """Ends a block's forward; no model catches it."""


class _Block(Generic[T]):
    """A forward in a thread that runs only while ``resume`` waits for it."""

    def __init__(self, forward: Callable[[], T], device: torch.device) -> None:
        self._forward, self._device = forward, device
        # torch's current stream is the thread's own.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._call: Call | None = None
        self._answer: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._results: list[T] = []
        self._stopping = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), daemon=True, name="block of a prompt"
        )

    @property
    def result(self) -> T:
        """The forward's result."""
        return self._results[0]

    def resume(self, answer: torch.Tensor | None = None) -> Call | None:
        """Runs the forward, with the answer to its last call, up to its next one, which is
        returned; None: it has ended. Raises what the forward raises."""
        self._answer, self._call = answer, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._call

    def meet(self, call: Call) -> torch.Tensor:
        """Waits for the answer, in the block's thread."""
        self._call = call
        del call  # the forward alone keeps the states
        self._paused.release()
        self._go.acquire()
        if self._stopping:
            raise _Stopped
        answer, self._answer = self._answer, None
        assert answer is not None
        return answer

    def stop(self) -> None:
        """Ends the forward where it next needs its experts, and waits until it has."""
        self._stopping = True
        if self._thread.ident is None:
            return
        self._go.release()
        self._thread.join()
        self._call = self._answer = None

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                if self._stream is not None:
                    stack.enter_context(torch.cuda.device(self._device))
                    stack.enter_context(torch.cuda.stream(self._stream))
                self._results.append(self._forward())
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by ``resume``
            self._error = error
        finally:
            self._paused.release()


class Blocks:
    """Runs forwards together; ``GpuLayer`` is where they meet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._at: _Block[Any] | None = None

    @property
    def running(self) -> bool:
        """Whether the forward that runs is one of many."""
        return self._at is not None

    def meet(self, call: Call) -> torch.Tensor:
        """Returns the experts' outputs, computed when all blocks are there."""
        assert self._at is not None
        return self._at.meet(call)

    def run(
        self,
        forwards: Sequence[Callable[[], T]],
        held: Callable[[], S],
        put: Callable[[S], None],
        watch: Callable[[int], None] | None = None,
    ) -> list[T]:
        """Returns the results of ``forwards``, which all need the same layers. ``held`` returns
        what else a running forward changes for the process, ``put`` sets it: each forward finds
        its own again, and the caller's is set in the end. ``watch`` gets the number of layers of
        experts that are computed, after each; what it raises ends all forwards.

        An interrupt ends all forwards where they next need experts. ``KtrtError``: one needs other
        layers than the rest.
        """
        ours = held()
        blocks = [_Block(forward, self._device) for forward in forwards]
        states = [ours] * len(blocks)
        answers: list[torch.Tensor | None] = [None] * len(blocks)
        layers = 0
        try:
            while True:
                calls = []
                for at, block in enumerate(blocks):
                    put(states[at])
                    self._at = block
                    answer, answers[at] = answers[at], None
                    calls.append(block.resume(answer))
                    del answer
                    self._at, states[at] = None, held()
                    put(ours)
                if all(call is None for call in calls):
                    return [block.result for block in blocks]
                answers = list(_answers(calls))
                del calls
                layers += 1
                if watch is not None:
                    watch(layers)
        finally:
            # First the one that an interrupt may have left running.
            _stop(sorted(blocks, key=lambda block: block is not self._at))
            self._at = None
            put(ours)


def _answers(calls: Sequence[Call | None]) -> list[torch.Tensor]:
    present = [call for call in calls if call is not None]
    layer = present[0].layer
    if len(present) < len(calls) or any(call.layer is not layer for call in present):
        raise KtrtError("blocks of one prompt went through different layers of experts")
    return layer.streamed(present)


def _stop(blocks: Sequence[_Block[T]]) -> None:
    """Ends all threads: what they hold must not outlive the forward, and nobody else may run the
    model meanwhile. A second interrupt waits for it too, at most the rest of a layer."""
    interrupted = True
    while interrupted:
        interrupted = False
        try:
            for block in blocks:
                block.stop()
        except KeyboardInterrupt:
            interrupted = True
