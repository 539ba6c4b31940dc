"""Plans a load before the first weight is read: sizes, adapters, bytes, memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.adapter import BaseModel, plan_adapter
from ktrt.checkpoint.config import read_model_config
from ktrt.checkpoint.contents import check_contents, deepest_layer
from ktrt.checkpoint.experts import find_expert_weights, holds_experts
from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.kt_files import KtWeights
from ktrt.checkpoint.names import WeightNames
from ktrt.checkpoint.skeleton import build_skeleton
from ktrt.engine.build import build_engine
from ktrt.engine.formats import AUTO, PLAIN, format_of
from ktrt.errors import CheckpointError
from ktrt.experts import find_experts, new_layer
from ktrt.folders import check_model_folder
from ktrt.loading.coded_linears import coded_sizes, coded_tensors, dequantised_weights
from ktrt.loading.experts import ExpertSource, cache_folder, seems_cached
from ktrt.loading.formats import choose_formats, own_formats, possible_formats, saving_note
from ktrt.loading.inventory import planned_inventory
from ktrt.loading.lora_sizes import LoraSize
from ktrt.loading.memory import MemoryPlan, check_addresses, make_plan
from ktrt.machine.memory import gpu_limit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ktrt.adapter import AdapterPlan
    from ktrt.checkpoint.config import ModelConfig
    from ktrt.checkpoint.skeleton import Skeleton
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.engine import Engine, MoeLayer
    from ktrt.experts import ExpertsSpec
    from ktrt.loading.formats import ExpertFormats
    from ktrt.loading.inventory import Inventory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model folder whose headers and shapes have been checked; no weight has been read.

    ``built`` has the plain model on the meta device and the way to read its folder.
    """

    built: Skeleton
    names: WeightNames
    experts: ExpertSource


def open_base(model: ModelArgs, kt_weight_path: Path | None = None) -> BaseCheckpoint:
    """Checks a model folder. ``CheckpointError`` if it is incomplete or has no routed experts; with
    ``kt_weight_path`` the experts' weights may be absent."""
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
    """Opens the tensors of the folder that ``config`` describes. ``CheckpointError``."""
    return Checkpoint(
        config.file.parent,
        config.quantization,
        config.weights,
        experts_elsewhere=experts_elsewhere,
    )


def _log_files(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Logs unused files of the folder, and a quantisation that config.json claims wrongly."""
    files, method = checkpoint.files, config.quantization.method
    if files.ignored:
        logger.log(
            logging.WARNING if files.doubtful else logging.INFO,
            "%s: the weights are read from %s, as transformers does; ignored: %s",
            checkpoint.folder, files.main.name, ", ".join(files.ignored),
        )  # fmt: skip
    if method is not None and not checkpoint.is_quantized():
        logger.info(
            "%s: quantization_config says %s, but no tensor is quantised: they are read as they "
            "are",
            config.file, method,
        )  # fmt: skip


def open_adapter(args: AdapterArgs, base: BaseModel) -> AdapterPlan | None:
    """Plans the configured adapter and checks it against the base; None without one.
    ``ConfigError``: several, or one with a weight. ``AdapterError``."""
    folder = args.single()
    if folder is None:
        return None
    return _plan(folder, base, args)


def plan_memory(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> MemoryPlan:
    """Plans the memory of ``load_model`` with these arguments; reads no weight of the base."""
    ready = prepare(model, adapter, experts)
    ready.engine.close()
    return ready.memory


@dataclass(frozen=True)
class Prepared:
    """The result of ``prepare``; the engine's threads run.

    ``adapters`` has the plans by name; further adapters are checked against ``adapter_base``.
    ``formats`` has the formats of ``layers``; ``inventory`` has the routed experts in every format
    that this checkpoint can run in.
    """

    base: BaseCheckpoint
    adapters: dict[str, AdapterPlan]
    adapter_base: BaseModel
    kt_weights: KtWeights | None
    engine: Engine
    layers: dict[str, MoeLayer]
    formats: ExpertFormats
    inventory: Inventory
    memory: MemoryPlan


def prepare(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> Prepared:
    """Checks folder, adapter and kt_kernel's files by headers and shapes, starts the engine and
    plans memory. ``CheckpointError``, ``AdapterError``."""
    base = open_base(model, experts.kt_weight_path)
    adapter_base = base_of_adapters(base)
    plans = _plan_adapters(adapter, adapter_base)
    kt_weights = open_kt_weights(experts, base.experts.specs)
    formats = choose_formats(experts.kt_backend, base.experts)
    for plan in plans.values():
        plan.warn_of_training(formats.kt_name, base.experts.checkpoint.folder)
    engine = build_engine(experts, formats.by_path.values())
    try:
        layers = new_layers(engine, base.experts.specs, formats, kt_weights)
        gpu = gpu_limit()
        all_layers = _layers_by_backend(engine, base.experts, formats, layers)
        inventory = planned_inventory(
            base.built.model,
            base.experts.specs,
            all_layers,
            infer_dtype=model.infer_dtype,
            int8=model.quantization_bit == 8 and gpu is None,
            dequantised=dequantised_weights(base.built.model, base.experts.checkpoint, base.names),
            gpu=gpu is not None,
            coded=_coded_sizes(base, model.infer_dtype),
            loras=[
                LoraSize(
                    *plan.planned_numel(),
                    router_values=plan.router_numel(),
                    expert_bytes=plan.engine_bytes(),
                    linears=plan.linear_ranks(),
                    active=name in adapter.start_weights,
                )
                for name, plan in plans.items()
            ],
            workspace=engine.workspace_bytes,
        )
        memory = make_plan(
            inventory,
            base.built.model.config,
            formats.kt_backend,
            layer_source=_layer_source(base.experts, all_layers, layers, experts),
            mapped_files=check_addresses(model.model_name_or_path),
            gpu=gpu,
        )
        if kt_weights is None:
            _log_notes(formats, base.experts, inventory)
    except BaseException:
        engine.close()
        raise
    return Prepared(
        base, plans, adapter_base, kt_weights, engine, layers, formats, inventory, memory
    )


def _coded_sizes(base: BaseCheckpoint, infer_dtype: str) -> dict[str, tuple[str, int]]:
    checkpoint, specs = base.experts.checkpoint, base.experts.specs
    tensors = coded_tensors(base.built.model, specs, checkpoint, base.names, infer_dtype)
    return coded_sizes(checkpoint, tensors)


def _layer_source(
    source: ExpertSource,
    by_backend: Mapping[str, Mapping[str, MoeLayer]],
    layers: Mapping[str, MoeLayer],
    experts: ExpertArgs,
) -> int:
    """Returns the bytes that are mapped in addition to the experts while they are loaded: a layer
    of the checkpoint, or of a cache that is copied, as it is with several NUMA parts."""
    root = cache_folder(experts, quiet=True) if experts.kt_weight_path is None else None
    if root is None or not seems_cached(root, source, layers):
        stored = by_backend[own_formats(source).kt_backend]
        return max(layer.packed_bytes for layer in stored.values())
    images = [list(layer.image_bytes) for layer in layers.values()]
    return max(sum(parts) for parts in images) if len(images[0]) > 1 else 0


def _layers_by_backend(
    engine: Engine,
    source: ExpertSource,
    formats: ExpertFormats,
    layers: Mapping[str, MoeLayer],
) -> dict[str, Mapping[str, MoeLayer]]:
    """Returns ``layers``, and empty layers of the other formats that the checkpoint can run in, by
    kt_backend. Empty layers take no memory."""
    found: dict[str, Mapping[str, MoeLayer]] = {}
    for each in possible_formats(source):
        found[each.kt_backend] = new_layers(engine, source.specs, each)
    return {**found, formats.kt_backend: layers}


def _log_notes(formats: ExpertFormats, source: ExpertSource, inventory: Inventory) -> None:
    saving = saving_note(formats, own_formats(source), inventory)
    for note in (*formats.notes, *([saving] if saving else [])):
        logger.info("%s", note)


def open_kt_weights(experts: ExpertArgs, specs: Sequence[ExpertsSpec]) -> KtWeights | None:
    """Opens kt_kernel's files, if kt_weight_path names any. ``CheckpointError``: wrong files."""
    if experts.kt_weight_path is None:
        return None
    auto = experts.kt_backend == AUTO
    name = PLAIN if auto else format_of(experts.kt_backend).name
    return KtWeights(experts.kt_weight_path, specs, name)


def new_layers(
    engine: Engine,
    specs: Sequence[ExpertsSpec],
    formats: ExpertFormats,
    kt_weights: KtWeights | None = None,
) -> dict[str, MoeLayer]:
    """Returns an empty layer for every experts module, by path."""
    slices = kt_weights.parts if kt_weights else 1
    return {
        spec.path: new_layer(engine, spec, formats.by_path[spec.path], slices) for spec in specs
    }


def base_of_adapters(base: BaseCheckpoint) -> BaseModel:
    """Returns the description of the base that adapters are checked against."""
    modules = {
        (path, expert, projection): name
        for path, layer in base.experts.weights.items()
        for (expert, projection), name in layer.modules().items()
    }
    return BaseModel(
        base.built.model, base.experts.specs, base.names, modules, base.experts.checkpoint.folder
    )


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
