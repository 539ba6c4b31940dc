"""Runs at load what the first answer would otherwise wait for.

Libraries load kernels, choose algorithms and allocate workspaces when a size first occurs, and the
first decode step has to be captured. With V2-Lite's 27 layers on an H200 that took the first prompt
0.3 s (1.3 s where CUDA's libraries had to come from the disk) and the second token 0.3 s.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ktrt.errors import KtrtError
from ktrt.generation import KvCache
from ktrt.moe import experts_muted

logger = logging.getLogger(__name__)

# Tokens of the prompts that a GPU runs while the experts are loaded: kernels change with the size,
# about every power of two; and of those that the finished model runs.
_KERNEL_SIZES = (6, 12, 24, 48, 96, 192, 384, 768, 1024)
_SIZES = (3, 24)
# A follow-up prompt attends to a longer cache, by other kernels than the first one.
_FOLLOW_UP = 20
# Positions for which decode steps are captured ahead with a GPU: as many as the cache's first
# memory holds. On the CPU a recording costs no more than the plain step in its place.
_GPU_POSITIONS = 2048


@contextmanager
def kernels_loaded_beside(model: Any, limit: int) -> Iterator[None]:
    """Within the block a thread runs ``model``, whose experts need not be there, on prompts of many
    sizes; the end of the block waits for it. Only with a GPU: on the CPU it would take the cores
    from the block. ``limit``: the context, in tokens."""
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        yield
        return
    thread = threading.Thread(target=_run_sizes, args=(model, device, limit), daemon=True)
    with experts_muted(model):
        thread.start()
        try:
            yield
        finally:
            thread.join()


def _run_sizes(model: Any, device: torch.device, limit: int) -> None:
    start = time.perf_counter()
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            for size in _KERNEL_SIZES:
                if size <= limit:
                    ids = torch.tensor([_some_ids(model, size)], device=device)
                    model(input_ids=ids, use_cache=False, logits_to_keep=1)
            torch.cuda.current_stream().synchronize()
    except Exception as error:  # noqa: BLE001 - whatever it is, the first answer meets it again
        logger.debug("Loading kernels ahead failed: %s", error)
    logger.debug("Loaded kernels in %.1f s", time.perf_counter() - start)


def warm_up(cache: KvCache, limit: int) -> None:
    """Runs short prompts and decode steps on an empty ``cache``, which is empty again afterwards
    and keeps its memory and graphs. ``limit``: the context, in tokens.

    The routed experts' weights are left out of prompts: reading them all takes as long as a first
    prompt does. A failure is a warning: the first answer meets it again, and says so.
    """
    start = time.perf_counter()
    on_gpu = cache.device.type == "cuda"
    try:
        with experts_muted(cache.model):
            for size in _SIZES:
                if size + _FOLLOW_UP < limit:
                    cache.reuse([0])
                    cache.forward(_some_ids(cache.model, size))
                    cache.forward(_some_ids(cache.model, _FOLLOW_UP if cache.continues else 1))
        if limit > 4:
            first, second, third, fourth = _some_ids(cache.model, 4)
            cache.reuse([0])
            cache.forward([first, second])
            cache.forward([third])
            cache.capture_ahead(min(limit, _GPU_POSITIONS) if on_gpu else 0)
            cache.forward([fourth])
    except (RuntimeError, KtrtError) as error:
        logger.warning("Warming up failed, the first answer will take longer: %s", error)
    finally:
        cache.reuse([0])
    logger.debug("Warmed up in %.1f s", time.perf_counter() - start)


def _some_ids(model: Any, count: int) -> list[int]:
    """Token ids from the middle of the vocabulary: the embeddings of the first ones may be zero
    (padding), which makes the logits that a graph is compared by zero or NaN."""
    rows = model.get_input_embeddings().weight.shape[0]
    return [(rows // 2 + 7 * index) % rows for index in range(count)]
