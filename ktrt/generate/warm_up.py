"""Runs at load what the first answer would otherwise wait for.

Libraries load kernels, choose algorithms and allocate workspaces when a size first occurs, Triton
compiles (5 s on a fresh machine), and the first decode step has to be captured. With V2-Lite's 27
layers on an H200 that took the first prompt 0.3 s (1.3 s where CUDA's libraries had to come from
the disk) and the second token 0.3 s.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product, takewhile
from typing import Any

import torch

from ktrt.engine.step_rows import ACTIVE, BASE, RunningStep
from ktrt.errors import KtrtError
from ktrt.experts import experts_muted
from ktrt.generate.graphs import DecodeGraphs, NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.kv.slot import Slot
from ktrt.kv.static import unusual_layers

logger = logging.getLogger(__name__)

# Prompts by their chunks. A GPU runs these while the experts are loaded: kernels change with the
# size, about every power of two, and a chunk that follows others attends to a longer cache, by
# other kernels than the first one. Last the chunks of long prompts, which need most memory.
_KERNEL_SIZES = [(size, 20) for size in (1024, 768, 384, 256, 192, 96, 48, 24, 12, 6)]
_LONG_SIZES = [(size, 20) for size in (2048, 4096, 8192)]
# The finished model runs these. With a GPU, attention's kernels, LoRA's and the resident
# experts' come with it, and differ for long, middle and short chunks.
_SIZES = ((24,),)
_GPU_SIZES = ((8192, 1024, 128, 20), (1024, 20), (128, 20), (24, 20))
# Rows of decode steps that are captured ahead, unless fewer may run at once: 0.05 s for each graph
# with 8 layers on an H200. All rows have the same token, so that few experts are read.
# One row comes after two, whose graph is compared with plain steps: then one serves any slot.
_ROWS = (2, 1, 4, 8, 16, 32)
# While the experts are loaded: rows whose kernels are most of all. The memory of 5 slots.
_ROWS_BESIDE = 8
# More than the longest of _LONG_SIZES.
_POSITIONS_BESIDE = 16384
# Positions for which decode steps are captured ahead with a GPU: as many as the cache's first
# memory holds. On the CPU a recording costs no more than the plain step in its place.
_GPU_POSITIONS = 2048


@contextmanager
def kernels_loaded_beside(
    model: Any, limit: int, running: RunningStep | None = None
) -> Iterator[None]:
    """Within the block a thread runs ``model``, whose experts need not be there, on prompts of many
    sizes and decode steps; the end of the block waits for it. Only with a GPU: on the CPU it would
    take the cores from the block. ``limit``: the context, in tokens; ``running``: the step that the
    model's layers look at."""
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        yield
        return
    thread = threading.Thread(
        target=_load_kernels, args=(model, device, limit, running), daemon=True
    )
    with experts_muted(model):
        thread.start()
        try:
            yield
        finally:
            thread.join()


def _load_kernels(
    model: Any, device: torch.device, limit: int, running: RunningStep | None = None
) -> None:
    start = time.perf_counter()
    try:
        with torch.cuda.device(device):
            cache = KvCache(model, runner=_uncaptured_runner(model, limit, running))
            _run_prompts(cache, _KERNEL_SIZES, limit)
            _run_steps(cache, limit)
            if _on_gpu(cache) and cache.runner.memory_stays:
                _run_rows(cache, _ROWS_BESIDE)
            _run_prompts(cache, _LONG_SIZES, limit)
            torch.cuda.current_stream().synchronize()
            cache.close()
            # A long prompt's memory is not needed until there is one.
            torch.cuda.empty_cache()
    except Exception as error:  # noqa: BLE001 - whatever it is, the first answer meets it again
        logger.debug("Loading kernels ahead failed: %s", error)
    if running is not None:
        # With an adapter, attention may be another.
        running.keeps_to_lengths = False
    logger.debug("Loaded kernels in %.1f s", time.perf_counter() - start)


def _uncaptured_runner(model: Any, limit: int, running: RunningStep | None) -> ModelRunner:
    """Returns a runner as the loaded model's, but for what needs the experts."""
    hand_off = NoHandOff()
    steps = partial(DecodeGraphs, model, handoff=hand_off, maker=_Uncaptured(), running=running)
    rows = partial(RowGraphs, model, handoff=hand_off, maker=_Uncaptured())
    return ModelRunner(
        model, None if unusual_layers(model) else steps, running=running, row_graphs=rows,
        slots=_ROWS_BESIDE, capacity=min(limit, _POSITIONS_BESIDE),
    )  # fmt: skip


class _Uncaptured:
    """Steps as graphs run them, launched one by one: the kernels are the same."""

    what = "uncaptured step"
    failure_level = logging.DEBUG  # the graph that follows says it again
    captures_compute = False

    def __init__(self) -> None:
        self.usable, self.proven = True, False

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    def clear(self) -> None:
        """There is nothing to keep."""


def warm_up(cache: KvCache, limit: int, rows: int = 1) -> None:
    """Runs a short prompt and a decode step on an empty ``cache``, which is empty again afterwards
    and keeps its memory and graphs; with a GPU, also steps of up to ``rows`` sequences. ``limit``:
    the context, in tokens.

    The routed experts' weights are left out of prompts: reading them all takes as long as a first
    prompt does. A failure is a warning: the first answer meets it again, and says so.
    """
    start = time.perf_counter()
    try:
        with experts_muted(cache.model):
            _run_prompts(cache, _GPU_SIZES if _on_gpu(cache) else _SIZES, limit)
        _run_steps(cache, limit)
        if _on_gpu(cache) and cache.runner.memory_stays:
            _run_rows(cache, rows)
    except (RuntimeError, KtrtError) as error:
        logger.warning("Warming up failed, the first answer will take longer: %s", error)
    finally:
        cache.reuse([0])
        if _on_gpu(cache):
            # A long prompt's memory is not needed until there is one.
            torch.cuda.empty_cache()
    logger.debug("Warmed up in %.1f s", time.perf_counter() - start)


def _run_prompts(cache: KvCache, prompts: Sequence[Sequence[int]], limit: int) -> None:
    for first, *more in prompts:
        if first + sum(more) < limit:
            cache.reuse([0])
            cache.forward(_some_ids(cache.model, first))
            for size in more:
                cache.forward(_some_ids(cache.model, size if cache.continues else 1))


def _run_steps(cache: KvCache, limit: int) -> None:
    """A decode step after the last prompt, by the model itself, which makes the first graph."""
    first, second, third = _some_ids(cache.model, 3)
    if not cache.length:
        if limit < 3:
            return
        cache.forward([first, second])
    cache.forward([third])
    cache.capture_ahead(min(limit, _GPU_POSITIONS) if _on_gpu(cache) else 0)


def _run_rows(cache: KvCache, most: int) -> None:
    """Decode steps of 1, 2, 4, 8 … rows, with the active adapters and, where some are resident, by
    row: other slots and adapters need no other graphs."""
    runner, (token,) = cache.runner, _some_ids(cache.model, 1)
    cache.reuse([0])
    cache.close()
    # One conversation at a time has two slots, too, where there were others before.
    most = min(max(most, 2), runner.pool.most_slots)
    kinds = [ACTIVE, BASE] if runner.by_row and runner.active_set.numbers else [ACTIVE]
    slots = list[Slot]()
    try:
        counts = takewhile(lambda count: count // 2 < most, _ROWS)
        for adapter, count in product(kinds, counts):
            # More than half as many take the same graph, and less memory.
            real = count // 2 + 1
            slots += [runner.pool.open("rows", ()) for _ in range(real - len(slots))]
            spans = (Span(slot=slot, ids=[token], adapter=adapter) for slot in slots[:real])
            runner.run(Step(tuple(spans)))
    finally:
        for slot in slots:
            runner.pool.empty(slot)
            runner.pool.close(slot)


def _on_gpu(cache: KvCache) -> bool:
    return str(cache.device.type) == "cuda"


def _some_ids(model: Any, count: int) -> list[int]:
    """Token ids from the middle of the vocabulary: the embeddings of the first ones may be zero
    (padding), which makes the logits that a graph is compared by zero or NaN."""
    rows = model.get_input_embeddings().weight.shape[0]
    return [(rows // 2 + 7 * index) % rows for index in range(count)]
