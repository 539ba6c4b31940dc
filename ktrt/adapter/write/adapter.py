"""Writes an adapter in another layout, with the same numbers."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors.torch import save_file

from ktrt.adapter.files.find import CONFIG_NAME, WEIGHTS_NAME
from ktrt.adapter.plan import plan_adapter
from ktrt.adapter.write.experts import (
    ExpertTensors,
    Layout,
    expert_name,
    expert_tensors,
)
from ktrt.adapter.write.names import ScaledName, scale_config, target_config
from ktrt.errors import AdapterError
from ktrt.utils.staging import check_target, staged_folder

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.internal import BaseModel, ExpertLora
    from ktrt.adapter.plan import AdapterPlan
    from ktrt.adapter.tensors import AdapterTensor

logger = logging.getLogger(__name__)

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FUSED_NAME = "fused_expert_lora.safetensors"
MANIFEST_NAME = "kt_adapter_manifest.json"
_PREFIX = "base_model.model."
# peft.utils.transformers_weight_conversion
_ROUTED_LEAVES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Written:
    """The result of writing: ``tensors`` in all files; ``exact``: B was not rounded again."""

    out: str
    layout: str
    tensors: int
    source_tensors: int
    bytes: int
    exact: bool


def write_adapter(plan: AdapterPlan, base: BaseModel, out: Path, layout: Layout) -> Written:
    """Writes the adapter to the new folder ``out``, a PEFT adapter folder, in ``layout``.

    Read back, it gives the engine the same bits; in layout b with additional zeros if gate and up
    differ in A. Raises ``AdapterError`` if the layout cannot express the adapter, ``ConfigError``
    if ``out`` is not empty or the disk is full.
    """
    check_target(out)
    if layout == "c" and not plan.experts:
        raise AdapterError(
            f"{plan.files.file} has no LoRA on routed experts, the only content of layout c. Use "
            "layout a."
        )
    experts = expert_tensors(layout, plan.experts, base, plan.settings.use_rslora)
    if experts.folded and not experts.exact:
        logger.warning(
            "Scalings differ, but layout %s has a single one: they are multiplied into B in "
            "float32, like in the engine; PEFT's results may differ in the last bit", layout,
        )  # fmt: skip
    side = {_side_key(tensor, layout): tensor.value for _, tensor in plan.side.tensors()}
    _check_count(plan, len(side))
    dtype = _common_dtype(plan.files.tensors)
    inner = {key: _narrow(value, dtype) for key, value in experts.tensors.items()}
    if layout == "c":
        inner = _one_dtype(inner)
    config = _config(plan, base, layout, experts)
    size = sum(value.nbytes for value in (*side.values(), *inner.values()))
    with staged_folder(out, size) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files = {WEIGHTS_NAME: side | inner}
        if layout == "c":
            files = {WEIGHTS_NAME: side, FUSED_NAME: inner}
        for name, tensors in files.items():
            owned = {key: value.contiguous().clone() for key, value in tensors.items()}
            save_file(owned, folder / name, metadata={"format": "pt"})
        if layout == "c":
            _write_manifest(folder, config, inner)
        _check_result(plan, base, folder)
    return Written(str(out), layout, len(side) + len(inner), plan.audit.found, size, experts.exact)


def _side_key(tensor: AdapterTensor, layout: Layout) -> str:
    part = tensor.part
    if part in ("lora_A", "lora_B"):
        part += ".weight"
    return f"{'' if layout == 'f' else _PREFIX}{tensor.module}.{part}"


def _check_count(plan: AdapterPlan, side: int) -> None:
    """Checks that every tensor is written, with the experts' LoRA or separately."""
    paths = tuple(f"{path}." for path in plan.experts)
    inside = sum(row.acts_on.startswith(paths) for row in plan.audit.rows) if paths else 0
    idle = plan.audit.no_effect
    if inside + side + idle != plan.audit.found:
        raise AdapterError(
            f"{plan.files.file}: {plan.audit.found - inside - side - idle} of {plan.audit.found} "
            "tensors are of a kind that other layouts cannot hold."
        )


def _common_dtype(tensors: list[AdapterTensor]) -> torch.dtype:
    found = {tensor.value.dtype for tensor in tensors}
    return found.pop() if len(found) == 1 else torch.float32


def _narrow(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts ``value`` to the adapter's dtype if that changes no number."""
    narrow = value.to(dtype)
    return narrow if torch.equal(narrow.float(), value) else value


def _one_dtype(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts to BF16, the only dtype that KTransformers reads, if that changes no number; else to
    float32."""
    narrow = {key: _narrow(value.float(), torch.bfloat16) for key, value in tensors.items()}
    if all(value.dtype == torch.bfloat16 for value in narrow.values()):
        return narrow
    logger.warning(
        "The experts' LoRA is written in float32, since BF16 would change numbers; KTransformers "
        "with BF16 experts wants BF16"
    )
    return {key: value.float() for key, value in tensors.items()}


def _config(
    plan: AdapterPlan, base: BaseModel, layout: Layout, experts: ExpertTensors
) -> dict[str, Any]:
    side = plan.side
    names, modules, parameters = [], [], []
    for module, tensors in [*side.loras.items(), *side.routers.items()]:
        name, scale = tensors[0].module, side.scales[module]
        if layout == "b" and (module in side.routers or _looks_routed(tensors)):
            name = f"{name}.weight"
            parameters.append(name)
        else:
            modules.append(name)
        names.append(ScaledName(name, scale.rank, scale.alpha))
    default = None
    if layout == "c" and experts.names:
        default = (experts.names[0].rank, experts.names[0].alpha)
    else:
        names += experts.names
        (parameters if layout == "b" else modules).extend(each.name for each in experts.names)
    config = {k: v for k, v in plan.files.config.items() if k != "lora_B_layout"}
    if names or default:
        config |= scale_config(names, default)
    config |= target_config(
        modules, _all_modules(base, layout), parameters, dict(base.model.named_parameters())
    )
    if layout == "b":
        config["peft_version"] = version("peft")
        config["lora_B_layout"] = "rank_major"
        # PEFT refuses dropout on parameters; outside training it does nothing.
        config["lora_dropout"] = 0.0
    return config


def _looks_routed(tensors: list[AdapterTensor]) -> bool:
    """Returns whether PEFT on transformers 5 would take the name for routed experts or a router:
    such a Linear is targeted by its weight, like a router."""
    *_, leaf = tensors[0].module.split(".")
    return leaf in _ROUTED_LEAVES and {t.part for t in tensors} == {"lora_A", "lora_B"}


def _all_modules(base: BaseModel, layout: Layout) -> list[str]:
    """Returns all modules that target_modules could name by mistake."""
    found = [name for name, _ in base.model.named_modules() if name]
    if layout in ("a", "f"):
        found += [
            expert_name(layout, base, site.path, expert, projection)
            for site in base.experts
            for expert in range(site.num_experts)
            for projection in site.projections
        ]
    return found


def _write_manifest(folder: Path, config: dict[str, Any], fused: dict[str, torch.Tensor]) -> None:
    """Writes version 1 of KTransformers' manifest."""
    artifacts: dict[str, Any] = {}
    for name in (CONFIG_NAME, WEIGHTS_NAME, FUSED_NAME):
        data = (folder / name).read_bytes()
        artifacts[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    artifacts[FUSED_NAME] |= {
        "tensor_count": len(fused),
        "tensors": {
            key: {"shape": list(value.shape), "dtype": dtypes[value.dtype]}
            for key, value in sorted(fused.items())
        },
    }
    manifest = {
        "version": 1,
        "status": "ready",
        "expert_weight_format": "bf16",
        "base": {"model_name_or_path": config.get("base_model_name_or_path")},
        "lora": {"rank": config["r"], "alpha": float(config["lora_alpha"])},
        "artifacts": artifacts,
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _check_result(plan: AdapterPlan, base: BaseModel, folder: Path) -> None:
    """Reads ``folder`` back and compares all numbers. Raises ``AdapterError`` if one differs."""
    found = plan_adapter(folder, base, lora_rank=None, lora_alpha=None)
    if wrong := _differences(plan, found):
        raise AdapterError(
            f"{plan.files.file}: read back from the new layout, {wrong[0]} has other numbers "
            f"({len(wrong)} such). This is a defect in ktrt; nothing was written."
        )


def _differences(plan: AdapterPlan, found: AdapterPlan) -> list[str]:
    wrong = []
    for path in set(plan.experts) | set(found.experts):
        before, after = plan.experts.get(path, {}), found.experts.get(path, {})
        for projection in set(before) | set(after):
            if not _same(before.get(projection), after.get(projection)):
                wrong += [f"{path}, {projection}"]
    old, new = ({(m, t.part): t.value for m, t in p.side.tensors()} for p in (plan, found))
    for key in set(old) | set(new):
        if key not in old or key not in new or not torch.equal(old[key], new[key]):
            wrong += [".".join(key)]
    wrong += [m for m, scale in plan.side.scales.items() if found.side.scales.get(m) != scale]
    return wrong


def _same(before: ExpertLora | None, after: ExpertLora | None) -> bool:
    """Returns whether A and scaled B are equal; additional ranks must have B = 0."""
    if before is None or after is None:
        return after is None or not after.b.any()
    rank, more = before.a.shape[1], after.a.shape[1] - before.a.shape[1]
    for start in {0, more} if more >= 0 else ():
        kept = slice(start, start + rank)
        others = torch.cat([after.b[:, :, :start], after.b[:, :, start + rank :]], 2)
        if (
            torch.equal(after.a[:, kept], before.a)
            and torch.equal(after.scaled_b()[:, :, kept], before.scaled_b())
            and not others.any()
        ):
            return True
    return False
