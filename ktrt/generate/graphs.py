"""Graphs of whole decode steps, embedding to logits: CUDA's, hand-offs to the CPU included, or on
the CPU the recorded operations (``ktrt.engine.recording``).

One graph per number of rows, captured at load (``generate.warm_up``) or at the first token that
needs it, and replayed for the later ones. It serves all lengths where every layer's attention reads
them on the device (``RunningStep.lengths``). Other models need one for each window, the positions
attended to: a power of two.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from ktrt.engine.recording import active
from ktrt.engine.step_rows import RunningStep
from ktrt.errors import KtrtError
from ktrt.generate.masks import attention_mask, plain_mask
from ktrt.kv.static import StaticKv, cache_argument

logger = logging.getLogger(__name__)

# The smallest window: a smaller one would save little attention and cost more captures.
MIN_WINDOW = 512
# Relative error of a graph's logits against the plain forward's, for gross defects only. Another
# attention kernel rounds otherwise, and where that changes the experts of some layers, much of the
# logits changes; a mask or position that is wrong gives unrelated logits, of an error past 1.
_TOLERANCE = 0.7
# How captures fail: a step has an operation that cannot be captured, or the results are wrong.
FAILURES = (RuntimeError, ValueError, TypeError, KtrtError)


class HandOff(Protocol):
    """The experts' hand-off (``ktrt.experts``), as far as graphs use it."""

    def recording(self) -> AbstractContextManager[list[int]]:
        """Within the block, the list receives the slots whose hand-offs are captured."""

    def launching(self, slots: Sequence[int]) -> AbstractContextManager[None]:
        """The block launches a graph with these slots; its end waits for the result."""


class NoHandOff:
    """The hand-off of experts that run where the model runs."""

    @contextmanager
    def recording(self) -> Iterator[list[int]]:
        yield []

    @contextmanager
    def launching(self, _slots: Sequence[int]) -> Iterator[None]:
        yield


class GraphMaker(Protocol):
    """``torch.cuda``'s graphs, or what stands in for them."""

    what: str
    # At which a failure is logged.
    failure_level: int
    # Whether a capture also computes the step, as the model does: nothing has to run before it, and
    # one that fails leaves the cache as it was.
    captures_compute: bool
    # Cleared by a failure, after which nobody captures any more.
    usable: bool
    # Set once a graph's logits were compared with the plain forward's: later ones need not be.
    proven: bool

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Runs ``step`` once as a capture; returns what replays it on the current stream."""

    def clear(self) -> None:
        """The graphs so far are no longer needed."""


class CudaGraphs:
    """Graphs that share one memory pool: they never run at once, and results are copied out."""

    what = "CUDA graph"
    failure_level = logging.WARNING
    captures_compute = False

    def __init__(self) -> None:
        self.usable = True
        self.proven = False
        self.clear()

    def clear(self) -> None:
        # A pool whose graphs are all gone cannot be used again.
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        failure: BaseException | None = None
        try:
            # Other threads, of other sessions say, may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    step()
                except BaseException as error:
                    failure = error
                    raise
        except RuntimeError as error:
            # Ending a broken capture fails as well, which must hide neither reason nor Ctrl-C.
            raise failure or error from None
        finally:
            # torch leaves its capture stream current where the end of the capture failed.
            torch.cuda.set_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay


def capture(
    maker: GraphMaker, handoff: HandOff, step: Callable[[], None]
) -> tuple[Callable[[], None], list[int]]:
    """Runs ``step`` once as a capture; returns what replays it, and the slots of its hand-offs."""
    slots: list[int] = []

    def captured() -> None:
        with handoff.recording() as recorded:
            step()
        slots.extend(recorded)

    return maker.capture(captured), slots


def give_up(maker: GraphMaker, error: Exception) -> None:
    """Ends all attempts of ``maker`` after its first graph of a model has failed, and logs why."""
    maker.usable = False
    logger.log(
        maker.failure_level,
        "No %s for decoding, the model itself runs every step: %s", maker.what, error,
    )  # fmt: skip


class DecodeGraphs:
    """The graphs of one cache: a token for each of its rows, and their next logits.

    ``model`` takes ``position_ids`` and a ready 4-D ``attention_mask``, as transformers' models do.
    """

    def __init__(
        self, model: Any, cache: StaticKv, handoff: HandOff, maker: GraphMaker, *, rows: int = 1,
        first: int = 0, running: RunningStep | None = None,
    ) -> None:  # fmt: skip
        """``first``: the slot of the first row; the others follow. ``running``: the step that the
        model's layers look at, if they do."""
        self._model, self._cache, self._handoff, self._maker = model, cache, handoff, maker
        self._slots = range(first, first + rows)
        self._running = RunningStep() if running is None else running
        self._rows = rows
        device = model.get_input_embeddings().weight.device
        # Ids and positions, in the memory that the graphs read.
        self._inputs = torch.zeros(2, rows, 1, dtype=torch.int64, device=device)
        self._logits: torch.Tensor | None = None
        # By window.
        self._graphs: dict[int | None, tuple[Callable[[], None], list[int]]] = {}
        self._length = 0

    @property
    def count(self) -> int:
        """Graphs that can be replayed."""
        return len(self._graphs)

    @property
    def usable(self) -> bool:
        """Whether no capture of this model has failed."""
        return self._maker.usable

    def clear(self) -> None:
        """Forgets the graphs, whose memory has moved, or whose adapters have changed."""
        self._graphs.clear()
        self._maker.clear()
        self._running.keeps_to_lengths = False

    @torch.inference_mode()
    def step(self, ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor | None:
        """Stores the rows' tokens ``ids`` at positions ``lengths`` and returns their logits [rows,
        vocab_size], a copy; None if there is no graph for these lengths yet.

        Raises what the experts raised; the positions then hold nothing of use.
        """
        window = window_for(self._running, lengths)
        return self._replay(window, ids, lengths) if window in self._graphs else None

    @torch.inference_mode()
    def prepare(
        self, ids: Sequence[int], lengths: Sequence[int], expected: torch.Tensor,
        rewind: Callable[[], None] = lambda: None,
    ) -> bool:  # fmt: skip
        """Makes the graph for ``lengths``, after a plain forward of the same step gave ``expected``
        [rows, vocab_size]. ``rewind`` puts the states back to what they were before that.

        False if that failed, which is logged: the cache must be filled again, and there are no
        further attempts.
        """
        window: int | None = window_of(lengths)
        if not self._maker.usable:
            return True
        self._set_inputs(ids, lengths, window)
        logits = self._logits_memory(expected)
        unharmed = self._maker.captures_compute
        stay = self._cache.rewinder(self._slots)
        rewind()
        try:
            if not self._maker.captures_compute:
                # Eagerly first: libraries allocate their workspaces, the hand-off its slots.
                self._run(window)
                if self._running.keeps_to_lengths:
                    # Kernels for the whole capacity may be others.
                    window = None
                    self._run(window)
                rewind()
            self._capture(window)
            rewind()
            unharmed = False
            # A replay that writes nothing must not pass by what the capture has written.
            logits.fill_(torch.nan)
            check_logits(self._replay(window, ids, lengths), expected)
        except FAILURES as error:
            self.clear()
            give_up(self._maker, error)
            stay()
            return unharmed
        self._maker.proven = True
        return True

    @torch.inference_mode()
    def capture_up_to(self, length: int) -> None:
        """Captures the windows between the largest so far and the one that holds ``length``
        positions: only where capturing computes nothing."""
        windows = [window for window in self._graphs if window is not None]
        if self._maker.captures_compute or not self._maker.proven or not windows:
            return
        window = 2 * max(windows)
        stay = self._cache.rewinder(self._slots)
        while window <= window_of([length - 1]):
            try:
                self._capture(window)
            except FAILURES as error:
                logger.debug("No %s ahead for window %d: %s", self._maker.what, window, error)
                return
            finally:
                stay()
            window *= 2

    @torch.inference_mode()
    def capture(
        self, ids: Sequence[int], lengths: Sequence[int], like: torch.Tensor
    ) -> torch.Tensor | None:
        """Makes the graph for ``lengths`` and returns what ``step`` does: nothing is computed
        twice, so that it takes less than a plain forward (27 layers on an H200: 35 ms for the
        capture and 30 for the step, where the host needs 85 to launch it). ``like``: logits
        [vocab_size] of an earlier forward.

        None, with nothing changed, where ``prepare`` has to compare a graph of this model first, or
        where the capture failed.
        """
        if not (self._maker.usable and self._maker.proven):
            return None
        window = window_for(self._running, lengths)
        self._set_inputs(ids, lengths, window)
        logits = self._logits_memory(like.expand(len(ids), -1))
        rewind = self._cache.rewinder(self._slots)
        try:
            self._capture(window)
        except FAILURES as error:
            logger.debug("No %s without a plain forward first: %s", self._maker.what, error)
            rewind()
            return None
        if self._maker.captures_compute:
            return logits.clone()
        rewind()
        return self.step(ids, lengths)

    def _logits_memory(self, like: torch.Tensor) -> torch.Tensor:
        if self._logits is None or self._logits.shape != like.shape:
            # An adapter's vocabulary may differ from the base's; the graphs were cleared for it.
            # Memory from before the capture, and no inference tensor, which only inference mode
            # could write to.
            with torch.inference_mode(False):
                self._logits = like.new_empty(like.shape)
        return self._logits

    def _capture(self, window: int | None) -> None:
        graph = capture(self._maker, self._handoff, lambda: self._run(window))
        self._graphs[window] = graph
        logger.debug("Captured the decode step of %s, %d hand-offs", named(window), len(graph[1]))

    def _replay(
        self, window: int | None, ids: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        assert self._logits is not None
        replay, slots = self._graphs[window]
        self._set_inputs(ids, lengths, window)
        with self._handoff.launching(slots):
            replay()
        return self._logits.clone()

    def _set_inputs(self, ids: Sequence[int], lengths: Sequence[int], window: int | None) -> None:
        if window is not None:
            for slot in self._slots:
                self._cache.commit(slot, window)
        self._length = max(lengths) + 1
        values = torch.tensor([list(ids), list(lengths)], dtype=torch.int64)
        self._inputs.copy_(values.unsqueeze(-1))

    def _run(self, window: int | None) -> None:
        positions = self._inputs[1]
        mask = attention_mask(self._model, self._cache, positions, window)
        recorder = active()
        if recorder is not None:
            length = (lambda: self._length) if len(positions) == 1 else None
            recorder.describe([self._inputs], plain_mask(self._model, mask), length)
        logits = run_step(
            self._model, self._cache, self._running, self._inputs, mask, window,
            first=self._slots[0],
        )  # fmt: skip
        assert self._logits is not None
        self._logits.copy_(logits)


def run_step(
    model: Any, cache: StaticKv, running: RunningStep, inputs: torch.Tensor, mask: Any,
    window: int | None, *, first: int = 0, slots: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Runs one token for each slot from ``first`` on, or for ``slots`` [rows]: ``inputs`` [2, rows,
    1], ids and positions; ``mask`` as ``attention_mask`` makes it for ``window``; ``active`` [rows]
    bool: the rows that stand for something (None: all). Returns the logits [rows, vocab_size].

    ``KtrtError``: layers look at more than ``window`` None allows.
    """
    ids, positions = inputs
    place = cache.window(positions, window, first, slots, active)
    picked = slots if window is None else None
    with place as step, running.attending(positions[:, 0] + 1, picked):
        output = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): cache},
        )
    running.keeps_to_lengths = step.stored == running.attended > 0
    if window is None and not running.keeps_to_lengths:
        raise KtrtError(
            f"the attention of {step.stored - running.attended} of {step.stored} layers does not "
            "keep to the rows' lengths"
        )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def window_for(running: RunningStep, lengths: Sequence[int]) -> int | None:
    """Returns the window of a step at these positions; None: its graph serves all lengths."""
    return None if running.keeps_to_lengths else window_of(lengths)


def named(window: int | None) -> str:
    """Returns the window's name in log lines."""
    return "all lengths" if window is None else f"window {window}"


def check_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """``KtrtError``: a replay's logits are not the plain forward's."""
    error = float((logits.float() - expected.float()).norm() / expected.float().norm())
    if not error <= _TOLERANCE:  # NaN is no match either
        raise KtrtError(
            f"its logits differ from the plain forward's, relative error {error:.2f}, expected "
            f"below {_TOLERANCE}"
        )


def window_of(lengths: Sequence[int]) -> int:
    """The positions that a step at these positions attends to: the power of two, ``MIN_WINDOW`` at
    least, that holds them all."""
    return max(MIN_WINDOW, 1 << max(lengths).bit_length())
