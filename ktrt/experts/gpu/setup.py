"""How much of the routed experts' work the GPU takes: what is asked for, what fits, what pays."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Literal

import torch

from ktrt.errors import KtrtError
from ktrt.experts.gpu.arithmetic import grouped_rows
from ktrt.experts.gpu.costs import measure_engine, measure_gpu, streaming_threshold
from ktrt.experts.gpu.grouping import Grouping
from ktrt.experts.gpu.residents import BLOCK_TOKENS, MOST_TOKENS, GpuExperts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt.config import ExpertArgs
    from ktrt.engine import MoeLayer
    from ktrt.engine.rank_masks import RankMasks
    from ktrt.engine.step_rows import RunningStep
    from ktrt.experts.gpu.residents import GpuLayer
    from ktrt.experts.handoff import HandOff
    from ktrt.experts.module import KTExperts

logger = logging.getLogger(__name__)

# GPU memory that `kt_num_gpu_experts: auto` leaves for the KV cache and activations.
RESERVED_BYTES = 3 << 30
RESERVED_SHARE = 0.1
# Share of the free GPU memory that the tokens of one long prompt may take; KV caches take most of
# the rest.
PROMPT_SHARE = 0.08
# Forms of experts that the GPU does not compute, in the words of ``KTExperts.unusual_form``.
ENGINE_ONLY = ("down in slices of columns", "a norm after each expert")
# Relative error between GPU and engine on the same token, far above the noise of float32 sums and
# far below what another activation or a bias makes.
_SAME = 0.02


def build_gpu_experts(
    modules: Mapping[str, KTExperts],
    device: torch.device,
    args: ExpertArgs,
    max_qlen: int,
    running: RunningStep | None = None,
    masks: RankMasks | None = None,
    hand_off: HandOff | None = None,
) -> GpuExperts | None:
    """Gives the modules the GPU's share by ``kt_num_gpu_experts`` and
    ``kt_gpu_prefill_token_threshold``; None if it has none. Logs what was decided and why.

    ``modules``: by path in the order of a forward, weights and LoRA loaded; ``running`` and
    ``masks``: as ``GpuExperts`` takes them; ``hand_off``: the modules', without which residents
    stay. ``KtrtError``: a number of experts that was asked for does not fit.
    """
    number, threshold = args.kt_num_gpu_experts, args.kt_gpu_prefill_token_threshold
    if device.type != "cuda":
        if number not in (0, "auto") or threshold not in (0, "auto"):
            logger.info(
                "kt_num_gpu_experts %s, kt_gpu_prefill_token_threshold %s: there is no GPU, so all "
                "routed experts run on the CPU", number, threshold,
            )  # fmt: skip
        if args.kt_enable_dynamic_expert_update:
            logger.info("kt_enable_dynamic_expert_update: there is no GPU, so no expert moves")
        return None
    if (number, threshold) == (0, 0):
        return None
    for path, module in modules.items():
        if form := [each for each in module.unusual_form if each in ENGINE_ONLY]:
            logger.info(
                "All routed experts run on the CPU: %s has %s, which ktrt computes only there",
                path, ", ".join(form),
            )  # fmt: skip
            return None
    layers = {path: module.layer for path, module in modules.items()}
    experts = GpuExperts(layers, device, running=running, masks=masks)
    try:
        used = _settle(experts, layers, number, threshold, max_qlen)
        if used and hand_off is not None and args.kt_enable_dynamic_expert_update:
            _follow(experts, hand_off)
    except BaseException:
        experts.close()
        raise
    if not used:
        experts.close()
        return None
    for path, module in modules.items():
        module.gpu = experts.layers[path]
    return experts


def _settle(
    experts: GpuExperts,
    layers: Mapping[str, MoeLayer],
    number: int | Literal["auto"],
    threshold: int | Literal["auto"],
    max_qlen: int,
) -> bool:
    """Whether the GPU got anything to do."""
    for path, layer in layers.items():
        if (difference := check_layer(experts.layers[path], layer, experts.device)) > _SAME:
            logger.info(
                "All routed experts run on the CPU: %s on the GPU differs by %.3f from the engine",
                path, difference,
            )  # fmt: skip
            return False
    experts.threshold = _streaming(experts, layers, threshold, max_qlen)
    experts.most_tokens = _most_tokens(experts, layers)
    most = min(layer.num_experts for layer in layers.values())
    count = _fitting(experts, layers) if number == "auto" else min(number, most)
    if count:
        try:
            experts.select(count)
        except torch.OutOfMemoryError as error:
            raise KtrtError(
                f"kt_num_gpu_experts: {count} experts of each layer do not fit into the GPU's "
                f"memory ({error}); give a smaller number, or auto"
            ) from error
        logger.info(
            "%d of %d experts of each layer live on the GPU: %.2f GB",
            count, most, experts.resident_bytes / 1e9,
        )  # fmt: skip
    elif number == "auto":
        logger.info("kt_num_gpu_experts auto: no expert fits into the GPU's free memory")
    if number != "auto":  # which leaves room for prompts
        experts.most_tokens = _most_tokens(experts, layers)
    if experts.threshold:
        logger.info("A prompt's experts are streamed once for %d tokens", experts.most_tokens)
    return bool(count or experts.threshold)


def _follow(experts: GpuExperts, hand_off: HandOff) -> None:
    """Has the residents follow the routing, if there are some and others to take their places."""
    if not any(layer.resident and not layer.complete for layer in experts.layers.values()):
        logger.info("kt_enable_dynamic_expert_update: the GPU holds no experts, or all: none moves")
        return
    if not experts.pinned_bytes:
        experts.pin()
    if experts.unpinned_bytes:
        logger.info(
            "The experts on the GPU stay the same: %.1f GB cannot be pinned, from which others "
            "would be copied during a step", experts.unpinned_bytes / 1e9,
        )  # fmt: skip
        if not experts.threshold:
            experts.unpin()
        return
    hand_off.meanwhile = experts.follow().step
    logger.info("The experts on the GPU follow the routing")


def check_layer(gpu: GpuLayer, layer: MoeLayer, device: torch.device) -> float:
    """The relative error of one token of this layer on ``device``, compared with the engine."""
    source = gpu.source
    states = torch.randn(1, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(layer.top_k)[None]
    weights = torch.ones(1, layer.top_k)
    expected = torch.empty_like(states)
    layer.forward(states, ids, weights, expected)
    arrays = {name: array[: layer.top_k].to(device) for name, array in source.arrays.items()}
    grouping = Grouping(ids.to(device), weights.to(device), layer.num_experts, layer.hidden_size)
    rows = grouped_rows([states.to(device)], source.quantized)
    grouping.add(range(layer.top_k), source.bank(arrays), rows, gpu.lora())
    # A layer of zeros differs by zero.
    size = max(float(expected.norm()), torch.finfo(torch.float32).tiny)
    difference = float((grouping.total().cpu() - expected).norm()) / size
    return math.inf if math.isnan(difference) else difference


def _streaming(
    experts: GpuExperts,
    layers: Mapping[str, MoeLayer],
    threshold: int | Literal["auto"],
    max_qlen: int,
) -> int:
    """Tokens of a forward from which experts are streamed, 0 for never; pins memory if so."""
    if threshold == "auto":
        try:
            threshold = _measured_threshold(experts, layers, max_qlen)
        except torch.OutOfMemoryError:
            logger.info("Long prompts stay on the CPU: too little GPU memory to stream experts")
            threshold = 0
    if threshold:
        experts.pin()
        logger.info(
            "Prompts of %d tokens and more: the routed experts are streamed to the GPU, %.1f GB "
            "from pinned memory, %.1f GB through a buffer",
            threshold, experts.pinned_bytes / 1e9, experts.unpinned_bytes / 1e9,
        )  # fmt: skip
    else:
        experts.unpin()
        experts.stream.close_ring()
    return threshold


def _measured_threshold(experts: GpuExperts, layers: Mapping[str, MoeLayer], max_qlen: int) -> int:
    path, layer = next(iter(layers.items()))
    # The second layer is copied ahead: from memory that is not pinned the host would copy it, while
    # the first one waits (34 ms instead of 12 for 0.55 GB).
    experts.pin(layers=2)
    gpu = measure_gpu(experts, experts.layers[path], layer)
    cpu = measure_engine(layer, max_qlen)
    experts.layers[path].forget_counts()
    threshold = streaming_threshold(cpu, gpu, max_qlen)
    logger.info(
        "A layer's experts take %.1f ms for %d tokens on the CPU; streamed to the GPU (%.1f GB/s) "
        "%.1f ms for %d, %.1f ms for %d: %s",
        cpu.many[1] * 1e3, cpu.many[0], experts.layer_bytes(path) / gpu.few[1] / 1e9,
        gpu.few[1] * 1e3, gpu.few[0], gpu.many[1] * 1e3, gpu.many[0],
        f"faster from {threshold} tokens on" if threshold else "never faster",
    )  # fmt: skip
    return threshold


def prompt_bytes(layers: Mapping[str, MoeLayer], tokens: int) -> int:
    """GPU memory that a streamed prompt takes beyond its KV cache and what a block takes: the
    states of all tokens, and masks, which hold a byte for each pair of positions."""
    # In bfloat16 residual, input, result and rounded input, one byte a code, sums in float32; ids,
    # weights and their order; rotary embeddings.
    each = max(16 * layer.hidden_size + 40 * layer.top_k for layer in layers.values()) + 1024
    return tokens * each + tokens * tokens // 2


def _most_tokens(experts: GpuExperts, layers: Mapping[str, MoeLayer]) -> int:
    """Tokens of a prompt whose experts can be streamed together: whole blocks."""
    if not experts.threshold:
        return BLOCK_TOKENS
    room = PROMPT_SHARE * _free_memory(experts.device)[0]
    choices = range(MOST_TOKENS, BLOCK_TOKENS, -BLOCK_TOKENS)
    return next((n for n in choices if prompt_bytes(layers, n) <= room), BLOCK_TOKENS)


def _free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes free on the device, and all; none on a stand-in for a GPU."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free, total


def _fitting(experts: GpuExperts, layers: Mapping[str, MoeLayer]) -> int:
    """How many experts of each layer fit into the free memory, less what is kept for others."""
    free, total = _free_memory(experts.device)
    free -= max(RESERVED_BYTES, int(RESERVED_SHARE * total))
    if experts.threshold:
        # The bank that is computed, and what unpacking the next one makes on the way.
        free -= experts.stream.nbytes + 2 * experts.stream.unpacked_bytes
        free -= prompt_bytes(layers, experts.most_tokens)
    each = sum(experts.source(path).resident_bytes() for path in layers)
    most = min(layer.num_experts for layer in layers.values())
    return max(0, min(free // each, most))
