"""Damages adapter folders, drawn by Hypothesis; each damage lists the words that its error may
contain."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
CONFIG, MANIFEST = "adapter_config.json", "kt_adapter_manifest.json"
MODEL = "adapter_model.safetensors"
_LEAVES = {"gate": ("gate", "w1"), "up": ("up", "w3"), "down": ("down", "w2")}
_SWAPS = [
    ("lora_A", "lora_B"), ("lora_a", "lora_b"), ("gate", "up"), ("up", "down"), ("w1", "w3"),
    ("w2", "w1"), ("layers.1", "layers.0"), ("layers.1", "layers.7"), ("experts.1", "experts.3"),
    ("experts.0", "experts.1"), ("experts.2", "experts"), ("self_attn", "attn"), ("mlp", "moe"),
    ("q_proj", "k_proj"), (".weight", ""), (".weight", ".bias"), ("base_model.", ""),
    ("base_model.model.", ""), ("experts", "expert"), (".base_layer", ""), ("le_", "lo_"),
    ("shared_experts", "experts.0"), ("lora_", "loha_"), ("_proj", "_projection"),
]  # fmt: skip


@dataclass
class Damage:
    """A damage; its error must contain all words of one of ``names``."""

    what: str
    names: list[Sequence[str]] = field(default_factory=list)


def names_of(key: str) -> list[Sequence[str]]:
    """Returns sets of words, one of which a message about this tensor, its module or its missing
    partner contains."""
    layer = re.search(r"layers\.\d+", key)
    attention = re.search(r"self_attn\.(\w+)", key)
    leaves = [attention[1]] if attention else []
    for words in _LEAVES.values():
        if re.search(rf"\b(le_)?({'|'.join(words)})(_proj|_lora_.)?\b", key):
            leaves += words
    # One name stands for several matrices.
    leaves += re.findall(r"lora_experts\.\d+|mlp\.experts(?=\.(?:base_layer|lora_))", key)
    return [[key], *([layer[0], leaf] for leaf in leaves if layer)]


def damage_tensor(draw: Any, folder: Path, files: Sequence[str]) -> Damage:
    """Changes one tensor of one of the safetensors files."""
    file = folder / draw(st.sampled_from(files))
    tensors = load_file(file)
    key = draw(st.sampled_from(sorted(tensors)))
    kind = draw(st.sampled_from(sorted(_TENSOR_KINDS)))
    damage = Damage(f"{kind} {file.name} {key}", names_of(key))
    _TENSOR_KINDS[kind](draw, tensors, key, damage)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return damage


def _drop(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    del tensors[key]


def _drop_pair(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    stem = re.split(r"\.lora_(?=[AB])|_lora_(?=[ab])|\.le_", key)[0]
    for name in [name for name in tensors if name.startswith(stem)]:
        del tensors[name]


def _rename(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    swaps = [pair for pair in [*_SWAPS, *((b, a) for a, b in _SWAPS)] if pair[0] and pair[0] in key]
    old, new = draw(st.sampled_from([*swaps, (key, f"{key}.x"), (key, f"x.{key}")]))
    name = key.replace(old, new, 1)
    damage.names += names_of(name)
    tensors[name] = tensors.pop(key)


def _transpose(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    value = tensors[key]
    dims = draw(st.permutations(range(value.ndim)))
    tensors[key] = value.permute(dims)


def _resize(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    value = tensors[key]
    dim = draw(st.integers(0, value.ndim - 1))
    before = value.shape[dim]
    sizes = {0, 1, 2, before - 1, before + 1, 300} - {before}
    size = draw(st.sampled_from(sorted(sizes)))
    longer = torch.cat([value, value.new_ones(*value.shape).repeat_interleave(300, dim)], dim)
    tensors[key] = longer.narrow(dim, 0, size)


def _reshape(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    value = tensors[key]
    shapes = [(), (1, *value.shape), (*value.shape, 1), (-1,), (*value.shape[:-1], 1, -1)]
    shape = draw(st.sampled_from(shapes))
    tensors[key] = value.flatten()[:1].reshape(()) if shape == () else value.reshape(shape)


def _poison(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    value = tensors[key].clone()
    bad = draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    value.view(-1)[draw(st.integers(0, value.numel() - 1))] = bad
    tensors[key] = value
    # These errors must contain the tensor's name.
    damage.names = [[key]]


def _retype(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    """Changes the dtype: integers are refused; wider or equal floats are the same numbers."""
    tensors[key] = tensors[key].to(
        draw(st.sampled_from([torch.int32, torch.bool, torch.float64, torch.bfloat16]))
    )


def _duplicate(draw: Any, tensors: Tensors, key: str, damage: Damage) -> None:
    """Adds a copy under another name of the same place, equal or not."""
    value = tensors[key]
    if draw(st.booleans()):
        value = value + 1
    aliases = [
        key.removeprefix("base_model.model."), key.replace(".mlp.", ".mlp.original_moe."),
        key.replace(".lora_", ".orig_module.lora_"), key.replace(".layers", ".orig_module.layers"),
        key.replace(".le_gate.", ".gate_proj."), key.replace("block_sparse_moe", "mlp"),
        key.replace(".w1.", ".gate_proj.").replace("block_sparse_moe", "mlp"),
        key.replace(".gate_proj.", ".le_gate."), f"{key}.copy", f"model.{key}",
    ]  # fmt: skip
    name = draw(st.sampled_from([alias for alias in aliases if alias != key]))
    damage.names += [[name]]
    tensors[name] = value.clone()


_TENSOR_KINDS: dict[str, Callable[[Any, Tensors, str, Damage], None]] = {
    "drop": _drop, "drop pair": _drop_pair, "rename": _rename, "transpose": _transpose,
    "resize": _resize, "reshape": _reshape, "poison": _poison, "retype": _retype,
    "duplicate": _duplicate,
}  # fmt: skip


def damage_config(draw: Any, folder: Path) -> Damage:
    """Changes one entry of adapter_config.json to another rank, another kind or plain nonsense."""
    file = folder / CONFIG
    config = json.loads(file.read_text("utf-8"))
    # Ranks and alphas matter most.
    numbers = ["r", "rank_pattern", "alpha_pattern"]
    key = draw(st.sampled_from([*sorted(_CONFIG_VALUES), *5 * numbers]))
    config[key] = draw(st.sampled_from(_CONFIG_VALUES[key]))
    file.write_text(json.dumps(config), encoding="utf-8")
    return Damage(f"{key} = {config[key]!r}", [[key], [CONFIG], ["incomplete"]])


_NONSENSE: list[Any] = ["x", "(", 7, -1, 0.5, True, [], ["x"], {"x": "y"}, [[1, 2]], None]
_PATTERN_KEYS = [
    "q_proj", r"experts\.1\.(gate_proj|w1)", r".*\.experts\..*", r".*\.experts.(up_proj|w3)",
    r"layers.0.*", "experts", "(",
]  # fmt: skip
_CONFIG_VALUES: dict[str, list[Any]] = {
    "r": [1, 3, 5, 8, 16, 257, 1 << 40, 0, -4, 4.5, "4", None, float("nan"), float("inf"), [4]],
    "rank_pattern": [
        *({key: value} for key in _PATTERN_KEYS for value in (2, 5, 0, -1, "8", None, 1.5)),
        *_NONSENSE,
    ],
    "alpha_pattern": [
        *({key: value} for key in _PATTERN_KEYS for value in (0, -1, "8", None, [1])),
        *({"nothing_at_all": value} for value in (1, 2.5)), "x", 7, [[1]],
    ],
    "use_dora": [True], "lora_bias": [True], "bias": ["all", "lora_only", 3],
    "peft_type": ["IA3", "LOHA", None, 3], "init_lora_weights": ["pissa", "olora", {"x": 1}],
    "target_modules": [*_NONSENSE, ["lm_head"], "all-linear", ".*_proj", ["q_proj", "mlp.gate"]],
    "exclude_modules": _NONSENSE, "layers_to_transform": _NONSENSE, "layers_pattern": _NONSENSE,
    "target_parameters": [
        *_NONSENSE, ["experts.down_proj"], ["mlp.experts.gate_up_proj"], ["gate.weight"],
    ],
    "modules_to_save": [*_NONSENSE, ["lm_head"], ["embed_tokens"], ["input_layernorm"], ["mlp"]],
    "layer_replication": [[[0, 1]]], "trainable_token_indices": [[1]], "some_new_option": [1, "x"],
    "peft_version": ["0.17.0", "0.19.1", "", 3, None, "x"],
}  # fmt: skip


def damage_file(draw: Any, folder: Path) -> Damage:
    """Truncates a file, removes it, replaces it by a directory, or changes one byte of its header
    or JSON. Without a manifest nobody misses KTransformers' files, so they are not removed."""
    names = sorted(path.name for path in folder.iterdir())
    file = folder / draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["cut", "cut", "remove", "flip", "flip", "grow", "directory"]))
    data = bytearray(file.read_bytes())
    listed = (folder / MANIFEST).is_file() or file.name in (CONFIG, MODEL)
    if kind == "remove" and listed:
        file.unlink()
    elif kind in ("remove", "directory"):
        file.unlink()
        file.mkdir()
    elif kind == "cut":
        file.write_bytes(data[: draw(st.integers(0, len(data) - 1))])
    elif kind == "grow":
        file.write_bytes(data + bytes(draw(st.integers(1, 40))))
    else:
        # Without hashes other numbers are not noticed.
        everywhere = (folder / MANIFEST).is_file() and file.name != MANIFEST
        json_end = len(data) if file.suffix == ".json" else 8 + int.from_bytes(data[:8], "little")
        position = draw(st.integers(0, (len(data) if everywhere else json_end) - 1))
        data[position] ^= 1 << draw(st.integers(0, 7))
        file.write_bytes(data)
    return Damage(f"{kind} {file.name}", [[str(folder)]])


def damage_manifest(draw: Any, folder: Path) -> Damage:
    """Changes one value of the manifest."""
    file = folder / MANIFEST
    manifest = json.loads(file.read_text("utf-8"))
    places: list[tuple[dict[str, Any], str]] = [
        *((manifest, key) for key in ("version", "status", "lora", "artifacts", "base")),
        *((manifest["lora"], key) for key in manifest["lora"]),
        *((manifest["artifacts"], name) for name in manifest["artifacts"]),
        *((record, key) for record in manifest["artifacts"].values() for key in record),
        *((each, key) for record in manifest["artifacts"].values()
          for each in record.get("tensors", {}).values() for key in each),
    ]  # fmt: skip
    where, key = draw(st.sampled_from(places))
    before = where[key]
    if draw(st.booleans()):
        del where[key]
    else:
        where[key] = draw(st.sampled_from([None, 0, 5, "x", "0" * 64, [], {}, [3, 4, 5]]))
    file.write_text(json.dumps(manifest), encoding="utf-8")
    return Damage(f"manifest {key}: {before!r} changed", [[MANIFEST]])


def fresh_copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
