"""The base model's raw weights: which tensor is which expert, by the names on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ktrt.reference.tensors import CannotVerifyError, RawFile, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.reference.tensors import Float32

_PROJECTIONS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up",
    "w2": "down",
}  # fmt: skip
_SINGLE = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:\w+\.)?experts\.(?P<expert>\d+)\."
    r"(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)(?:\.weight)?"
)
_STACKED = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<block>\w+\.)?"
    r"(?P<part>experts\.gate_up_proj|experts\.down_proj|input_linear|output_linear)(?:\.weight)?"
)
# Blocks that are called otherwise on disk than in the model.
_BLOCKS = (".mlp.", ".block_sparse_moe.", ".feed_forward.")


@dataclass(frozen=True)
class RawExperts:
    """The routed experts of one layer. ``single``: (expert, projection) → tensor name; or
    ``stacked``: names of gate_up [E, 2I, H] and down [E, H, I]."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    single: dict[tuple[int, str], str]
    stacked: tuple[str, str] | None


class RawCheckpoint:
    """A model folder with safetensors. ``CannotVerifyError`` if there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = read_json(index)["weight_map"]
        else:
            names = RawFile(folder / "model.safetensors").shapes
            files = dict.fromkeys(names, "model.safetensors")
        self._opened = {name: RawFile(folder / name) for name in sorted(set(files.values()))}
        self._files: dict[str, RawFile] = {k: self._opened[v] for k, v in files.items()}
        config = read_json(folder / "config.json")
        text = config.get("text_config") or config
        if config.get("quantization_config"):
            raise CannotVerifyError(f"{folder}: a quantised checkpoint cannot be verified yet.")
        self.activation = text.get("hidden_act", "silu")

    def shape(self, name: str) -> tuple[int, ...]:
        """By the file's header."""
        return self._files[name].shapes[name]

    def read(self, name: str) -> Float32:
        """The whole tensor in float32."""
        return self._files[name].read(name)

    def linear(self, module: str) -> tuple[Float32, Float32]:
        """Weight [out, in] and bias [out] (zero where there is none) of a Linear, ``module`` being
        its name for PEFT."""
        names = {module}
        for old in _BLOCKS:
            names |= {module.replace(old, new) for new in _BLOCKS if old in module}
        names |= {name.removeprefix("model.") for name in names}
        found = [name for name in sorted(names) if f"{name}.weight" in self._files]
        if len(found) != 1:
            raise CannotVerifyError(
                f"{self.folder}: found {len(found)} weights for {module}, expected one "
                f"({module}.weight): the names of this family cannot be verified."
            )
        weight, bias = self.read(f"{found[0]}.weight"), f"{found[0]}.bias"
        if bias in self._files:
            return weight, self.read(bias)
        return weight, np.zeros(len(weight), np.float32)

    def experts(self, layer: int) -> RawExperts | None:
        """The routed experts of a layer; None for a layer without.

        ``CannotVerifyError``: names or shapes beyond ``experts.E.{gate,up,down}_proj`` (or w1, w3,
        w2) and stacked gate_up [E, 2I, H], down [E, H, I]; biases.
        """
        inside = [
            name for name in self._files
            if f"layers.{layer}." in name and ("experts." in name or "_linear" in name)
            and "shared" not in name
        ]  # fmt: skip
        single: dict[tuple[int, str], str] = {}
        stacked: dict[str, str] = {}
        for name in inside:
            if (match := _SINGLE.fullmatch(name)) and int(match["layer"]) == layer:
                key = (int(match["expert"]), _PROJECTIONS[match["part"]])
                if key in single:
                    raise CannotVerifyError(f"{name} and {single[key]} are the same weights.")
                single[key] = name
            elif (match := _STACKED.fullmatch(name)) and int(match["layer"]) == layer:
                first = match["part"] in ("experts.gate_up_proj", "input_linear")
                stacked["gate_up" if first else "down"] = name
            elif re.search(rf"(?:^|\.)layers\.{layer}\.", name):
                raise CannotVerifyError(
                    f"{self.folder}: {name}: expert weights of this name cannot be verified."
                )
        if single and not stacked:
            return self._single(layer, single)
        if len(stacked) == 2 and not single:
            return self._stacked(stacked["gate_up"], stacked["down"])
        if single or stacked:
            raise CannotVerifyError(
                f"{self.folder}: the experts of layer {layer} are stored in a form that cannot be "
                f"verified ({len(single)} single, {len(stacked)} stacked tensors)."
            )
        return None

    def _single(self, layer: int, names: dict[tuple[int, str], str]) -> RawExperts:
        count = 1 + max(expert for expert, _ in names)
        wanted = {(e, p) for e in range(count) for p in ("gate", "up", "down")}
        if set(names) != wanted:
            lacking = sorted(wanted - set(names))[:3]
            raise CannotVerifyError(
                f"{self.folder}: layer {layer} lacks the experts' weights {lacking}; experts "
                "without gate_proj cannot be verified."
            )
        inner, hidden = self.shape(names[0, "gate"])
        for (_, projection), name in names.items():
            expected = (hidden, inner) if projection == "down" else (inner, hidden)
            if self.shape(name) != expected:
                raise CannotVerifyError(f"{name} has shape {self.shape(name)}, not {expected}.")
        return RawExperts(count, hidden, inner, names, None)

    def _stacked(self, first: str, down: str) -> RawExperts:
        count, hidden, inner = (*self.shape(down), 0, 0, 0)[:3]
        if self.shape(first) != (count, 2 * inner, hidden):
            raise CannotVerifyError(
                f"{first} has shape {self.shape(first)} beside {down} {self.shape(down)}; only "
                "[E, 2I, H] and [E, H, I] can be verified."
            )
        return RawExperts(count, hidden, inner, {}, (first, down))

    def read_expert(self, experts: RawExperts, expert: int) -> dict[str, Float32]:
        """gate, up [I, H] and down [H, I] of one expert, in float32."""
        if experts.stacked is None:
            return {p: self.read(experts.single[expert, p]) for p in ("gate", "up", "down")}
        first, down = experts.stacked
        rows = self._files[first].read(first, expert)
        return {
            "gate": rows[: experts.intermediate_size],
            "up": rows[experts.intermediate_size :],
            "down": self._files[down].read(down, expert),
        }
