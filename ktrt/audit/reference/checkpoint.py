"""Reads the base model's raw weights; finds experts by the names on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ktrt.audit.reference.experts import Clamps
from ktrt.audit.reference.quantized import find_tensors
from ktrt.audit.reference.tensors import CannotVerifyError, RawFile, gate_and_up, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.audit.reference.quantized import Family
    from ktrt.audit.reference.tensors import Float32

_PROJECTIONS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up",
    "w2": "down",
}  # fmt: skip
_SINGLE = re.compile(
    r"layers\.(?P<layer>\d+)\.(?:\w+\.)?experts\.(?P<expert>\d+)\."
    r"(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)(?:\.weight)?"
)
_STACKED = re.compile(
    r"layers\.(?P<layer>\d+)\.(?P<block>\w+\.)?"
    r"(?P<part>experts\.gate_up_proj|experts\.down_proj|input_linear|output_linear)(?:\.weight)?"
)
_BIASES = re.compile(r"layers\.\d+\.mlp\.experts\.(?P<part>gate_up|down)_proj_bias")
# Blocks with different names on disk and in the model.
_BLOCKS = (".mlp.", ".block_sparse_moe.", ".feed_forward.")
_LAYER = re.compile(r"(?P<prefix>|.*?\.)layers\.(?P<layer>\d+)\.(?P<inner>.*)")
# Layers outside the text model: for further tokens, images and sound.
_OTHERS = re.compile(r"(^|\.)(mtp|vis|audio|image|video|speech|talker|code2wav|vt_|encoder\.)")


@dataclass(frozen=True)
class RawExperts:
    """The routed experts of one layer. ``single``: (expert, projection) → tensor name; or
    ``stacked``: names of gate_up [E, 2I, H] and down [E, H, I], with inputs and outputs swapped
    if ``transposed``. ``interleaved``: gate's and up's rows alternate. ``biases``: names of gate_up
    [E, 2I] and down [E, H]."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    single: dict[tuple[int, str], str]
    stacked: tuple[str, str] | None
    transposed: bool = False
    interleaved: bool = False
    biases: tuple[str, str] | None = None


class RawCheckpoint:
    """A model folder with safetensors: the single file, else the tensors that the index names;
    quantised ones in float32.

    Raises ``CannotVerifyError`` if there are none, for a quantisation that cannot be read, and if
    the text model's layers are ambiguous.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / "config.json")
        self._tensors = find_tensors(_files(folder, config.get("transformers_weights")), config)
        text = config.get("text_config") or config
        self.activation = text.get("hidden_act", "silu")
        self._is_gpt_oss = text.get("model_type") == "gpt_oss"
        self.clamps: Clamps | None = None
        if self._is_gpt_oss:
            self.clamps = Clamps(text.get("swiglu_limit", 7.0), text.get("swiglu_alpha", 1.702))
        self._prefix = self._find_prefix(text.get("num_hidden_layers"))

    def _find_prefix(self, num_layers: object) -> str:
        """Returns the prefix of ``layers`` in the text model's names. All of its layers have it; of
        other stacks (towers, layers that predict further tokens) only some may."""
        layers: dict[str, set[int]] = {}
        experts = set()
        for name in self._tensors:
            if match := _LAYER.fullmatch(name):
                layers.setdefault(match["prefix"], set()).add(int(match["layer"]))
                if "experts." in name or "_linear" in name:
                    experts.add(match["prefix"])
        wanted = set(range(num_layers)) if isinstance(num_layers, int) else set()
        found = [p for p in layers if p in experts and not _OTHERS.search(p)]
        found = [p for p in found if wanted <= layers[p]] if len(found) > 1 else found
        if len(found) != 1:
            raise CannotVerifyError(
                f"{self.folder}: found {sorted(found) or 'nothing'} before 'layers' in the names "
                "of experts, expected one prefix: the text model's layers are ambiguous."
            )
        return found[0]

    def file(self, name: str) -> Path:
        """Returns the file that holds the tensor."""
        return self._tensors[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape, from the file's header."""
        return self._tensors[name].shape

    def read(self, name: str) -> Float32:
        """Returns the whole tensor in float32."""
        return self._tensors[name].read(None)

    def linear(self, module: str) -> tuple[Float32, Float32]:
        """Returns weight [out, in] and bias [out] (zero if there is none) of the Linear that PEFT
        names ``module``."""
        match = _LAYER.fullmatch(module)
        names = {f"{self._prefix}layers.{match['layer']}.{match['inner']}" if match else module}
        for old in _BLOCKS:
            names |= {name.replace(old, new) for name in names for new in _BLOCKS if old in name}
        found = [name for name in sorted(names) if f"{name}.weight" in self._tensors]
        if len(found) != 1:
            raise CannotVerifyError(
                f"{self.folder}: found {len(found)} weights for {module}, expected one "
                f"({module}.weight): the names of this family cannot be verified."
            )
        weight, bias = self.read(f"{found[0]}.weight"), f"{found[0]}.bias"
        if bias in self._tensors:
            return weight, self.read(bias)
        return weight, np.zeros(len(weight), np.float32)

    def experts(self, layer: int) -> RawExperts | None:
        """Returns the routed experts of a layer; None for a layer without.

        Raises ``CannotVerifyError`` for names and shapes but ``experts.E.{gate,up,down}_proj``
        (or w1, w3, w2) and stacked gate_up [E, 2I, H], down [E, H, I] or transposed; gpt-oss's
        have biases, and gate's and up's rows alternate.
        """
        start = f"{self._prefix}layers.{layer}."
        inside = [
            name for name in self._tensors
            if name.startswith(start) and ("experts." in name or "_linear" in name)
            and "shared" not in name
        ]  # fmt: skip
        single: dict[tuple[int, str], str] = {}
        stacked: dict[str, str] = {}
        biases: dict[str, str] = {}
        for name in inside:
            own = name.removeprefix(self._prefix)
            if match := _SINGLE.fullmatch(own):
                key = (int(match["expert"]), _PROJECTIONS[match["part"]])
                if key in single:
                    raise CannotVerifyError(f"{name} and {single[key]} are the same weights.")
                single[key] = name
            elif match := _STACKED.fullmatch(own):
                first = match["part"] in ("experts.gate_up_proj", "input_linear")
                stacked["gate_up" if first else "down"] = name
            elif self._is_gpt_oss and (match := _BIASES.fullmatch(own)):
                biases[match["part"]] = name
            else:
                raise CannotVerifyError(
                    f"{self.folder}: {name}: expert weights of this name cannot be verified."
                )
        if single and not stacked:
            return self._single(layer, single)
        if len(stacked) == 2 and not single and len(biases) == 2 * self._is_gpt_oss:
            found = self._stacked(stacked["gate_up"], stacked["down"])
            if not biases:
                return found
            both = (biases["gate_up"], biases["down"])
            return replace(found, interleaved=True, biases=both)
        if single or stacked:
            raise CannotVerifyError(
                f"{self.folder}: the experts of layer {layer} are stored in a form that cannot be "
                f"verified ({len(single)} single, {len(stacked)} stacked tensors, {len(biases)} "
                "biases)."
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
        count, rows, columns = (*self.shape(down), 0, 0, 0)[:3]
        if self.shape(first) == (count, 2 * columns, rows):
            return RawExperts(count, rows, columns, {}, (first, down))
        # No shape fits both forms: 2I would have to equal I.
        if self.shape(first) == (count, columns, 2 * rows):
            return RawExperts(count, columns, rows, {}, (first, down), transposed=True)
        raise CannotVerifyError(
            f"{first} has shape {self.shape(first)}, {down} {self.shape(down)}; only [E, 2I, H] "
            "and [E, H, I], or both transposed, can be verified."
        )

    def family(self, experts: RawExperts) -> Family:
        """Returns the kind of codes that all weights of these experts have; empty for plain numbers
        and for several kinds."""
        names = [*experts.single.values(), *(experts.stacked or ())]
        found = {self._tensors[name].family for name in names}
        return found.pop() if len(found) == 1 else ""

    def read_expert(
        self, experts: RawExperts, expert: int, *, as_packed: bool = False
    ) -> dict[str, Float32]:
        """Returns gate, up [I, H] and down [H, I] of one expert, in float32. ``as_packed``: codes
        times scales in the precision that an engine keeps them in."""

        def read(name: str, row: int | None) -> Float32:
            stored = self._tensors[name]
            packed = stored.read_packed if as_packed else None
            return (packed or stored.read)(row)

        if experts.stacked is None:
            return {p: read(experts.single[expert, p], None) for p in ("gate", "up", "down")}
        first, down = experts.stacked
        rows, last = read(first, expert), read(down, expert)
        if experts.transposed:
            rows, last = np.ascontiguousarray(rows.T), np.ascontiguousarray(last.T)
        return {**gate_and_up(rows, experts.interleaved), "down": last}

    def read_biases(self, experts: RawExperts, expert: int) -> dict[str, Float32]:
        """Returns one expert's biases by projection; empty without."""
        if experts.biases is None:
            return {}
        first, down = (self._tensors[name].read(expert) for name in experts.biases)
        return {**gate_and_up(first, experts.interleaved), "down": down}


def _files(folder: Path, chosen: object) -> dict[str, RawFile]:
    """Returns tensor → file."""
    main = folder / chosen if isinstance(chosen, str) else folder / "model.safetensors"
    if not isinstance(chosen, str) and not main.is_file():
        main = folder / "model.safetensors.index.json"
    if main.suffix != ".json":
        file = RawFile(main)
        return dict.fromkeys(file.shapes, file)
    weight_map = read_json(main).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
        raise CannotVerifyError(f"{main}: weight_map is no object of file names.")
    opened = {name: RawFile(folder / name) for name in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in opened[file].shapes:
            raise CannotVerifyError(f"{folder / file} does not hold {name}, as {main.name} says.")
    return {name: opened[file] for name, file in weight_map.items()}


def _is_name(value: object) -> bool:
    return isinstance(value, str)
