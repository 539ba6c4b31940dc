"""Compares the targets of adapter_config.json with the tensors of the file."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ktrt.adapter.fit import has_tied_embeddings, is_for_text
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.apply.side import TorchSide
    from ktrt.adapter.files.settings import LoraSettings
    from ktrt.adapter.internal import BaseModel, ExpertLoras
    from ktrt.experts.spec import Projection

logger = logging.getLogger(__name__)


def check_coverage(
    file: Path,
    base: BaseModel,
    settings: LoraSettings,
    experts: ExpertLoras,
    side: TorchSide,
    *,
    config_is_exact: bool = True,
) -> None:
    """Raises ``AdapterError`` if the configuration targets modules of this base that have no LoRA
    in the file: the file is cut short.

    Only warns of an adapter without any LoRA on routed experts, since several writers target their
    names but leave them out. Unless ``config_is_exact``, also only warns of a kind of module that
    has LoRA in no layer.
    """
    _check_saved(file, base, settings, side)
    missing = _missing_modules(base, settings, side)
    missing += _missing_parameters(base, settings, experts, side)
    if not config_is_exact:
        trained = {_kind(name) for name in (*side.loras, *side.routers)}
        untrained = [name for name in missing if _kind(name) not in trained]
        if untrained:
            logger.warning(
                "%s targets %s and %d others, for which %s holds no LoRA in any layer: they run as "
                "in the base model", settings.file, untrained[0], len(untrained) - 1, file,
            )  # fmt: skip
        missing = [name for name in missing if _kind(name) in trained]
    expected = _expected_per_expert(base, settings)
    if not experts and expected and not settings.target_parameters:
        logger.warning(
            "%s targets routed experts (%s, …), but %s holds no LoRA for any: they run as in the "
            "base model", settings.file, expected[0][2], file,
        )  # fmt: skip
    elif not _stacked_only(settings):
        missing += [name for path, part, name in expected if part not in experts.get(path, {})]
    if not missing:
        return
    raise AdapterError(
        f"{file}: no LoRA for {missing[0]} ({len(missing)} modules in all, last {missing[-1]}), "
        f"though {settings.file} targets it and {base.summary()}. The file is incomplete, or the "
        "configuration belongs to another adapter."
    )


def _kind(module: str) -> str:
    """Returns the module's name inside its layer."""
    return re.sub(r"^.*?layers\.\d+\.", "", module)


def _check_saved(file: Path, base: BaseModel, settings: LoraSettings, side: TorchSide) -> None:
    """Raises ``AdapterError`` if the file lacks weights that the configuration saves whole:
    ``modules_to_save``, and every bias with ``bias: all``."""
    for name, module in base.model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False) if is_for_text(name) else ():
            whole = settings.saves_module(name)
            if not whole and not (settings.bias == "all" and parameter == "bias"):
                continue
            saved = [*side.whole.get(name, []), *side.base.get(name, [])]
            if parameter not in (tensor.part for tensor in saved):
                reason = f"modules_to_save {settings.modules_to_save}" if whole else "bias 'all'"
                raise AdapterError(
                    f"{file}: no tensor for {name}.{parameter}, though {settings.file} has {reason}"
                    f" and {base.summary()}. The file is incomplete, or the configuration belongs "
                    "to another adapter."
                )


def check_tying(file: Path, base: BaseModel, settings: LoraSettings, side: TorchSide) -> None:
    """Raises ``AdapterError`` if base and configuration tie embeddings and output layer, but the
    file changes only one of them."""
    if not settings.ensure_weight_tying or not has_tied_embeddings(base):
        return
    model: Any = base.model
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in ends]
    changed = {name for name, _ in side.tensors()}
    if any(rows.tied for rows in side.rows.values()):
        changed |= set(names)  # single rows go into both
    inside, outside = ([n for n in names if (n in changed) == which] for which in (True, False))
    if inside and outside:
        raise AdapterError(
            f"{file} changes {inside[0]} and not {outside[0]}, but {settings.file} says "
            "ensure_weight_tying, and the base has one matrix for both. Save the adapter with both "
            "(save_embedding_layers=True), or merge it into the base with PEFT."
        )


def _missing_modules(base: BaseModel, settings: LoraSettings, side: TorchSide) -> list[str]:
    linears = (
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and is_for_text(name)
    )
    return [name for name in linears if name not in side.loras and settings.targets_module(name)]


def _missing_parameters(
    base: BaseModel, settings: LoraSettings, experts: ExpertLoras, side: TorchSide
) -> list[str]:
    """Returns the parameters of target_parameters without LoRA."""
    missing = []
    for name, _ in base.model.named_parameters():
        if settings.targets_parameter(name) and is_for_text(name):
            module, _, parameter = name.rpartition(".")
            site = base.site(module)
            first: Projection = "gate" if site is None or site.has_gate else "up"
            projection = "down" if parameter == "down_proj" else first
            # An ordinary Linear may be named by its weight; its LoRA is then ordinary too.
            on_torch_side = module in side.routers or module in side.loras
            if not on_torch_side and projection not in experts.get(module, {}):
                missing.append(name)
    return missing


def _stacked_only(settings: LoraSettings) -> bool:
    """Returns whether the experts were parameters in training, which target_modules cannot
    reach."""
    return bool(settings.target_parameters)


def _expected_per_expert(
    base: BaseModel, settings: LoraSettings
) -> list[tuple[str, Projection, str]]:
    """Returns (experts path, projection, module name) of each expert in target_modules."""
    expected = []
    for site in base.experts:
        for expert in range(site.num_experts):
            for projection in site.projections:
                name = base.expert_modules.get(
                    (site.path, expert, projection), f"{site.path}.{expert}.{projection}_proj"
                )
                if settings.targets_module(name):
                    expected.append((site.path, projection, name))
    return expected
