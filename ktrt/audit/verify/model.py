"""Compares loaded layers with the raw files, recomputed by ``ktrt.audit.reference`` in NumPy.

Every expert gets hidden states of three kinds: random ones, some in the row space of gate's and
up's lora_A, and some orthogonal to it, for which only down's LoRA acts. The verdict compares tuned
minus base with NumPy's difference, where NumPy rounds like the weight format. The error against
plain float32 is the format's cost.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ktrt.audit.reference import (
    CannotVerifyError,
    Expert,
    RawAdapter,
    RawCheckpoint,
    expert_output,
)
from ktrt.audit.reference.experts import int4_groups
from ktrt.audit.verify.linears import check_linear
from ktrt.audit.verify.probes import (
    Check,
    Limits,
    Outputs,
    compare,
    mixed_probe,
    single_probe,
)
from ktrt.errors import AdapterError, CheckpointError
from ktrt.experts import KTExperts
from ktrt.folders import check_model_folder
from ktrt.loading.model import load_model
from ktrt.loading.plan import open_base, open_kt_weights
from ktrt.utils.json_files import read_json
from ktrt.utils.progress import byte_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from ktrt.audit.reference import Lora, RawExperts, WeightFormat
    from ktrt.audit.reference.tensors import Float32
    from ktrt.audit.verify.probes import Probe
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.loading.model import LoadedModel

logger = logging.getLogger(__name__)

_ROUNDED: tuple[WeightFormat, ...] = ("bf16", "int8", "int4")
# Made of plain weights, with a search for each scale.
_SEARCHED = "int4_g32"
# The form of gpt-oss's experts, which NumPy computes by its config.json.
_GPT_OSS = (
    "biases", "a slope of the activation", "limits of gate or up", "an offset of up",
)  # fmt: skip
# By weight format. The engine sums in another order than NumPy, so a number is sometimes rounded
# the other way: off by up to 0.00005 on the demo and tiny models, on every instruction set. The
# error against float32 is the format's: 0.006, 0.03 and 0.3 on Gaussian data (tests/cpp/moe), plus
# room for less even weights.
LIMITS: dict[str, Limits] = {
    "bf16": Limits(same=0.001, difference=0.03, noise=0.0003, float32=0.02),
    "int8": Limits(same=0.002, difference=0.03, noise=0.001, float32=0.1),
    "int4": Limits(same=0.002, difference=0.03, noise=0.001, float32=0.5),
    # Codes as shipped are as exact as BF16 weights, against float32 on the dequantised ones.
    **dict.fromkeys(
        ("fp8", "fp8_channel", "int4_g32", "int4_g64", "int4_g128", "mxfp4"),
        Limits(same=0.001, difference=0.03, noise=0.0003, float32=0.02),
    ),
}
# 15 % is the error of an expert on Gaussian data (8.6 % of each of three matrices), 19 % on heavy
# tails.
SEARCHED_LIMITS = Limits(same=0.002, difference=0.03, noise=0.001, float32=0.3)


@dataclass
class LayerReport:
    """The checks of one layer; ``failures`` in words, empty if all agree. ``assumed``: an
    assumption needed to read the adapter's files. ``unchecked``: the adapter's changes outside the
    layers (embeddings, output layer), which no layer's checks include."""

    layer: int
    what: str
    checks: list[Check] = field(default_factory=list)
    assumed: str = ""
    unchecked: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [f"{check.name}: {text}" for check in self.checks for text in check.failures]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and not self.failures


def verify(
    model: ModelArgs,
    adapter: AdapterArgs,
    experts: ExpertArgs,
    layer: int | None = None,
    *,
    everything: bool = False,
) -> list[LayerReport]:
    """Loads the model, with the checked experts only, and verifies ``layer``, all layers with LoRA,
    or the first one with LoRA on routed experts.

    Raises ``CannotVerifyError`` for forms that the independent reader does not cover.
    """
    folder = adapter.single()
    assert folder is not None
    _check_folders(model.model_name_or_path, folder, experts)
    lora = RawAdapter(folder, adapter.lora_B_layout)
    base = RawCheckpoint(model.model_name_or_path)
    layers = _layers(lora, layer, everything)
    loaded = load_model(model, adapter, experts, None if everything else layers)
    slices = _down_slices(model, experts)
    try:
        with byte_progress("Recomputing in NumPy", expert_bytes(base, layers)) as advance:
            return [verify_layer(loaded, base, lora, number, slices, advance) for number in layers]
    finally:
        loaded.close()


def _check_folders(model: Path, adapter: Path, experts: ExpertArgs) -> None:
    """Raises clear errors for wrong folders and missing files, which the raw readers cannot."""
    check_model_folder(model, experts_elsewhere=experts.kt_weight_path is not None)
    read_json(model / "config.json", CheckpointError)
    config = adapter / "adapter_config.json"
    if config.is_symlink() or config.exists():
        read_json(config, AdapterError)


def _down_slices(model: ModelArgs, experts: ExpertArgs) -> int:
    """Returns the number of separately scaled slices of down's columns in kt_kernel's files."""
    if experts.kt_weight_path is None:
        return 1
    files = open_kt_weights(experts, open_base(model).experts.specs)
    return 1 if files is None else files.parts


def _layers(lora: RawAdapter, layer: int | None, everything: bool) -> list[int]:
    if not lora.layers:
        raise CannotVerifyError(f"{lora.folder} has no LoRA in any layer: nothing to verify.")
    if everything:
        return lora.layers
    if layer is None:
        return (lora.expert_layers or lora.layers)[:1]
    if layer not in lora.layers:
        raise CannotVerifyError(
            f"{lora.folder} has no LoRA in layer {layer}; expected one of {lora.layers}."
        )
    return [layer]


def verify_layer(
    loaded: LoadedModel,
    base: RawCheckpoint,
    lora: RawAdapter,
    layer: int,
    down_slices: int = 1,
    progress: Callable[[float], None] = lambda _bytes: None,
) -> LayerReport:
    """Compares one layer of a loaded model with the raw files; see ``verify``. ``down_slices``:
    kt_kernel's files'. ``progress`` gets the bytes of expert weights as NumPy reads them."""
    module = _experts_module(loaded, layer)
    raw = base.experts(layer)
    if (module is None) != (raw is None):
        raise CannotVerifyError(f"{base.folder}: found no experts of layer {layer}, or too many.")
    report = LayerReport(layer, "no routed experts", unchecked=lora.outside_layers)
    if module is not None and raw is not None:
        _check_form(base, module, raw)
        sizes = raw.num_experts, raw.hidden_size, raw.intermediate_size
        loras = lora.experts(layer, *sizes, interleaved=raw.interleaved)
        weight_format = module.layer.weight_format
        report.what = f"{raw.num_experts} experts in {weight_format.upper()}"
        report.assumed = lora.assumed
        report.checks += _check_experts(module, base, raw, loras, layer, down_slices, progress)
    for name, pair in lora.linears(layer).items():
        report.checks.append(check_linear(loaded.model, name, base, pair, _seed(layer)))
    return report


def _experts_module(loaded: LoadedModel, layer: int) -> KTExperts | None:
    for path, module in loaded.model.named_modules():
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
        if isinstance(module, KTExperts) and numbers and int(numbers[-1]) == layer:
            return module
    return None


def _check_form(base: RawCheckpoint, module: KTExperts, raw: RawExperts) -> None:
    engine = module.layer
    # Slices come from kt_kernel's files for several NUMA nodes, and can be computed.
    known = {"down in slices of columns", *(_GPT_OSS if base.clamps is not None else ())}
    unusual = [form for form in module.unusual_form if form not in known]
    if base.activation not in ("silu", "swish"):
        unusual.append(f"activation {base.activation}")
    if unusual:
        raise CannotVerifyError(
            f"{base.folder}: experts of this form cannot be verified: {', '.join(unusual)}."
        )
    found = (raw.num_experts, raw.hidden_size, raw.intermediate_size)
    if found != (engine.num_experts, engine.hidden_size, engine.intermediate_size):
        raise CannotVerifyError(f"{base.folder}: sizes of the experts are ambiguous: {found}.")


def _check_experts(
    module: KTExperts,
    base: RawCheckpoint,
    raw: RawExperts,
    loras: list[dict[str, Lora]],
    layer: int,
    down_slices: int,
    progress: Callable[[float], None],
) -> list[Check]:
    engine = module.layer
    single = single_probe(loras, raw.hidden_size, _seed(layer))
    mixed = mixed_probe(raw.num_experts, engine.top_k, raw.hidden_size, _seed(layer))
    weight_format, limits = engine.weight_format, LIMITS[engine.weight_format]
    is_shipped = _is_shipped(weight_format, base.family(raw))
    if weight_format == _SEARCHED and not is_shipped:
        limits = SEARCHED_LIMITS
    # Codes times scales: exact, or rounded once (AMX).
    kernels = (weight_format,) if weight_format in _ROUNDED else ("coded", "bf16")
    wanted = [Outputs.empty(probe.states.shape, len(kernels)) for probe in (single, mixed)]
    for number, lora in enumerate(loras):
        weights, biases = base.read_expert(raw, number), base.read_biases(raw, number)
        packed = weights
        if is_shipped:
            packed = base.read_expert(raw, number, as_packed=True)
        elif weight_format == _SEARCHED:
            packed = {name: int4_groups(weight) for name, weight in weights.items()}
        for kernel, rounding in enumerate(("float32", *kernels)):
            shown = packed if kernel else weights
            expert = Expert(shown, rounding, down_slices, biases, base.clamps)
            for probe, outputs in zip((single, mixed), wanted, strict=True):
                _add_expert(expert, number, lora, probe, outputs.all[kernel])
        progress(sum(weight.nbytes for weight in weights.values()))
    names = ("each expert", "several at once", "token by token")
    probes = ((single, wanted[0], 1024), (mixed, wanted[1], 1024), (mixed, wanted[1], 1))
    return [
        compare(name, probe, outputs, _run(module, probe, chunk), limits)
        for name, (probe, outputs, chunk) in zip(names, probes, strict=True)
    ]


def _is_shipped(weight_format: str, family: str) -> bool:
    """Returns whether experts in an engine's format are a base's own codes, of ``family``. Raises
    ``CannotVerifyError`` for formats that the engine makes of no other weights."""
    if weight_format in _ROUNDED:
        return False
    if weight_format.partition("_")[0] == family:
        return True
    if weight_format == _SEARCHED:
        return False
    raise CannotVerifyError(
        f"experts in {weight_format.upper()} that are packed from {family or 'plain'} weights "
        "cannot be verified: only the checkpoint's own codes."
    )


def _add_expert(
    expert: Expert,
    number: int,
    lora: dict[str, Lora],
    probe: Probe,
    outputs: tuple[Float32, Float32],
) -> None:
    """Adds one expert's share to NumPy's outputs, base and tuned."""
    tokens, slots = np.nonzero(probe.ids == number)
    x, weights = probe.states[tokens], probe.weights[tokens, slots, None]
    for output, acting in zip(outputs, ({}, lora), strict=True):
        np.add.at(output, tokens, expert_output(expert, x, acting) * weights)


def _run(module: KTExperts, probe: Probe, chunk: int) -> tuple[Float32, Float32]:
    """Returns the engine's base and tuned outputs, computed ``chunk`` tokens at a time."""
    layer = module.layer
    results = []
    active = layer.active_loras
    try:
        for loras in ([], active):
            layer.activate_loras([number for number, _ in loras], [weight for _, weight in loras])
            out = torch.empty(probe.states.shape)
            states, ids, weights = map(torch.from_numpy, (probe.states, probe.ids, probe.weights))
            for start in range(0, len(out), chunk):
                tokens = slice(start, start + chunk)
                layer.forward(states[tokens], ids[tokens], weights[tokens], out[tokens])
            results.append(out.numpy())
    finally:
        layer.activate_loras([number for number, _ in active], [weight for _, weight in active])
    return results[0], results[1]


def _seed(layer: int) -> int:
    return 1000 + layer


def expert_bytes(base: RawCheckpoint, layers: Collection[int]) -> int:
    """Returns the bytes that ``verify`` will read: these layers' routed experts in float32."""
    found = [raw for layer in layers if (raw := base.experts(layer)) is not None]
    return sum(12 * raw.num_experts * raw.hidden_size * raw.intermediate_size for raw in found)
