"""A transformers model whose routed experts run in ktrt's engine, with an adapter applied."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.adapter import Audit, BaseModel, plan_adapter
from ktrt.checkpoint import Checkpoint, WeightNames, find_expert_weights
from ktrt.errors import CheckpointError
from ktrt.expert_loading import ExpertSource, cache_folder, load_experts
from ktrt.kt_weights import KtWeights
from ktrt.memory_plan import MemoryPlan, check_addresses, make_plan
from ktrt.moe import (
    BACKENDS,
    KTExperts,
    build_engine,
    experts_replaced,
    find_experts,
    new_layer,
    weight_format_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from ktrt.adapter import AdapterPlan
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.moe import Engine, ExpertsSpec, MoeLayer

logger = logging.getLogger(__name__)
# The block that users of LLaMA-Factory with KTransformers look for.
debug_logger = logging.getLogger("ktrt.debug")


@dataclass
class LoadedModel:
    """``model`` is transformers' own class with the experts replaced and PEFT's layers injected, in
    eval mode, without gradients; ``audit`` says what each tensor of the adapter acts on."""

    model: nn.Module
    audit: Audit
    engine: Engine

    def close(self) -> None:
        """Stops the engine's threads and frees the experts; the model cannot run afterwards."""
        self.engine.close()


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model folder whose headers and shapes have been checked; no weight has been read.

    ``skeleton``: the plain model on the meta device; ``trust``: whether its own code may run.
    """

    skeleton: nn.Module
    trust: bool
    names: WeightNames
    experts: ExpertSource


def open_base(model: ModelArgs) -> BaseCheckpoint:
    """Looks at a model folder. ``CheckpointError`` if it is incomplete or has no routed experts."""
    folder = model.model_name_or_path
    skeleton, trust = _skeleton(folder, model.trust_remote_code)
    specs = find_experts(skeleton)
    if not specs:
        raise CheckpointError(
            f"{folder}: {type(skeleton).__name__} has no routed experts that transformers runs "
            "through its experts interface; ktrt is for Mixture-of-Experts models."
        )
    check_addresses(folder)
    checkpoint, names = Checkpoint(folder), WeightNames(skeleton)
    weights = find_expert_weights(checkpoint, names, specs)
    return BaseCheckpoint(skeleton, trust, names, ExpertSource(checkpoint, specs, weights))


def load_model(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> LoadedModel:
    """Loads base and adapter: attention, router, shared experts, embeddings and head on the GPU if
    there is one, else on the CPU; routed experts in the engine.

    Everything that headers and shapes can tell is checked before the first weight is read. Raises
    ``CheckpointError`` or ``AdapterError`` naming file and tensor, what was found and expected.
    """
    logger.info("Loading model with KTransformers MoE backend")
    ready = _prepare(model, adapter, experts)
    base, plan, engine = ready.base, ready.adapter, ready.engine
    specs = base.experts.specs
    try:
        ready.memory.check()
        loaded = _load_without_experts(
            base.skeleton, specs, base.experts.checkpoint, base.names, model.infer_dtype, base.trust
        )
        load_experts(base.experts, ready.layers, cache_folder(experts), ready.kt_weights)
        _attach(loaded, ready.layers, engine)
        audit = _apply_adapter(plan, loaded, specs) if plan else Audit()
    except BaseException:
        engine.close()
        raise
    loaded.eval().requires_grad_(False)
    _log_result(loaded, specs, plan)
    return LoadedModel(loaded, audit, engine)


def plan_memory(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> MemoryPlan:
    """What ``load_model`` with these arguments will take, without reading a weight of the base."""
    ready = _prepare(model, adapter, experts)
    ready.engine.close()
    return ready.memory


@dataclass(frozen=True)
class _Prepared:
    """All that is known before the first weight is read; the engine's threads run."""

    base: BaseCheckpoint
    adapter: AdapterPlan | None
    kt_weights: KtWeights | None
    engine: Engine
    layers: dict[str, MoeLayer]
    memory: MemoryPlan


def _prepare(model: ModelArgs, adapter: AdapterArgs, experts: ExpertArgs) -> _Prepared:
    base = open_base(model)
    plan = _plan_adapter(adapter, base)
    kt_weights = open_kt_weights(experts, base.experts.specs)
    engine = build_engine(experts)
    try:
        layers = new_layers(engine, base.experts.specs, experts, kt_weights)
        lora = plan.planned_numel() if plan else (0, 0)
        memory = make_plan(
            base.skeleton,
            experts=_expert_bytes(engine, base.experts.specs, experts, layers),
            kt_backend=experts.kt_backend,
            expert_paths=[spec.path for spec in base.experts.specs],
            layer_source=2 * max(spec.num_weights for spec in base.experts.specs),
            mapped_files=check_addresses(model.model_name_or_path),
            workspace=engine.workspace_bytes,
            lora=lora,
            infer_dtype=model.infer_dtype,
        )
    except BaseException:
        engine.close()
        raise
    return _Prepared(base, plan, kt_weights, engine, layers, memory)


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


def _skeleton(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, bool]:
    """The plain model on the meta device, and whether the checkpoint's own code may run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read or names no model_type ({error!r}): not a model folder."
        ) from error
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise CheckpointError(
            f"{file}: the weights are quantised (quant_method {method}); ktrt cannot read that "
            "yet. Use the BF16 checkpoint."
        )
    trust = trust_remote_code and model_type not in CONFIG_MAPPING
    if trust_remote_code and not trust:
        logger.info(
            "trust_remote_code is ignored: transformers has its own code for %s", model_type
        )
    # The library checks configurations with exceptions of its own, derived from nothing else.
    refusals = (StrictDataclassError, OSError, ValueError, ImportError, KeyError, TypeError)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except refusals as error:
        raise CheckpointError(
            f"{folder}: transformers cannot build a model of type {model_type}: {error}"
        ) from error
    return model, trust


def _plan_adapter(adapter: AdapterArgs, base: BaseCheckpoint) -> AdapterPlan | None:
    if adapter.adapter_name_or_path is None:
        return None
    modules = {
        (path, expert, projection): name
        for path, layer in base.experts.weights.items()
        for (expert, projection), name in layer.modules().items()
    }
    return plan_adapter(
        adapter.adapter_name_or_path,
        BaseModel(base.skeleton, base.experts.specs, base.names, modules),
        lora_rank=adapter.lora_rank,
        lora_alpha=adapter.lora_alpha,
    )


def _load_without_experts(
    skeleton: nn.Module,
    specs: Sequence[ExpertsSpec],
    checkpoint: Checkpoint,
    names: WeightNames,
    infer_dtype: str,
    trust: bool,
) -> nn.Module:
    """All weights but the routed experts', which are never materialised in torch."""
    model_class: Any = type(skeleton)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if infer_dtype == "auto" else getattr(torch, infer_dtype)
    experts = [rf"^{path}\.(gate_up_proj|down_proj)$" for path in _escaped(specs)]
    try:
        with experts_replaced({s.class_name for s in specs}), _unexpected(model_class, experts):
            model, info = model_class.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                device_map={"": device} if device != "cpu" else None,
                trust_remote_code=trust,
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


def _attach(model: nn.Module, layers: Mapping[str, MoeLayer], engine: Engine) -> None:
    for path, layer in layers.items():
        module = model.get_submodule(path)
        assert isinstance(module, KTExperts), f"{path} was not replaced"
        module.attach(layer, engine.max_qlen)


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
