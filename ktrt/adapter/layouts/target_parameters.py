"""Layout b: LoRA on the stacked expert parameters, PEFT's layout for ``target_parameters``.

gate_up_proj (up_proj if experts have no gate): ``…experts.base_layer.lora_{A,B}.weight``;
down_proj: ``…experts.lora_{A,B}.weight``; a single target has the unprefixed name. A [E·r, in] is
expert-major, B [out, r·E] rank-major: A_e = A[e·r:(e+1)·r], B_e = B[:, e::E] (peft.tuners.lora,
``ParamWrapper``). ``packing`` describes another order of B's columns.

PEFT before 0.19.1 reads [E, d1, d2] as in = d1, out = d2: A is [E·r, d1], B [d2, r·E] and
ΔW_e = A_eᵀ B_eᵀ. The shapes tell both forms apart unless d1 = d2; then the shapes of the file's
other parameters decide, else peft_version. Every PEFT reads transposed parameters, [E, in, out],
unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from packaging.version import InvalidVersion, Version

from ktrt.adapter.audit import AuditRow
from ktrt.adapter.internal import ExpertLora, split_first
from ktrt.adapter.layouts.interface import Part, check_expert_part, check_magnitude
from ktrt.adapter.layouts.packing import StackedB, decide_packing, to_rank_major
from ktrt.adapter.tensors import put_once
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.adapter.files.config import Packing
    from ktrt.adapter.files.settings import LoraScale, LoraSettings
    from ktrt.adapter.internal import BaseModel, ExpertLoras
    from ktrt.adapter.tensors import AdapterTensor
    from ktrt.experts.spec import ExpertsSpec

TITLE = "LoRA on stacked parameters (target_parameters)"
PROVIDES = "the LoRA of routed experts"

# A pair's experts module, and whether PEFT's inner wrapper holds it.
_Key = tuple[str, bool]
# 0.19.0 inverts the test for swapping in and out, so it counts as old.
_FIRST_SWAPPED = Version("0.19.1.dev0")


def claim(tensor: AdapterTensor, base: BaseModel) -> str | None:
    """Returns the tensor's experts module; None for other tensors."""
    for path in (tensor.module, _plain_path(tensor)):
        stacked = base.names.target(f"{path}.down_proj").name.removesuffix(".down_proj")
        if base.site(stacked) is not None:
            return stacked
    return None


def collect(
    claimed: Sequence[tuple[AdapterTensor, str]], base: BaseModel, settings: LoraSettings
) -> Part:
    """Unstacks the tensors by layer and projection; makes an audit row for each tensor.

    Raises ``AdapterError`` with tensor, finding and expectation for: shapes that do not fit the
    base, half a pair, an ambiguity that only peft_version could resolve, DoRA.
    """
    found: dict[tuple[str, bool], dict[str, AdapterTensor]] = defaultdict(dict)
    for tensor, path in claimed:
        check_expert_part(tensor, tensor.part, settings)
        put_once(found[path, tensor.module.endswith(".base_layer")], tensor.part, tensor)
    loras: ExpertLoras = defaultdict(dict)
    named: dict[tuple[str, bool], tuple[str, LoraScale]] = {}
    stacks = []
    for (path, inner), parts in found.items():
        if len(parts) != 2:
            where = next(iter(parts.values())).where
            raise AdapterError(f"{where} is only half of a LoRA pair; incomplete file.")
        site = base.require_site(path)
        parameter = _parameter(site, inner, (path, not inner) in found, parts["lora_A"], settings)
        trained = parts["lora_A"].trained_module.removesuffix(".base_layer")
        named[path, inner] = parameter, settings.scale(f"{trained}.{parameter}")
        b, rank = parts["lora_B"], named[path, inner][1].rank
        stacks.append(StackedB(b.where, b.value, parts["lora_A"].value, site.num_experts, rank))
    packing = decide_packing(stacks, settings)
    old = _old_ones(found, named, base, settings)
    for (path, inner), parts in found.items():
        site, (parameter, scale) = base.require_site(path), named[path, inner]
        lora = _unstack(site, parts, scale, packing, is_old=old[path, inner])
        if parameter == "down_proj":
            loras[path]["down"] = lora
        else:
            loras[path].update(split_first(site, lora))
    rows = []
    for tensor, path in claimed:
        parameter, scale = named[path, tensor.module.endswith(".base_layer")]
        layer = base.require_site(path).layer
        acts_on = f"{path}.{parameter}"
        rows.append(AuditRow(tensor.key, acts_on, tensor.part, layer, scale.rank, scale.scaling))
    return Part(dict(loras), rows=rows)


def _plain_path(tensor: AdapterTensor) -> str:
    """Returns PEFT's name of the experts module, without the inner wrapper."""
    return tensor.module.removesuffix(".base_layer")


def _parameter(
    site: ExpertsSpec, inner: bool, both: bool, lora_a: AdapterTensor, settings: LoraSettings
) -> str:
    """Returns the stacked parameter of a key. PEFT nests the wrappers in the parameters' order,
    gate_up_proj first (innermost); a single one has the unprefixed name."""
    if both:
        return site.first_parameter if inner else "down_proj"
    names = tuple(site.parameters)
    # The configuration uses the names of training.
    paths = {site.path, lora_a.trained_module.removesuffix(".base_layer")}
    targets = [
        name for name in names
        if any(settings.targets_parameter(f"{path}.{name}") for path in paths)
    ]  # fmt: skip
    if inner or len(targets) != 1:
        raise AdapterError(
            f"{lora_a.where} is the only LoRA of {site.path}, but target_parameters "
            f"{settings.target_parameters} in {settings.file} names {len(targets)} of {names[0]} "
            "and down_proj there; expected one. The file is incomplete, or the configuration "
            "belongs to another adapter."
        )
    return targets[0]


def _old_ones(
    found: Mapping[_Key, dict[str, AdapterTensor]],
    named: Mapping[_Key, tuple[str, LoraScale]],
    base: BaseModel,
    settings: LoraSettings,
) -> dict[_Key, bool]:
    """Returns which pairs have the form of PEFT before 0.19.1. If the shapes fit both forms, the
    file's other pairs decide: only one of an expert's two parameters can be square."""
    ways = {
        key: _ways(base.require_site(key[0]), *named[key], parts) for key, parts in found.items()
    }
    certain = {old for new, old in ways.values() if new != old}
    only = next(iter(certain)) if len(certain) == 1 else None
    result = {}
    for key, (new, old) in ways.items():
        if new and old:
            old = only if only is not None else not _writes_swapped(found[key]["lora_A"], settings)
        result[key] = old
    return result


def _ways(
    site: ExpertsSpec, parameter: str, scale: LoraScale, parts: dict[str, AdapterTensor]
) -> tuple[bool, bool]:
    """Returns whether the shapes fit PEFT since 0.19.1, and PEFT before. Raises ``AdapterError`` if
    they fit neither."""
    a, b = parts["lora_A"].value, parts["lora_B"].value
    size_out, size_in = site.parameters[parameter]
    stacked = site.num_experts * scale.rank
    new = a.shape == (stacked, size_in) and b.shape == (size_out, stacked)
    old = a.shape == (stacked, size_out) and b.shape == (size_in, stacked)
    old = old and not site.is_transposed
    if not new and not old:
        raise AdapterError(
            f"{parts['lora_A'].where} has shape {list(a.shape)} and {parts['lora_B'].key} "
            f"{list(b.shape)}; expected [{stacked}, {size_in}] and [{size_out}, {stacked}] for "
            f"{site.path}.{parameter} with {site.num_experts} experts and rank {scale.rank}. The "
            "adapter was trained on another base model, or adapter_config.json belongs to another "
            "adapter."
        )
    check_magnitude(parts["lora_A" if old and not new else "lora_B"], scale.rank, scale.scaling)
    return new, old


def _unstack(
    site: ExpertsSpec,
    parts: dict[str, AdapterTensor],
    scale: LoraScale,
    packing: Packing,
    *,
    is_old: bool,
) -> ExpertLora:
    a, b = parts["lora_A"].value.float(), parts["lora_B"].value.float()
    num_experts, rank = site.num_experts, scale.rank
    stack_a = a.reshape(num_experts, rank, -1)
    b = to_rank_major(b, packing, num_experts)
    stack_b = b.reshape(b.shape[0], rank, num_experts).permute(2, 0, 1)
    if is_old:
        stack_a, stack_b = stack_b.transpose(1, 2), stack_a.transpose(1, 2)
    scaling = torch.full((num_experts,), scale.scaling, dtype=torch.float32)
    return ExpertLora(stack_a.contiguous(), stack_b.contiguous(), scaling)


def _writes_swapped(tensor: AdapterTensor, settings: LoraSettings) -> bool:
    """Returns whether the PEFT that wrote the adapter put A on the parameter's last dimension."""
    try:
        return Version(str(settings.peft_version).partition("@")[0]) >= _FIRST_SWAPPED
    except InvalidVersion:
        raise AdapterError(
            f"{tensor.where} can be read in two ways, because the parameter is square, and "
            f"{settings.file} does not say which PEFT wrote it (peft_version is "
            f"{settings.peft_version!r}). Add peft_version to that file: PEFT before 0.19.1 reads "
            "the parameter transposed."
        ) from None
