"""Reads a LoRA adapter's raw tensors in any of the common layouts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktrt.audit.reference.adapter_names import half_of, is_elsewhere
from ktrt.audit.reference.adapter_packing import find_grouping
from ktrt.audit.reference.tensors import CannotVerifyError, RawFile, gate_and_up, read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ktrt.audit.reference.tensors import Float32

_FILES = ("adapter_model.safetensors", "fused_expert_lora.safetensors")
_SHARDS = "adapter_model-*-of-*.safetensors"
_PARTS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up",
    "w2": "down", "gate_up_proj": "gate_up", "gate": "gate", "up": "up", "down": "down",
}  # fmt: skip
_NAMED = re.compile(r".+\.experts(?:\.(?P<expert>\d+))?\.(?P<part>\w+)")
_STACKED = re.compile(r"(?P<path>.+\.experts)(?P<inner>\.base_layer)?")
_FUSED_MODULE = re.compile(r"\.experts\.(?:gate|up|down)$")
_EXPERTS = re.compile(
    r"(?<!\w)experts(?:\.\d.*|\.base_layer|\.(?:gate|up|down|gate_up|w[123])(?:_proj)?)?$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Lora:
    """ΔW = scaling · b · a; a [rank, in], b [out, rank]."""

    a: Float32
    b: Float32
    scaling: float


class RawAdapter:
    """An adapter folder. ``layers``: all with LoRA; ``expert_layers``: with LoRA on routed experts.

    Raises ``CannotVerifyError`` for a file that is no safetensors and for tensors beyond LoRA.
    """

    def __init__(self, folder: Path, packing: str | None = None) -> None:
        """``packing``: the user's lora_B_layout."""
        self.folder = folder
        self.config = _config(folder)
        self.assumed = ""
        self._packing = packing
        self._pairs: dict[str, dict[str, Callable[[], Float32]]] = {}
        self._trained: dict[str, str] = {}
        self._others: list[str] = []
        for file in _files(folder):
            for key in file.shapes:
                if not is_elsewhere(key):
                    self._add(key, file)
        self.layers = sorted({n for module in self._pairs if (n := _layer(module)) is not None})
        self.expert_layers = sorted(
            {n for m in self._pairs if _on_experts(m) and (n := _layer(m)) is not None}
        )

    @property
    def outside_layers(self) -> list[str]:
        """Names of modules with LoRA and of whole tensors outside the layers."""
        names = [*self._pairs, *self._others]
        return sorted(name for name in names if _layer(name) is None)

    def _add(self, key: str, file: RawFile) -> None:
        half = half_of(key)
        if half is None:
            self._others.append(key)
            return
        if 0 in file.shapes[key] and half.module.endswith(".experts.w3"):
            return  # Tinker's placeholder for a gate that these experts lack

        def read() -> Float32:
            value = file.read(key)
            return value.swapaxes(1, 2) if half.is_transposed else value

        parts = self._pairs.setdefault(half.module, {})
        if half.half in parts and not np.array_equal(parts[half.half](), read()):
            raise CannotVerifyError(f"{file.file}: {key} occurs twice with different values.")
        parts[half.half] = read
        self._trained[half.module] = half.trained

    def _lora(self, module: str, target: str | None = None) -> Lora:
        parts = self._pairs[module]
        if len(parts) != 2:
            raise CannotVerifyError(f"{self.folder}: {module} has only lora_{next(iter(parts))}.")
        return Lora(parts["A"](), parts["B"](), self.scaling(target or module))

    def _grouped(self, count: int) -> bool:
        """Returns whether stacked B is grouped by expert; notes the assumption, if any."""
        stacks = [
            (parts["A"](), parts["B"]())
            for module, parts in self._pairs.items()
            if _STACKED.fullmatch(module) and len(parts) == 2
        ]
        known = (self.folder / "automodel_peft_config.json").is_file()
        option = self._packing or ("rank_major" if known else None)
        found = find_grouping(self.config, option, stacks, count)
        self.assumed = found.assumed
        return found.by_expert

    def _pattern(self, name: str, module: str, default: str) -> float:
        for pattern, value in (self.config.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.config[default])

    def scaling(self, module: str) -> float:
        """Returns alpha/r, or alpha/√r with rsLoRA, of a module or parameter. KTransformers' fused
        experts know neither patterns nor rsLoRA."""
        if _FUSED_MODULE.search(module):
            return float(self.config["lora_alpha"] / self.config["r"])
        module = self._trained.get(module, module)
        rank = self._pattern("rank_pattern", module, "r")
        alpha = self._pattern("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def linears(self, layer: int) -> dict[str, Lora]:
        """Returns the layer's LoRA outside the routed experts, by the module's name for PEFT."""
        self._check_others(layer)
        found = {}
        for module in self._pairs:
            if _layer(module) == layer and not _on_experts(module):
                weight = f"{module}.weight"
                named = self.config.get("target_parameters") or []
                bare = any(weight == t or weight.endswith(f".{t}") for t in named)
                plain = module.removesuffix(".base_layer")
                found[plain] = self._lora(module, weight if bare else None)
        return found

    def _check_others(self, layer: int) -> None:
        left = [k for k in self._others if _layer(k) == layer]
        if left or self.config.get("use_dora"):
            raise CannotVerifyError(
                f"{self.folder}: layer {layer} has more than LoRA ({left[0] if left else 'DoRA'}), "
                "which cannot be verified."
            )

    def experts(
        self,
        layer: int,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        interleaved: bool = False,
    ) -> list[dict[str, Lora]]:
        """Returns for each routed expert of the layer: projection → LoRA; empty without LoRA.
        ``interleaved``: rows of gate and up alternate in the base."""
        self._check_others(layer)
        found: list[dict[str, Lora]] = [{} for _ in range(num_experts)]
        modules = [m for m in self._pairs if _layer(m) == layer and _on_experts(m)]
        # projection → A or B → expert (None: all) → its module in the file.
        named: dict[str, dict[str, dict[int | None, str]]] = {}
        for module in modules:
            if _STACKED.fullmatch(module):
                sizes = hidden_size, intermediate_size
                self._stacked(module, modules, sizes, found, interleaved)
                continue
            match = _NAMED.fullmatch(module)
            number = None if match is None or match["expert"] is None else int(match["expert"])
            if match is None or match["part"] not in _PARTS or (number or 0) >= num_experts:
                raise CannotVerifyError(f"{self.folder}: {module} is no expert of the base.")
            halves = named.setdefault(_PARTS[match["part"]], {"A": {}, "B": {}})
            for half in self._pairs[module]:
                halves[half][number] = module
        for projection, halves in named.items():
            self._named(projection, halves, found, interleaved)
        _check_sizes(self.folder, layer, found, hidden_size, intermediate_size)
        return found

    def _named(
        self,
        projection: str,
        halves: dict[str, dict[int | None, str]],
        found: list[dict[str, Lora]],
        interleaved: bool,
    ) -> None:
        """Adds one projection (gate_up: both's rows). A half is one matrix per expert,
        or one tensor for all: [E, …], [1, …] or a shared matrix."""
        whole = {half: self._pairs[m[None]][half]() for half, m in halves.items() if None in m}

        def matrix(half: str, expert: int) -> Float32:
            if expert in halves[half]:
                return self._pairs[halves[half][expert]][half]()
            stack = whole.get(half)
            if stack is None or (stack.ndim == 3 and len(stack) not in (1, len(found))):
                raise CannotVerifyError(
                    f"{self.folder}: no lora_{half} for {projection} of expert {expert}."
                )
            return stack if stack.ndim == 2 else stack[expert if len(stack) > 1 else 0]

        for expert, each in enumerate(found):
            module = halves["A"].get(expert) or halves["A"].get(None, "")
            a, b, scaling = matrix("A", expert), matrix("B", expert), self.scaling(module)
            if projection == "gate_up":
                halves_of_b = gate_and_up(b, interleaved).items()
                each |= {name: Lora(a, rows, scaling) for name, rows in halves_of_b}
            else:
                each[projection] = Lora(a, b, scaling)

    def _stacked(
        self,
        module: str,
        modules: list[str],
        sizes: tuple[int, int],
        found: list[dict[str, Lora]],
        interleaved: bool,
    ) -> None:
        """Adds PEFT's target_parameters: A [E·r, in] expert-major, B [out, r·E] rank-major."""
        match = _STACKED.fullmatch(module)
        assert match is not None
        hidden, inner = sizes
        path = match["path"]
        both = path in modules and f"{path}.base_layer" in modules
        targets = {t.rpartition(".")[2] for t in self.config.get("target_parameters") or []}
        is_first = match["inner"] is not None if both else "gate_up_proj" in targets
        if not both and len(targets & {"gate_up_proj", "down_proj"}) != 1:
            raise CannotVerifyError(f"{self.folder}: {module}: its parameter is ambiguous.")
        name = "gate_up_proj" if is_first else "down_proj"
        size_in, size_out = (hidden, 2 * inner) if is_first else (inner, hidden)
        lora = self._lora(module, f"{path}.{name}")
        count = len(found)
        rank = lora.a.shape[0] // count
        grouped = self._grouped(count)
        swapped = lora.a.shape[1] == size_in and lora.b.shape[0] == size_out
        if swapped and size_in == size_out:
            # The other parameter has the same form, and is not square.
            if both:
                other = self._lora(path if is_first else f"{path}.base_layer")
                swapped = other.a.shape[1] == (inner if is_first else hidden)
            else:
                swapped = _swaps(self.folder, module, self.config.get("peft_version"))
        for e, each in enumerate(found):
            a = lora.a[e * rank : (e + 1) * rank]
            b = lora.b[:, e * rank : (e + 1) * rank] if grouped else lora.b[:, e::count]
            if not swapped:  # (BA)ᵀ = Aᵀ Bᵀ
                a, b = b.T, a.T
            if is_first:
                halves = gate_and_up(b, interleaved).items()
                each |= {name: Lora(a, rows, lora.scaling) for name, rows in halves}
            else:
                each["down"] = Lora(a, b, lora.scaling)


def _files(folder: Path) -> list[RawFile]:
    """Returns the single file, else its shards, else the files of the first subfolder with any."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        found = [place / name for name in _FILES if (place / name).is_file()]
        if not found or found[0].name != _FILES[0]:
            found = [*sorted(place.glob(_SHARDS)), *found]
        if found:
            return [RawFile(path) for path in found]
    pickles = sorted(path.name for end in ("bin", "pt") for path in folder.glob(f"*.{end}"))
    advice = "Load and save it with PEFT (save_pretrained) first. " if pickles else ""
    raise CannotVerifyError(
        f"{folder} holds none of {', '.join(_FILES)}{f', but {pickles[0]}' if pickles else ''}. "
        f"{advice}Only safetensors can be verified."
    )


def _config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json, else rank and alpha of KTransformers' manifest."""
    config, manifest = folder / "adapter_config.json", folder / "kt_adapter_manifest.json"
    if config.is_file() or not manifest.is_file():
        return read_json(config)
    lora = read_json(manifest).get("lora") or {}
    return {"r": lora.get("rank"), "lora_alpha": lora.get("alpha")}


def _layer(name: str) -> int | None:
    numbers = _LAYER.findall(name)
    return int(numbers[-1]) if numbers else None


def _on_experts(module: str) -> bool:
    return _EXPERTS.search(module) is not None


def _swaps(folder: Path, module: str, version: object) -> bool:
    """Returns whether the PEFT that wrote a square parameter put A on its last dimension
    (≥ 0.19.1)."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    if numbers is None:
        raise CannotVerifyError(
            f"{folder}: {module} is square: its orientation depends on peft_version, found "
            f"{version!r}."
        )
    return tuple(map(int, numbers.groups())) >= (0, 19, 1)


def _check_sizes(
    folder: Path, layer: int, found: list[dict[str, Lora]], hidden: int, inner: int
) -> None:
    for expert, loras in enumerate(found):
        for projection, lora in loras.items():
            size_in, size_out = (inner, hidden) if projection == "down" else (hidden, inner)
            shapes = (lora.a.shape, lora.b.shape)
            if shapes != ((lora.a.shape[0], size_in), (size_out, lora.a.shape[0])):
                raise CannotVerifyError(
                    f"{folder}: layer {layer}, expert {expert}, {projection}: LoRA of shapes "
                    f"{shapes} does not fit in {size_in}, out {size_out}."
                )
