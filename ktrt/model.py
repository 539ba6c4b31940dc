"""A transformers model whose routed experts run in ktrt's engine, with an adapter applied."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.adapter import Audit, BaseModel, plan_adapter
from ktrt.checkpoint import Checkpoint, find_expert_weights
from ktrt.checkpoint_names import WeightNames
from ktrt.decode_graph import CudaGraphs, DecodeGraphs
from ktrt.dequantized import dequantized_source
from ktrt.errors import CheckpointError
from ktrt.kv_cache import unusual_layers
from ktrt.moe import (
    KTExperts,
    build_engine,
    build_gpu_experts,
    experts_replaced,
    find_experts,
    new_hand_off,
    new_layer,
)
from ktrt.skeleton import build_skeleton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from ktrt.adapter import AdapterPlan
    from ktrt.checkpoint import ExpertWeights
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.kv_cache import StaticKv
    from ktrt.moe import Engine, ExpertsSpec, GpuExperts, HandOff
    from ktrt.skeleton import Skeleton

logger = logging.getLogger(__name__)
# The block that users of LLaMA-Factory with KTransformers look for.
debug_logger = logging.getLogger("ktrt.debug")


@dataclass
class LoadedModel:
    """``model`` is transformers' own class with the experts replaced and PEFT's layers injected, in
    eval mode, without gradients; ``audit`` says what each tensor of the adapter acts on.

    On a GPU ``hand_off`` connects the experts with it, ``graphs`` makes the CUDA graphs that decode
    on a cache (None: each step is launched by the host), and ``gpu`` is the GPU's share of the
    routed experts, if it has one."""

    model: nn.Module
    audit: Audit
    engine: Engine
    hand_off: HandOff | None = None
    graphs: Callable[[StaticKv], DecodeGraphs] | None = None
    gpu: GpuExperts | None = None

    def close(self) -> None:
        """Stops the engine's threads and frees the experts; the model cannot run afterwards."""
        if self.hand_off is not None:
            self.hand_off.close()
        if self.gpu is not None:
            self.gpu.close()
        self.engine.close()


def load_model(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> LoadedModel:
    """Loads base and adapter: attention, router, shared experts, embeddings and head on the GPU if
    there is one, else on the CPU; routed experts in the engine.

    Everything that headers and shapes can tell is checked before the first weight is read. Raises
    ``CheckpointError`` or ``AdapterError`` naming file and tensor, what was found and expected.
    """
    folder = model.model_name_or_path
    device = _device()
    logger.info("Loading model with KTransformers MoE backend")
    built = build_skeleton(folder, model.trust_remote_code)
    skeleton = built.model
    specs = find_experts(skeleton)
    if not specs:
        raise CheckpointError(
            f"{folder}: {type(skeleton).__name__} has no routed experts that transformers runs "
            "through its experts interface; ktrt is for Mixture-of-Experts models."
        )
    checkpoint, names = Checkpoint(folder, built.weight_block_size), WeightNames(skeleton)
    weights = find_expert_weights(checkpoint, names, specs)
    plan = _plan_adapter(adapter, skeleton, specs, names, weights)
    loaded = _load_without_experts(built, specs, checkpoint, names, model.infer_dtype, device)
    engine = build_engine(experts)
    hand_off = None
    try:
        hand_off = new_hand_off(engine, device)
        _load_experts(engine, loaded, specs, weights, experts.kt_backend, hand_off)
        audit = _apply_adapter(plan, loaded, specs) if plan else Audit()
        gpu = _share_with_gpu(engine, loaded, specs, experts, device)
    except BaseException:
        if hand_off is not None:
            hand_off.close()
        engine.close()
        raise
    loaded.eval().requires_grad_(False)
    _log_result(loaded, specs, plan)
    graphs = None
    if hand_off is not None:
        hand_off.guard(loaded)
        graphs = _graphs(loaded, hand_off, experts.kt_use_cuda_graph)
    return LoadedModel(loaded, audit, engine, hand_off, graphs, gpu)


def _device() -> torch.device:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, for everything but the routed experts."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    logger.info(
        "GPU: %s (CUDA_VISIBLE_DEVICES %s) runs everything but the routed experts",
        torch.cuda.get_device_name(device), os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
    )  # fmt: skip
    return device


def _graphs(
    model: Any, hand_off: HandOff, wanted: bool
) -> Callable[[StaticKv], DecodeGraphs] | None:
    """What makes the CUDA graphs of decode steps; None, with a log line, where there are none."""
    reason = "kt_use_cuda_graph is false"
    if wanted:
        unusual = unusual_layers(model.config)
        reason = f"the model's KV cache has layers that are not plain ({', '.join(unusual)})"
        if not unusual:
            logger.info("Each decode step is one CUDA graph, hand-offs to the CPU included")
            return lambda cache: DecodeGraphs(model, cache, hand_off, CudaGraphs())
    logger.info("Every decode step is launched by the host, without a CUDA graph: %s", reason)
    return None


def _plan_adapter(
    adapter: AdapterArgs,
    skeleton: nn.Module,
    specs: Sequence[ExpertsSpec],
    names: WeightNames,
    weights: Mapping[str, ExpertWeights],
) -> AdapterPlan | None:
    if adapter.adapter_name_or_path is None:
        return None
    modules = {
        (path, expert, projection): name
        for path, layer in weights.items()
        for (expert, projection), name in layer.modules().items()
    }
    return plan_adapter(
        adapter.adapter_name_or_path,
        BaseModel(skeleton, specs, names, modules),
        lora_rank=adapter.lora_rank,
        lora_alpha=adapter.lora_alpha,
    )


def _load_without_experts(
    built: Skeleton,
    specs: Sequence[ExpertsSpec],
    checkpoint: Checkpoint,
    names: WeightNames,
    infer_dtype: str,
    device: torch.device,
) -> nn.Module:
    """All weights but the routed experts', which are never materialised in torch."""
    skeleton = built.model
    model_class: Any = type(skeleton)
    parameters = r"(gate_up_proj|up_proj|down_proj)(_bias)?"
    experts = [rf"^{path}\.{parameters}$" for path in _escaped(specs)]
    if checkpoint.is_quantized():
        source = dequantized_source(skeleton, specs, checkpoint, names, infer_dtype)
    else:
        dtype = "auto" if infer_dtype == "auto" else getattr(torch, infer_dtype)
        source = {"pretrained_model_name_or_path": checkpoint.folder, "dtype": dtype}
    try:
        with experts_replaced({s.class_name for s in specs}), _unexpected(model_class, experts):
            model, info = model_class.from_pretrained(
                **source,
                device_map={"": str(device)} if device.type != "cpu" else None,
                trust_remote_code=built.trust,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {_wrong_shapes(skeleton, checkpoint, names) or error}"
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(info[what]):
            raise CheckpointError(
                f"{checkpoint.folder}: {len(keys)} {what.replace('_', ' ')} for "
                f"{model_class.__name__}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}. "
                "The folder is incomplete or its config.json is of another model."
            )
    loaded: nn.Module = model
    return loaded


def _escaped(specs: Iterable[ExpertsSpec]) -> list[str]:
    return [spec.path.replace(".", r"\.") for spec in specs]


@contextmanager
def _unexpected(model_class: Any, patterns: list[str]) -> Iterator[None]:
    """transformers loads in silence: these keys are expected to find no parameter, and a report on
    others would come before the error that says the same."""
    from transformers.utils import logging as library

    before, bars = model_class._keys_to_ignore_on_load_unexpected, library.is_progress_bar_enabled()
    level = library.get_verbosity()
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), *patterns]
    library.set_verbosity_error()
    if not sys.stderr.isatty():
        library.disable_progress_bar()
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def _wrong_shapes(skeleton: nn.Module, checkpoint: Checkpoint, names: WeightNames) -> str:
    """The tensors whose shape is not their parameter's; empty if there are none."""
    wrong = []
    parameters = skeleton.state_dict()
    for name in checkpoint.names():
        target = names.target(name)
        plain = target.expert is None and not target.changed
        parameter = parameters.get(target.name) if plain else None
        if parameter is not None and checkpoint.shape(name) != tuple(parameter.shape):
            wrong.append(
                f"{name} has shape {list(checkpoint.shape(name))}, expected "
                f"{list(parameter.shape)} by config.json"
            )
    return "; ".join(wrong[:5])


def _load_experts(
    engine: Engine,
    model: nn.Module,
    specs: Sequence[ExpertsSpec],
    weights: Mapping[str, ExpertWeights],
    kt_backend: str,
    hand_off: HandOff | None,
) -> None:
    start, packed = time.perf_counter(), 0
    for spec in _progress(specs):
        layer = new_layer(engine, spec, kt_backend)
        for expert in range(spec.num_experts):
            layer.load_expert(expert, *weights[spec.path].read(expert))
        if biases := weights[spec.path].biases():
            layer.set_biases(**biases)
        module = model.get_submodule(spec.path)
        assert isinstance(module, KTExperts), f"{spec.path} was not replaced"
        module.attach(layer, engine.max_qlen, hand_off, spec.path)
        packed += layer.packed_bytes
    seconds = time.perf_counter() - start
    logger.info(
        "Packed %d experts of %d layers: %.2f GB in %.1f s (%.2f GB/s)",
        sum(spec.num_experts for spec in specs), len(specs), packed / 1e9, seconds,
        packed / 1e9 / seconds,
    )  # fmt: skip


def _progress(specs: Sequence[ExpertsSpec]) -> Iterable[ExpertsSpec]:
    """The layers, with a progress bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        return specs
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(specs, description="Packing experts", console=console, transient=True)


def _apply_adapter(plan: AdapterPlan, model: nn.Module, specs: Sequence[ExpertsSpec]) -> Audit:
    """Gives the engine and PEFT their tensors. ``AdapterError`` if one is left over."""
    original, filtered = plan.targets()
    mlp = any("." in name for name in filtered)
    logger.info(
        "KT mode: Loading %s LoRA with PEFT, MoE LoRA in the engine. Original targets: %s, "
        "Filtered: %s", "Attention and dense MLP" if mlp else "only Attention", original, filtered,
    )  # fmt: skip
    plan.apply_to_torch(model)
    logger.info("Loading MoE LoRA from %s", plan.files.file)
    layers = 0
    for spec in specs:
        if arguments := plan.engine_arguments(spec.path):
            module = model.get_submodule(spec.path)
            assert isinstance(module, KTExperts), f"{spec.path} was not replaced"
            module.layer.set_lora(**arguments)
            plan.mark_experts(spec.path)
            layers += 1
    logger.info("Loaded MoE LoRA into %d KT wrappers from %s", layers, plan.files.folder)
    plan.audit.check()
    logger.info("Loaded adapter(s): %s", plan.files.folder)
    logger.info("Adapter audit\n%s", plan.audit.table())
    return plan.audit


def _share_with_gpu(
    engine: Engine,
    model: nn.Module,
    specs: Sequence[ExpertsSpec],
    args: ExpertArgs,
    device: torch.device,
) -> GpuExperts | None:
    """Gives the GPU its share of the routed experts, ``kt_gpu_experts`` of the model."""
    modules: dict[str, Any] = {spec.path: model.get_submodule(spec.path) for spec in specs}
    gpu = build_gpu_experts(modules, device, args, engine.max_qlen)
    if gpu is not None:
        model.kt_gpu_experts = gpu  # type: ignore[assignment]
    return gpu


def _log_result(model: nn.Module, specs: Sequence[ExpertsSpec], plan: AdapterPlan | None) -> None:
    lora = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    count = sum(p.numel() for p in model.parameters()) + sum(spec.num_weights for spec in specs)
    count += plan.expert_lora_numel() if plan else 0
    logger.info("trainable params: 0 || all params: %s || trainable%%: 0.0000", f"{count:,}")
    layers = [spec.layer for spec in specs if plan and plan.engine_arguments(spec.path)]
    line = "=" * 60
    lines = [line, "DEBUG: Model structure after loading", line]
    lines += [f"KT wrappers count: {len(specs)}", f"KT MoE LoRA layers: {layers}", ""]
    lines += [f"LoRA parameters count: {len(lora)}", "LoRA parameters:"]
    lines += [f"  base_model.model.{name}: {p.shape}" for name, p in lora.items()]
    lines += ["", f"PEFT config: {getattr(model, 'peft_config', {})}", line]
    debug_logger.info("%s", "\n".join(lines))
