"""All that can be known of a load before the first weight is read: sizes, adapter, memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.adapter import BaseModel, plan_adapter
from ktrt.checkpoint.config import read_model_config
from ktrt.checkpoint.contents import check_contents, deepest_layer
from ktrt.checkpoint.folder import Checkpoint, find_expert_weights, holds_experts
from ktrt.checkpoint.kt_files import KtWeights
from ktrt.checkpoint.names import WeightNames
from ktrt.checkpoint.skeleton import build_skeleton
from ktrt.engine.build import build_engine, weight_format_of
from ktrt.engine.formats import BACKENDS
from ktrt.errors import CheckpointError
from ktrt.experts import find_experts, new_layer
from ktrt.folders import check_model_folder
from ktrt.loading.experts import ExpertSource, cache_folder, seems_cached
from ktrt.loading.memory import MemoryPlan, check_addresses, make_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ktrt.adapter import AdapterPlan
    from ktrt.checkpoint.config import ModelConfig
    from ktrt.checkpoint.skeleton import Skeleton
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.engine import Engine, MoeLayer
    from ktrt.experts import ExpertsSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model folder whose headers and shapes have been checked; no weight has been read.

    ``built``: the plain model on the meta device, and how its folder is read.
    """

    built: Skeleton
    names: WeightNames
    experts: ExpertSource


def open_base(model: ModelArgs, kt_weight_path: Path | None = None) -> BaseCheckpoint:
    """Looks at a model folder. ``CheckpointError`` if it is incomplete or has no routed experts;
    with ``kt_weight_path`` their weights may all be absent."""
    folder = model.model_name_or_path
    check_model_folder(folder, experts_elsewhere=kt_weight_path is not None)
    config = read_model_config(folder)
    check_addresses(folder)
    checkpoint = open_checkpoint(config, experts_elsewhere=kt_weight_path is not None)
    built = build_skeleton(folder, model.trust_remote_code, config, deepest_layer(checkpoint))
    skeleton = built.model
    specs = find_experts(skeleton)
    if not specs:
        raise CheckpointError(
            f"{folder}: {type(skeleton).__name__} has no routed experts that transformers runs "
            "through its experts interface; ktrt is for Mixture-of-Experts models."
        )
    names = WeightNames(skeleton)
    weights = {}
    if kt_weight_path is None or holds_experts(checkpoint, names, specs):
        weights = find_expert_weights(checkpoint, names, specs)
    check_contents(checkpoint, names, config)
    _log_files(checkpoint, config)
    return BaseCheckpoint(built, names, ExpertSource(checkpoint, specs, weights))


def open_checkpoint(config: ModelConfig, *, experts_elsewhere: bool = False) -> Checkpoint:
    """The tensors of the folder that ``config`` describes. ``CheckpointError``."""
    return Checkpoint(
        config.file.parent,
        config.quantization.block,
        config.weights,
        experts_elsewhere=experts_elsewhere,
    )


def _log_files(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """What lies in the folder and is not used; what config.json claims and the tensors are not."""
    files, method = checkpoint.files, config.quantization.method
    if files.ignored:
        logger.log(
            logging.WARNING if files.doubtful else logging.INFO,
            "%s: the weights are those of %s, as transformers takes them; ignored: %s",
            checkpoint.folder, files.main.name, ", ".join(files.ignored),
        )  # fmt: skip
    if method is not None and not checkpoint.is_quantized():
        logger.info(
            "%s: quantization_config says %s, but no tensor is quantised: read as they are",
            config.file, method,
        )  # fmt: skip


def open_adapter(args: AdapterArgs, base: BaseModel) -> AdapterPlan | None:
    """The one adapter that is configured, checked against the base; None for the base alone.
    ``ConfigError``: several, or one with a weight. ``AdapterError``."""
    folder = args.single()
    if folder is None:
        return None
    return _plan(folder, base, args)


def plan_memory(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> MemoryPlan:
    """What ``load_model`` with these arguments will take, without reading a weight of the base."""
    ready = prepare(model, adapter, experts)
    ready.engine.close()
    return ready.memory


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first weight is read; the engine's threads run.

    ``adapters``: the plans by name; ``adapter_base``: what further ones are checked against.
    """

    base: BaseCheckpoint
    adapters: dict[str, AdapterPlan]
    adapter_base: BaseModel
    kt_weights: KtWeights | None
    engine: Engine
    layers: dict[str, MoeLayer]
    memory: MemoryPlan


def prepare(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> Prepared:
    """Checks folder, adapter and kt_kernel's files by headers and shapes, starts the engine and
    plans memory. ``CheckpointError``, ``AdapterError``."""
    base = open_base(model, experts.kt_weight_path)
    adapter_base = base_of_adapters(base)
    plans = _plan_adapters(adapter, adapter_base)
    for plan in plans.values():
        plan.warn_of_format(weight_format_of(experts.kt_backend))
    kt_weights = open_kt_weights(experts, base.experts.specs)
    engine = build_engine(experts)
    try:
        layers = new_layers(engine, base.experts.specs, experts, kt_weights)
        sizes = [plan.planned_numel() for plan in plans.values()]
        lora = (sum(inside for inside, _ in sizes), sum(outside for _, outside in sizes))
        memory = make_plan(
            base.built.model,
            experts=_expert_bytes(engine, base.experts.specs, experts, layers),
            kt_backend=experts.kt_backend,
            expert_paths=[spec.path for spec in base.experts.specs],
            layer_source=_layer_source(base.experts, layers, experts),
            mapped_files=check_addresses(model.model_name_or_path),
            workspace=engine.workspace_bytes,
            lora=lora,
            infer_dtype=model.infer_dtype,
            int8=model.quantization_bit == 8,
            mapped=not base.experts.checkpoint.is_quantized(),
        )
    except BaseException:
        engine.close()
        raise
    return Prepared(base, plans, adapter_base, kt_weights, engine, layers, memory)


def _layer_source(source: ExpertSource, layers: Mapping[str, MoeLayer], experts: ExpertArgs) -> int:
    """Bytes that are mapped beside the experts while they are loaded: a layer of the checkpoint in
    BF16, or of a cache that is copied, which is sure where there are several NUMA parts."""
    root = cache_folder(experts, quiet=True) if experts.kt_weight_path is None else None
    if root is None or not seems_cached(root, source, layers):
        return 2 * max(spec.num_weights for spec in source.specs)
    images = [list(layer.image_bytes) for layer in layers.values()]
    return max(sum(parts) for parts in images) if len(images[0]) > 1 else 0


def _expert_bytes(
    engine: Engine,
    specs: Sequence[ExpertsSpec],
    experts: ExpertArgs,
    layers: Mapping[str, MoeLayer],
) -> dict[str, int]:
    """Bytes of the packed experts by kt_backend; layers without experts take no memory."""
    sizes: dict[str, Mapping[str, MoeLayer]] = {experts.kt_backend: layers}
    for backend in BACKENDS:
        if backend not in sizes:
            sizes[backend] = {spec.path: new_layer(engine, spec, backend) for spec in specs}
    return {name: sum(sum(each.image_bytes) for each in of.values()) for name, of in sizes.items()}


def open_kt_weights(experts: ExpertArgs, specs: Sequence[ExpertsSpec]) -> KtWeights | None:
    """kt_kernel's files, if kt_weight_path names them. ``CheckpointError`` if they do not fit."""
    if experts.kt_weight_path is None:
        return None
    return KtWeights(experts.kt_weight_path, specs, weight_format_of(experts.kt_backend))


def new_layers(
    engine: Engine,
    specs: Sequence[ExpertsSpec],
    experts: ExpertArgs,
    kt_weights: KtWeights | None = None,
) -> dict[str, MoeLayer]:
    """An empty layer for every experts module, by path."""
    slices = kt_weights.parts if kt_weights else 1
    return {spec.path: new_layer(engine, spec, experts.kt_backend, slices) for spec in specs}


def base_of_adapters(base: BaseCheckpoint) -> BaseModel:
    """What adapters are checked against."""
    modules = {
        (path, expert, projection): name
        for path, layer in base.experts.weights.items()
        for (expert, projection), name in layer.modules().items()
    }
    return BaseModel(base.built.model, base.experts.specs, base.names, modules)


def _plan_adapters(args: AdapterArgs, base: BaseModel) -> dict[str, AdapterPlan]:
    return {name: _plan(folder, base, args) for name, folder in args.folders.items()}


def _plan(folder: Path, base: BaseModel, args: AdapterArgs) -> AdapterPlan:
    return plan_adapter(
        folder,
        base,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        packing=args.lora_B_layout,
    )
