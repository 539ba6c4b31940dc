"""The part of an adapter outside the routed experts: applied by PEFT on the torch modules.

PEFT is given the state dict's keys to inject by (``inject_adapter_in_model(state_dict=…)``). By
``target_modules``, PEFT's conversion for transformers 5 would take names that end in gate_proj,
up_proj or down_proj for routed experts and turn them into ``target_parameters``.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ktrt.adapter.apply.router import apply_router_lora
from ktrt.adapter.apply.side import TorchSide
from ktrt.adapter.apply.switches import swap_parameter
from ktrt.adapter.apply.words import (
    ROWS_PART,
    check_sizes,
    find_tables,
    is_table,
    plan_rows,
    swap_tables,
)
from ktrt.adapter.fit import explain_unknown
from ktrt.adapter.tensors import put_once
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.apply.switches import Switch
    from ktrt.adapter.files.settings import LoraScale, LoraSettings
    from ktrt.adapter.internal import BaseModel
    from ktrt.adapter.tensors import AdapterTensor

# PEFT's name for a model's first adapter.
ADAPTER_NAME = "default"
_Kind = Literal["linear", "embedding", "router", "whole", "base"]


def plan_torch_side(
    file: Path, tensors: list[AdapterTensor], base: BaseModel, settings: LoraSettings
) -> TorchSide:
    """Sorts the tensors by what they act on and checks each against the base on the meta device.

    Raises ``AdapterError`` naming the tensor, what was found and expected, for a module that the
    base lacks, a wrong shape or rank, half a pair, and a tensor that is no part of an adapter.
    """
    side = TorchSide(file)
    find_tables(base, side)
    places: dict[tuple[str, str], AdapterTensor] = {}
    for tensor in tensors:
        weight = f"{tensor.module.removesuffix('.base_layer')}.weight"
        name = base.names.target(weight).name.removesuffix(".weight")
        kind = _kind(tensor, name, base, settings)
        group = {"router": side.routers, "whole": side.whole, "base": side.base}
        group.get(kind, side.loras).setdefault(name, []).append(tensor)
        _check_shape(tensor, base.model.get_submodule(name), kind, is_table=name in side.tables)
        put_once(places, (name, tensor.part), tensor)
    for name, parts in [*side.loras.items(), *side.routers.items()]:
        side.scales[name] = _check_group(file, name, parts, settings)
    plan_rows(base, settings, side)
    check_sizes(base, side)
    return side


def _kind(tensor: AdapterTensor, name: str, base: BaseModel, settings: LoraSettings) -> _Kind:
    try:
        module = base.model.get_submodule(name)
    except AttributeError:
        raise AdapterError(explain_unknown(tensor, base)) from None
    if not tensor.part.startswith("lora_"):
        own = dict(module.named_parameters(recurse=False))
        if settings.saves_module(tensor.module) and tensor.part in own:
            return "whole"
        if tensor.part == "bias" or (
            tensor.part in ("weight", ROWS_PART) and is_table(base, module)
        ):
            return "base"
        raise AdapterError(
            f"{tensor.where} is neither LoRA nor one of modules_to_save "
            f"{settings.modules_to_save} in {settings.file}: an unknown tensor, found where none "
            "was expected."
        )
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is not None and weight.ndim == 2 and not settings.use_dora:
        return "router"
    raise AdapterError(
        f"{tensor.where}: LoRA on {name} ({type(module).__name__}) cannot be applied; "
        "expected a Linear, an Embedding or a router."
    )


def _check_shape(tensor: AdapterTensor, module: nn.Module, kind: _Kind, *, is_table: bool) -> None:
    """The one or two sizes that the module fixes; the rank (None) is checked with the group, the
    rows (None) of embeddings and output layer are the adapter's."""
    expected: dict[str, tuple[int | None, ...]]
    if kind in ("whole", "base"):
        parameters = module.named_parameters(recurse=False)
        own: dict[str, tuple[int | None, ...]] = {name: tuple(p.shape) for name, p in parameters}
        if is_table:
            own = {part: (None, *shape[1:]) for part, shape in own.items()}
            own[ROWS_PART] = own["weight"]
        expected = {tensor.part: own[tensor.part]} if tensor.part in own else {}
    else:
        rows, columns = module.get_parameter("weight").shape
        expected = {
            "lora_A": (None, columns),
            "lora_B": (rows, None),
            "lora_B.bias": (rows,),
            "lora_magnitude_vector": (rows,),
        }
        if kind == "embedding":
            expected = {"lora_embedding_A": (None, rows), "lora_embedding_B": (columns, None)}
    shape = tuple(tensor.value.shape)
    wanted = expected.get(tensor.part)
    if wanted is None:
        raise AdapterError(
            f"{tensor.where} is an unknown tensor: {type(module).__name__} has no "
            f"{tensor.part}, expected {sorted(expected)}."
        )
    if len(shape) != len(wanted) or any(
        want not in (None, size) for want, size in zip(wanted, shape, strict=True)
    ):
        free = "rows" if kind in ("whole", "base") else "rank"
        words = ", ".join(free if want is None else str(want) for want in wanted)
        raise AdapterError(
            f"{tensor.where} has shape {list(shape)}, expected [{words}]: the adapter was "
            "trained on another base model."
        )


def _check_group(
    file: Path, name: str, group: list[AdapterTensor], settings: LoraSettings
) -> LoraScale:
    parts = {tensor.part: tensor for tensor in group}
    embedding = any(part.startswith("lora_embedding") for part in parts)
    part_a, part_b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    needed = [part_a, part_b]
    needed += ["lora_magnitude_vector"] if settings.use_dora and not embedding else []
    needed += ["lora_B.bias"] if settings.lora_bias and not embedding else []
    if set(parts) != set(needed):
        raise AdapterError(
            f"{file}: for {name} found {sorted(t.key for t in group)}, expected {sorted(needed)} "
            f"(use_dora {settings.use_dora}, lora_bias {settings.lora_bias})."
        )
    # PEFT resolves patterns by the parameter's name where it targeted the bare weight.
    trained = parts[part_a].trained_module
    weight = f"{trained}.weight"
    target = weight if settings.targets_parameter(weight) else trained
    scale = settings.scale(target)
    if parts[part_a].value.shape[0] != scale.rank:
        raise AdapterError(
            f"{file}: {parts[part_a].key} has rank {parts[part_a].value.shape[0]}, but "
            f"{settings.file} says {scale.rank} for it (r, rank_pattern)."
        )
    if parts[part_b].value.shape[1] != scale.rank:
        raise AdapterError(
            f"{file}: {parts[part_b].key} has rank {parts[part_b].value.shape[1]}, expected "
            f"{scale.rank} as in its lora_A."
        )
    return scale


def apply_torch_side(
    side: TorchSide, model: nn.Module, settings: LoraSettings, adapter: str = ADAPTER_NAME
) -> list[Switch]:
    """Puts the tensors into ``model`` (weights loaded), as PEFT's ``adapter``. Returns the switches
    of what is not PEFT's, off; PEFT's is its own affair. Raises ``AdapterError`` if PEFT did not
    make a place for a tensor."""
    switches = swap_tables(side, model)
    for group, tied in ((side.base, True), (side.whole, False)):
        for name, tensors in group.items():
            # A layer whose weight stays as the checkpoint ships it has no parameter to replace.
            if as_linear := getattr(model.get_submodule(name), "as_linear", None):
                model.set_submodule(name, as_linear())
            for tensor in tensors:
                if name not in side.tables or tensor.part != "weight":
                    switches += swap_parameter(model, name, tensor.part, tensor.value, tied=tied)
    if side.loras:
        _inject(side, model, settings, adapter)
    for name, tensors in side.routers.items():
        parts = {tensor.part: tensor.value for tensor in tensors}
        router, scaling = model.get_submodule(name), side.scales[name].scaling
        switches.append(
            apply_router_lora(router, parts["lora_A"], parts["lora_B"], scaling, adapter)
        )
    return switches


def _inject(side: TorchSide, model: nn.Module, settings: LoraSettings, adapter: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    state: dict[str, torch.Tensor] = {}
    for name, group in side.loras.items():
        for tensor in group:
            state[f"{name}.{_in_model(tensor.part, adapter)}"] = tensor.value
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        rank_pattern={re.escape(name): side.scales[name].rank for name in side.loras},
        alpha_pattern={re.escape(name): side.scales[name].alpha for name in side.loras},
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_bias=settings.lora_bias,
        # Not read on the state-dict route; real names would be converted (see above).
        target_modules=["none"],
        inference_mode=True,
    )
    with warnings.catch_warnings():
        # "an inconsistency between the PEFT config and the state_dict": intended here.
        warnings.simplefilter("ignore", RuntimeWarning)
        # "Already found a peft_config attribute": several adapters are intended.
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(config, model, adapter, state_dict=_names_only(side))
    config.target_modules = set(short_targets(side.loras))
    config.rank_pattern = _differing(config.rank_pattern, settings.rank)
    config.alpha_pattern = _differing(config.alpha_pattern, settings.alpha)
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        if name not in parameters:
            raise AdapterError(f"{side.file}: PEFT made no place for {name}.")
        _copy(parameters[name], value)
    mine = {name for name in parameters if re.search(rf"\.lora_\w+\.{adapter}(\.|$)", name)}
    if missing := sorted(mine - set(state)):
        raise AdapterError(f"{side.file}: no tensor in the file for {missing[:5]}.")


def _names_only(side: TorchSide) -> dict[str, Any]:
    return {f"{name}.{tensor.part}": None for name, group in side.loras.items() for tensor in group}


def _in_model(part: str, adapter: str) -> str:
    """The part's name inside PEFT's layer."""
    if part.startswith("lora_embedding"):
        return f"{part}.{adapter}"
    part, _, leaf = part.partition(".")
    return f"{part}.{adapter}.{leaf or 'weight'}"


def _differing(pattern: dict[str, Any], default: float) -> dict[str, Any]:
    return {name: value for name, value in pattern.items() if value != default}


def _copy(parameter: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def short_targets(modules: dict[str, Any]) -> list[str]:
    """The modules' names for people: the last part, and for parts of an MLP the one before too,
    so that they cannot be taken for routed experts."""
    short = set()
    for name in modules:
        *_, parent, leaf = ("", *name.split("."))
        inside_mlp = leaf in ("gate_proj", "up_proj", "down_proj") and parent
        short.add(f"{parent}.{leaf}" if inside_mlp else leaf)
    return sorted(short)
