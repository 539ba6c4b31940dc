"""Plans an adapter: checks its folder, sorts the tensors for the engine and for PEFT."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ktrt.adapter.apply.torch_side import (
    ADAPTER_NAME,
    apply_torch_side,
    plan_torch_side,
    short_targets,
)
from ktrt.adapter.apply.words import copied_numel, plain_names, vocabulary
from ktrt.adapter.audit import Audit, AuditRow
from ktrt.adapter.coverage import check_coverage, check_tying
from ktrt.adapter.delta_norms import add_norms
from ktrt.adapter.digest import adapter_digest
from ktrt.adapter.files.base_identity import difference
from ktrt.adapter.files.read import read_adapter
from ktrt.adapter.files.settings import LoraSettings
from ktrt.adapter.files.zeros import warn_of_zeros
from ktrt.adapter.fit import fit_names, is_raw_tinker
from ktrt.adapter.internal import engine_arguments, engine_bytes, engine_numel
from ktrt.adapter.layouts import (
    extra_experts,
    fused,
    per_expert,
    target_parameters,
)
from ktrt.adapter.layouts.extra_experts import apply_extra_experts
from ktrt.adapter.layouts.interface import Layout, collect_layouts
from ktrt.adapter.layouts.packing import check_option
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from ktrt.adapter.apply.side import TorchSide
    from ktrt.adapter.apply.switches import Switch
    from ktrt.adapter.changes import ExpertNorms
    from ktrt.adapter.files.config import Packing
    from ktrt.adapter.internal import BaseModel, ExpertLoras
    from ktrt.adapter.layouts.interface import Mlp
    from ktrt.adapter.tensors import AdapterFiles, AdapterTensor

logger = logging.getLogger(__name__)

# All layouts of tensors for routed experts; unclaimed tensors are for torch modules.
LAYOUTS: tuple[Layout, ...] = (per_expert, target_parameters, fused, extra_experts)


@dataclass
class AdapterPlan:
    """A whole adapter, checked against the base and not applied yet.

    ``audit`` has one row per tensor; ``experts`` is the internal form by experts path, ``extra``
    the MLPs added to MoE blocks, by the block's path; ``digest`` tells contents apart; ``norms``
    has ‖ΔW‖ of the routed experts.
    """

    files: AdapterFiles
    settings: LoraSettings
    experts: ExpertLoras
    side: TorchSide
    audit: Audit
    extra: Mapping[str, Sequence[Mlp]] = field(default_factory=dict)
    digest: str = ""
    norms: ExpertNorms = field(default_factory=dict)

    def engine_arguments(self, path: str) -> dict[str, torch.Tensor | None]:
        """Returns the arguments of ``MoeLayer.load_lora`` for one layer; empty without LoRA."""
        return engine_arguments(self.experts.get(path, {}))

    def mark_experts(self, path: str) -> None:
        """Records in the audit that the engine has taken this layer's tensors."""
        rows = (row for row in self.audit.rows if row.acts_on.startswith(f"{path}."))
        self.audit.mark([row.tensor for row in rows], "experts")

    def expert_lora_numel(self) -> int:
        """Returns the count of numbers in the tensors that the engine applies."""
        inside = {row.tensor for row in self.audit.rows if row.status == "experts"}
        return sum(t.value.numel() for t in self.files.tensors if t.key in inside)

    def planned_numel(self) -> tuple[int, int]:
        """Returns the counts of the adapter's numbers that engine and torch will hold."""
        paths = tuple(f"{path}." for path in self.experts)
        inside = {row.tensor for row in self.audit.rows if row.acts_on.startswith(paths)}
        others = (t.value.numel() for t in self.files.tensors if t.key not in inside)
        outside = sum(others) + copied_numel(self.side)
        return sum(engine_numel(lora) for lora in self.experts.values()), outside

    @property
    def row_reason(self) -> str | None:
        """Why the adapter cannot be chosen for single rows of a step, apart from numbers of the
        base that it replaces; None if it can."""
        if self.settings.use_dora:
            return "is a DoRA"
        if self.side.routers:
            return "has LoRA on routers"
        if self.extra:
            return "has extra experts"
        parts = {each.part for group in self.side.loras.values() for each in group}
        if any(part.startswith("lora_embedding") for part in parts):
            return "has LoRA on embeddings"
        return "has biases in its LoRA" if "lora_B.bias" in parts else None

    def router_numel(self) -> int:
        """Returns the numbers of the LoRA on routers, which torch holds in float32."""
        return sum(each.value.numel() for parts in self.side.routers.values() for each in parts)

    def linear_ranks(self) -> dict[str, int]:
        """Returns the ranks of the linear layers by path, where LoRA is all that acts."""
        if self.settings.use_dora or self.settings.lora_bias:
            return {}
        found = ((name, t) for name, parts in self.side.loras.items() for t in parts)
        return {name: t.value.shape[0] for name, t in found if t.part == "lora_A"}

    def engine_bytes(self) -> int:
        """Returns the bytes of the engine's LoRA on routed experts, padding included."""
        return sum(engine_bytes(lora) for lora in self.experts.values())

    @property
    def vocabulary(self) -> int | None:
        """Rows of the adapter's input embeddings; None if it has none."""
        return vocabulary(self.side)

    def apply_to_torch(self, model: nn.Module, adapter: str = ADAPTER_NAME) -> list[Switch]:
        """Puts the other tensors into the loaded ``model``, as PEFT's ``adapter``, and records it
        in the audit. Returns the switches of changes outside PEFT, which start off."""
        switches = [
            *apply_torch_side(self.side, model, self.settings, adapter),
            *apply_extra_experts(self.extra, model),
        ]
        paths = tuple(f"{path}.{extra_experts.MODULE_NAME}." for path in self.extra)
        applied = [row.tensor for row in self.audit.rows if row.acts_on.startswith(paths)]
        applied += [tensor.key for _, tensor in self.side.tensors()]
        self.audit.mark(applied, "peft")
        return switches

    def warn_of_training(self, running: str, folder: Path | None) -> None:
        """Warns if the manifest names another format of the experts in training than the running
        one, since LoRA compensates for the rounding in training, or another base than the one in
        ``folder``."""
        base = self.files.base
        if folder is not None and isinstance(base, dict) and (why := difference(base, folder)):
            logger.warning(
                "%s was trained on another base by its manifest: %s. Answers may differ from those "
                "seen in training", self.files.folder, why,
            )  # fmt: skip
        trained = self.files.expert_format
        if trained is not None and trained.lower() != running:
            logger.warning(
                "%s was trained on experts in %s, and they run in %s here: answers may differ from "
                "those seen in training (kt_backend chooses the format)",
                self.files.folder, trained.upper(), running.upper(),
            )  # fmt: skip

    def targets(self) -> tuple[list[str], list[str]]:
        """Returns the configuration's targets, and PEFT's targets among them, as short names."""
        original = self.settings.target_modules or []
        names = [original] if isinstance(original, str) else sorted(original)
        return names + sorted(self.settings.target_parameters), short_targets(
            {**self.side.loras, **self.side.routers}
        )


def plan_adapter(
    folder: Path,
    base: BaseModel,
    *,
    lora_rank: int | None,
    lora_alpha: float | None,
    packing: Packing | None = None,
) -> AdapterPlan:
    """Reads the adapter and checks every tensor against the base.

    ``lora_rank``, ``lora_alpha`` and ``packing`` (lora_B_layout) come from the user's
    configuration. Raises ``AdapterError`` with file, tensor, finding and expectation.
    """
    files = read_adapter(folder)
    digest = adapter_digest(files, packing)
    files = replace(files, tensors=plain_names(files.tensors))
    settings = LoraSettings(files)
    settings.check_against_yaml(lora_rank, lora_alpha)
    check_option(packing, settings)
    files = fit_names(files, base, _is_claimed)
    zero_rows = warn_of_zeros(files.file, files.tensors)
    part, rest = collect_layouts(LAYOUTS, files.tensors, base, settings)
    side = plan_torch_side(files.file, rest, base, settings)
    check_tying(files.file, base, settings, side)
    # Tinker's configuration always says all-linear.
    exact = not (settings.targets_all_linear and is_raw_tinker(files))
    check_coverage(files.file, base, settings, part.experts, side, config_is_exact=exact)
    rows = [*part.rows, *(_torch_row(tensor, name, side) for name, tensor in side.tensors())]
    norms = add_norms(rows, part.experts, side)
    for row in rows:
        row.zero_rows = zero_rows.get(row.tensor, 0)
    rows += [
        AuditRow(each.tensor.key, each.tensor.module, each.tensor.part, _layer(each.tensor.module),
                 None, None, "no effect")
        for each in files.idle
    ]  # fmt: skip
    audit = Audit(files.file, rows, settings.notes)
    return AdapterPlan(files, settings, part.experts, side, audit, part.extra, digest, norms)


def _is_claimed(tensor: AdapterTensor, base: BaseModel) -> bool:
    """Returns whether a layout of routed experts claims the tensor. Extra experts without a block
    may fit under another name."""
    try:
        return any(layout.claim(tensor, base) for layout in LAYOUTS)
    except AdapterError:
        return False


def _torch_row(tensor: AdapterTensor, name: str, side: TorchSide) -> AuditRow:
    scale = side.scales.get(name) if tensor.part.startswith("lora_") else None
    return AuditRow(
        tensor.key,
        name,
        tensor.part,
        _layer(name),
        scale.rank if scale else None,
        scale.scaling if scale else None,
    )


def _layer(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None
