"""A transformers model whose routed experts run in ktrt's engine, with an adapter applied."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from ktrt.adapter import words_of
from ktrt.adapter.residents import Adapters
from ktrt.engine import release_file_pages
from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.recording import RecordedSteps
from ktrt.engine.step_rows import RunningStep
from ktrt.errors import engine_errors
from ktrt.experts import KTExperts, build_gpu_experts, new_hand_off
from ktrt.generate.device_memory import let_segments_grow
from ktrt.generate.graphs import CudaGraphs, DecodeGraphs, NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.kv.static import unusual_layers
from ktrt.layers.attention import accelerate_attention
from ktrt.layers.coded import coded_linears
from ktrt.layers.cuda_linear import FusedLora
from ktrt.layers.embedding import tables_to_host
from ktrt.layers.latent import use_latents
from ktrt.layers.linear import accelerate, int8_bytes
from ktrt.layers.linear_attention import accelerate_linear_attention
from ktrt.layers.norm import accelerate_norms
from ktrt.layers.row_products import use_row_products
from ktrt.loading.experts import cache_folder, load_experts
from ktrt.loading.fill import load_without_experts
from ktrt.loading.gpu_attention import accelerate_on_gpu, kernels_beside
from ktrt.loading.plan import prepare
from ktrt.loading.step_bytes import bytes_per_token
from ktrt.prompt.fit import context_limit
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import nn

    from ktrt.adapter import AdapterPlan, Audit
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.engine import Engine
    from ktrt.engine.active_set import ActiveSet
    from ktrt.experts import ExpertsSpec, GpuExperts, HandOff
    from ktrt.kv.static import StaticKv
    from ktrt.loading.plan import BaseCheckpoint, Prepared

logger = logging.getLogger(__name__)
# The block that users of LLaMA-Factory with KTransformers look for: complete at level DEBUG.
debug_logger = logging.getLogger("ktrt.debug")
# LoRA parameters that it lists at other levels; V2-Lite has more than 360.
_SHOWN_LORA = 2
# Positions that a slot of the KV cache reserves addresses for; more are another allocation.
_MOST_RESERVED = 1 << 20


@dataclass
class LoadedModel:
    """``model`` is transformers' own class with the experts replaced and PEFT's layers injected, in
    eval mode, without gradients; ``adapters`` holds what is resident, and the configured ones are
    active; ``audit`` says what each tensor of the first one acts on.

    ``patches`` are the changes to other libraries' objects, undone by ``close``. ``graphs`` makes
    the graphs that decode on a cache (None: the model runs every step). On a GPU ``hand_off``
    connects the experts with it, and ``gpu`` is its share of the routed experts, if it has one."""

    model: nn.Module
    adapters: Adapters
    engine: Engine
    patches: Patches
    hand_off: HandOff | None = None
    graphs: Callable[..., DecodeGraphs] | None = None
    gpu: GpuExperts | None = None
    # Positions of a slot of the KV cache; None: its memory grows.
    capacity: int | None = None
    # The step that runs, for the model's layers; None: they look at nothing.
    running: RunningStep | None = None
    recorder: RecordedSteps | None = None
    # A GPU's LoRA, and what makes the graphs of many rows there.
    linears: FusedLora | None = None
    row_graphs: Callable[[StaticKv, RunningStep], RowGraphs] | None = None
    # Bytes that keys and values may take; None: no bound.
    kv_budget: int | None = None
    # The folder that it was loaded from.
    base: BaseCheckpoint | None = None

    @property
    def audit(self) -> Audit:
        """The audit of the first adapter; empty for the base model."""
        return self.adapters.audit(next(iter(self.adapters.names), None))

    @cached_property
    def runner(self) -> ModelRunner:
        """Runs the model on slots of one KV pool, by the graphs and with the GPU's share, if
        any."""
        return ModelRunner(
            self.model, self.graphs, self.gpu, self.adapters.active_set, running=self.running,
            maker=self.recorder, row_graphs=self.row_graphs, linears=self.linears,
            capacity=self.capacity, budget=self.kv_budget,
        )  # fmt: skip

    def new_cache(self) -> KvCache:
        """Returns a client of the runner that holds nothing."""
        return KvCache(self.model, runner=self.runner)

    def bytes_per_token(self) -> int | None:
        """Bytes of weights that decoding a token reads from the CPU's memory, with the adapter as
        it is now; None if experts live on a GPU too."""
        return bytes_per_token(self.model)

    def close(self) -> None:
        """Stops the engine's threads, frees the experts and leaves transformers as it was; the
        model cannot run afterwards."""
        _close(self.patches, self.hand_off, self.gpu, self.engine)


def _close(
    patches: Patches, hand_off: HandOff | None, gpu: GpuExperts | None, engine: Engine
) -> None:
    """Undoes and closes in this order; a failure stops none of the later ones."""
    with ExitStack() as last_first:
        last_first.callback(engine.close)
        for each in (gpu, hand_off):
            if each is not None:
                last_first.callback(each.close)
        last_first.callback(patches.undo)


@engine_errors()
def load_model(
    model: ModelArgs,
    adapter: AdapterArgs,
    experts: ExpertArgs,
    only_layers: Collection[int] | None = None,
    *,
    check_vocabulary: Callable[[int], object] | None = None,
) -> LoadedModel:
    """Loads base and adapters: attention, router, shared experts and head on the GPU if there is
    one, else on the CPU, as the tables of embeddings; routed experts in the engine.
    ``only_layers``: the routed experts of these layers alone, packed again; the others get their
    LoRA, but cannot run. ``check_vocabulary`` is called with the most rows of embeddings that base
    and adapters have, and may raise.

    Everything that headers and shapes can tell is checked before the first weight is read. Raises
    ``CheckpointError`` or ``AdapterError`` naming file and tensor, what was found and expected.
    """
    device = _device()
    logger.info("Loading model with KTransformers MoE backend")
    ready = prepare(model, adapter, experts)
    engine, specs = ready.engine, ready.base.experts.specs
    hand_off, gpu, patches, running = None, None, Patches(), RunningStep()
    masks = RankMasks(running)
    try:
        if check_vocabulary is not None:
            check_vocabulary(_vocabulary(ready))
        if only_layers is None:
            ready.memory.check()
        hand_off = new_hand_off(engine, device)
        loaded = load_without_experts(ready.base, model.infer_dtype, device)
        tables_to_host(loaded)
        limit = context_limit(loaded)
        beside = kernels_beside(loaded, engine, limit, running, masks)
        with beside if only_layers is None else nullcontext():  # a part cannot run
            _load_experts(ready, experts, only_layers)
        _attach(loaded, ready, hand_off, running)
        adapters = _apply_adapters(ready, loaded, adapter.start_weights)
        if only_layers is None:
            gpu = _share_with_gpu(engine, loaded, specs, experts, device, running, masks, hand_off)
        loaded.eval().requires_grad_(False)
        changes = adapters.active_set, patches
        int8 = model.quantization_bit == 8
        linears = _accelerate(loaded, engine, *changes, device, running, masks, int8=int8)
        for file in ready.base.experts.files() if int8 or any(coded_linears(loaded)) else ():
            release_file_pages(str(file))  # what was packed is not read any more
        _log_result(loaded, specs, ready.adapters)
        graphs = _graphs(loaded, hand_off, patches, running, wanted=experts.kt_use_cuda_graph)
        recorder = RecordedSteps() if hand_off is None else None
        row_graphs: Callable[[StaticKv, RunningStep], RowGraphs] | None = None
        if hand_off is not None and graphs is not None:
            row_graphs = partial(RowGraphs, loaded, handoff=hand_off, maker=CudaGraphs())
    except BaseException:
        _close(patches, hand_off, gpu, engine)
        raise
    capacity = min(limit, _MOST_RESERVED)
    return LoadedModel(
        loaded, adapters, engine, patches, hand_off, graphs, gpu, capacity, running, recorder,
        linears, row_graphs, ready.memory.kv_budget(), ready.base,
    )  # fmt: skip


def _vocabulary(ready: Prepared) -> int:
    return max(
        [words_of(ready.base.built.model), *(p.vocabulary or 0 for p in ready.adapters.values())]
    )


def _load_experts(ready: Prepared, args: ExpertArgs, only_layers: Collection[int] | None) -> None:
    source, layers, root = ready.base.experts, ready.layers, cache_folder(args)
    if only_layers is not None:
        specs = [spec for spec in source.specs if spec.layer in only_layers]
        source, root = replace(source, specs=specs), None
        layers = {spec.path: layers[spec.path] for spec in specs}
    load_experts(source, layers, root, ready.kt_weights)


def _accelerate(
    model: nn.Module,
    engine: Engine,
    active_set: ActiveSet,
    patches: Patches,
    device: torch.device,
    running: RunningStep,
    masks: RankMasks,
    *,
    int8: bool,
) -> FusedLora | None:
    """Patches the forwards of the layers outside the experts, which stay transformers' and PEFT's,
    with faster ones. Returns a GPU's."""
    if device.type == "cuda":
        if int8:
            logger.warning(
                "quantization_bit: 8 has no effect with a GPU, where the layers outside the "
                "experts stay %s: it makes those on the CPU INT8", model.dtype,
            )  # fmt: skip
        accelerate_on_gpu(model, engine, patches, running, masks)
        return FusedLora(model, active_set, patches, masks)
    accelerate_linear_attention(model, engine, patches)
    accelerate_attention(model, engine, patches, running)
    accelerate_norms(model, patches, engine)
    accelerate(model, engine, active_set, patches, int8=int8, running=running)
    use_row_products(model, engine, patches)
    if int8:
        _log_int8(model)
    use_latents(model, engine, patches, running)
    return None


def _log_int8(model: nn.Module) -> None:
    sizes = int8_bytes(model)
    if not sizes:
        logger.warning(
            "quantization_bit: 8 has no effect: no linear layer is bfloat16 (the model is %s); set "
            "infer_dtype: bfloat16", model.dtype,
        )  # fmt: skip
        return
    logger.info(
        "quantization_bit: 8: %d linear layers outside the experts in INT8, %.2f GB",
        len(sizes), sum(sizes.values()) / 1e9,
    )  # fmt: skip


def _device() -> torch.device:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, for everything but the routed experts."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    logger.info(
        "GPU: %s (CUDA_VISIBLE_DEVICES %s) runs everything but the routed experts",
        torch.cuda.get_device_name(device), os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
    )  # fmt: skip
    let_segments_grow(device)
    return device


def _graphs(
    model: Any,
    hand_off: HandOff | None,
    patches: Patches,
    running: RunningStep,
    *,
    wanted: bool,
) -> Callable[..., DecodeGraphs] | None:
    """The maker of the graphs of decode steps: recorded on the CPU, CUDA's with a hand-off; None,
    with a log line, where there are none."""
    if hand_off is None:
        maker = RecordedSteps()
        return partial(DecodeGraphs, model, handoff=NoHandOff(), maker=maker, running=running)
    hand_off.guard(model, patches)
    reason = "kt_use_cuda_graph is false"
    if wanted:
        unusual = unusual_layers(model)
        reason = f"the model's KV cache has layers that are not plain ({', '.join(unusual)})"
        if not unusual:
            logger.info("Each decode step is one CUDA graph, hand-offs to the CPU included")
            return partial(
                DecodeGraphs, model, handoff=hand_off, maker=CudaGraphs(), running=running
            )
    logger.info("Every decode step is launched by the host, without a CUDA graph: %s", reason)
    return None


def _attach(
    model: nn.Module, ready: Prepared, hand_off: HandOff | None, running: RunningStep
) -> None:
    """Gives every experts module its packed layer, and that layer the biases, which are in no pack
    cache."""
    for path, layer in ready.layers.items():
        weights = ready.base.experts.weights.get(path)
        if weights is not None and (biases := weights.biases()):
            layer.set_biases(**biases)
        module = model.get_submodule(path)
        assert isinstance(module, KTExperts), f"{path} was not replaced"
        module.attach(layer, ready.engine.max_qlen, hand_off, path, running)


def _apply_adapters(ready: Prepared, model: nn.Module, weights: Mapping[str, float]) -> Adapters:
    """Makes the planned adapters resident and activates the ones in ``weights``."""
    specs = ready.base.experts.specs
    experts: dict[str, Any] = {spec.path: model.get_submodule(spec.path) for spec in specs}
    adapters = Adapters(model, experts, ready.adapter_base)
    for name, plan in ready.adapters.items():
        _apply_adapter(adapters, name, plan, specs)
    if weights:
        adapters.activate(weights)
    if len(ready.adapters) > 1:
        logger.info(
            "Adapters %s are resident; active: %s", ", ".join(adapters.names),
            ", ".join(f"{name} ({weight:g})" for name, weight in adapters.active.items()),
        )  # fmt: skip
    return adapters


def _apply_adapter(
    adapters: Adapters, name: str, plan: AdapterPlan, specs: Sequence[ExpertsSpec]
) -> None:
    """Gives the engine and PEFT their tensors. ``AdapterError`` if one is left over."""
    original, filtered = plan.targets()
    mlp = any("." in name for name in filtered)
    logger.info(
        "KT mode: Loading %s LoRA with PEFT, MoE LoRA in the engine. Original targets: %s, "
        "Filtered: %s", "Attention and dense MLP" if mlp else "only Attention", original, filtered,
    )  # fmt: skip
    logger.info("Loading MoE LoRA from %s", plan.files.file)
    adapters.add(name, plan)
    layers = sum(spec.path in plan.experts for spec in specs)
    logger.info("Loaded MoE LoRA into %d KT wrappers from %s", layers, plan.files.folder)
    logger.info("Loaded adapter(s): %s", plan.files.folder)
    if logger.isEnabledFor(logging.INFO):
        logger.info("Adapter audit\n%s", plan.audit.table())


def _share_with_gpu(
    engine: Engine,
    model: nn.Module,
    specs: Sequence[ExpertsSpec],
    args: ExpertArgs,
    device: torch.device,
    running: RunningStep,
    masks: RankMasks,
    hand_off: HandOff | None,
) -> GpuExperts | None:
    """Gives the GPU its share of the routed experts, if it takes any."""
    modules: dict[str, Any] = {spec.path: model.get_submodule(spec.path) for spec in specs}
    return build_gpu_experts(modules, device, args, engine.max_qlen, running, masks, hand_off)


def _log_result(
    model: nn.Module, specs: Sequence[ExpertsSpec], plans: Mapping[str, AdapterPlan]
) -> None:
    lora = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    count = sum(p.numel() for p in model.parameters()) + sum(spec.num_weights for spec in specs)
    count += sum(plan.expert_lora_numel() for plan in plans.values())
    logger.info("trainable params: 0 || all params: %s || trainable%%: 0.0000", f"{count:,}")
    with_lora = {path for plan in plans.values() for path in plan.experts}
    layers = [spec.layer for spec in specs if spec.path in with_lora]
    line = "=" * 60
    lines = [line, "DEBUG: Model structure after loading", line]
    lines += [f"KT wrappers count: {len(specs)}", f"KT MoE LoRA layers: {layers}", ""]
    lines += [f"LoRA parameters count: {len(lora)}", "LoRA parameters:"]
    parameters = [f"  base_model.model.{name}: {p.shape}" for name, p in lora.items()]
    if len(parameters) > _SHOWN_LORA and not debug_logger.isEnabledFor(logging.DEBUG):
        parameters[_SHOWN_LORA:] = [f"  … {len(parameters) - _SHOWN_LORA} more; -v shows all"]
    lines += parameters
    lines += ["", f"PEFT config: {getattr(model, 'peft_config', {})}", line]
    debug_logger.info("%s", "\n".join(lines))
