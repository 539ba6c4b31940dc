"""From an adapter folder to what goes into the engine and what goes to PEFT, all of it checked."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.adapter import per_expert, target_parameters
from ktrt.adapter.audit import Audit, AuditRow
from ktrt.adapter.base import engine_arguments
from ktrt.adapter.coverage import check_coverage
from ktrt.adapter.norms import add_norms
from ktrt.adapter.other_layouts import refuse_other_files, refuse_other_keys
from ktrt.adapter.read import read_adapter
from ktrt.adapter.settings import LoraSettings
from ktrt.adapter.torch_side import apply_torch_side, plan_torch_side, short_targets
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ktrt.adapter.base import BaseModel, ExpertLoras
    from ktrt.adapter.read import AdapterFiles, AdapterTensor
    from ktrt.adapter.torch_side import TorchSide

logger = logging.getLogger(__name__)


@dataclass
class AdapterPlan:
    """A whole adapter, checked against the base; nothing of it is applied yet.

    ``audit`` has one row per tensor; ``experts`` is the internal form by experts path.
    """

    files: AdapterFiles
    settings: LoraSettings
    experts: ExpertLoras
    side: TorchSide
    audit: Audit

    def engine_arguments(self, path: str) -> dict[str, torch.Tensor | None]:
        """The arguments of ``MoeLayer.set_lora`` for one layer; empty if it has no LoRA."""
        return engine_arguments(self.experts.get(path, {}))

    def mark_experts(self, path: str) -> None:
        """Records in the audit that the engine has taken this layer's tensors."""
        rows = (row for row in self.audit.rows if row.acts_on.startswith(f"{path}."))
        self.audit.mark([row.tensor for row in rows], "experts")

    def expert_lora_numel(self) -> int:
        """Numbers in the tensors that the engine applies."""
        inside = {row.tensor for row in self.audit.rows if row.status == "experts"}
        return sum(t.value.numel() for t in self.files.tensors if t.key in inside)

    def planned_numel(self) -> tuple[int, int]:
        """Numbers in the tensors that the engine and PEFT will apply, before either does."""
        paths = tuple(f"{path}." for path in self.experts)
        inside = {row.tensor for row in self.audit.rows if row.acts_on.startswith(paths)}
        sizes = [(t.key in inside, t.value.numel()) for t in self.files.tensors]
        return sum(n for i, n in sizes if i), sum(n for i, n in sizes if not i)

    def apply_to_torch(self, model: nn.Module) -> None:
        """Puts the other tensors into the loaded ``model``, and records it in the audit."""
        self.audit.mark(apply_torch_side(self.side, model, self.settings), "peft")

    def targets(self) -> tuple[list[str], list[str]]:
        """What the configuration targets, and what of it is PEFT's, as short names."""
        original = self.settings.target_modules or []
        names = [original] if isinstance(original, str) else sorted(original)
        return names + sorted(self.settings.target_parameters), short_targets(
            {**self.side.loras, **self.side.routers}
        )


def plan_adapter(
    folder: Path, base: BaseModel, *, lora_rank: int | None, lora_alpha: float | None
) -> AdapterPlan:
    """Reads the adapter and checks every tensor of it against the base.

    ``lora_rank`` and ``lora_alpha`` are what the user's configuration repeats. Raises
    ``AdapterError`` naming file and tensor, what was found and expected.
    """
    refuse_other_files(folder)
    files = read_adapter(folder)
    refuse_other_keys(files)
    settings = LoraSettings(files)
    settings.check_against_yaml(lora_rank, lora_alpha)
    single: list[tuple[AdapterTensor, per_expert.Slot]] = []
    stacked: list[tuple[AdapterTensor, str]] = []
    rest: list[AdapterTensor] = []
    for tensor in files.tensors:
        if slot := per_expert.claim(tensor, base):
            single.append((tensor, slot))
        elif path := target_parameters.claim(tensor, base):
            stacked.append((tensor, path))
        else:
            rest.append(tensor)
    if single and stacked:
        raise AdapterError(
            f"{files.file}: LoRA for single experts ({single[0][0].key}) and for stacked ones "
            f"({stacked[0][0].key}); expected one layout."
        )
    experts, rows = per_expert.collect(files.file, single, base, settings)
    if stacked:
        experts, rows = target_parameters.collect(files.file, stacked, base, settings)
    side = plan_torch_side(files.file, rest, base, settings)
    check_coverage(files.file, base, settings, experts, side)
    rows += [_torch_row(tensor, name, side) for name, tensor in side.tensors()]
    add_norms(rows, experts, side)
    return AdapterPlan(files, settings, experts, side, Audit(files.file, rows))


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
