"""One adapter in memory, and writers for every known layout.

Follows the formats' descriptions, without ktrt's reading code. All numbers are bfloat16 values, so
layouts in bfloat16 and in float32 hold the same adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from helpers.tiny_models import weight_shapes, write_adapter
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
Projection = Literal["gate", "up", "down"]
Sharing = Literal["nothing", "outer", "all"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
P = "base_model.model."
FUSED, EXTRA = "fused_expert_lora.safetensors", "lora_experts.safetensors"
_EXPERT = re.compile(r"(?P<path>.*experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")
_NOT_ADAPTED = ("embed_tokens.weight", "head.weight", ".gate.weight")
_LEAVES: dict[str, Projection] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up",
    "w2": "down",
}  # fmt: skip


@dataclass
class Adapter:
    """``experts``: layer → projection → (A [E, r, in], B [E, out, r]), gate and up with one A;
    ``others``: module on disk → (A [r, in], B [out, r]); ``extra``: layer → extra experts' (gate,
    up, down). ``path`` has {} for the layer, ``leaves`` the names of one expert's matrices on disk.
    """

    rank: int
    alpha: float
    use_rslora: bool
    experts: dict[int, dict[Projection, Pair]]
    others: dict[str, Pair]
    path: str
    leaves: dict[Projection, str]
    sharing: Sharing = "nothing"
    extra: dict[int, list[tuple[torch.Tensor, ...]]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return next(iter(self.experts.values()))["down"][0].shape[0]

    def config(self, **changes: Any) -> dict[str, Any]:
        names = {module.rpartition(".")[2] for module in self.others} | {*self.leaves.values()}
        return {
            "peft_type": "LORA", "peft_version": "0.21.0", "task_type": "CAUSAL_LM",
            "r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.use_rslora,
            "lora_dropout": 0.05, "target_modules": sorted(names), **changes,
        }  # fmt: skip

    def rest(self) -> Tensors:
        """Returns the tensors outside the routed experts, under PEFT's names."""
        return {
            f"{P}{module}.{part}.weight": value
            for module, pair in self.others.items()
            for part, value in zip(("lora_A", "lora_B"), pair, strict=True)
        }


def random_adapter(
    model: Path,
    *,
    sharing: Sharing = "nothing",
    rank: int = 4,
    alpha: float = 8,
    use_rslora: bool = False,
    extra_experts: int = 0,
    seed: int = 5,
) -> Adapter:
    """Returns an adapter on every Linear of the saved ``model`` except routers and lm_head, with ΔW
    as large as W on routed experts."""
    generator = torch.Generator().manual_seed(seed)
    scaling = alpha / (math.sqrt(rank) if use_rslora else rank)

    def pair(size_in: int, size_out: int, size: float) -> Pair:
        a = torch.randn(rank, size_in, generator=generator) / math.sqrt(size_in)
        b = torch.randn(size_out, rank, generator=generator) * size / (scaling * math.sqrt(rank))
        return a.bfloat16().float(), b.bfloat16().float()

    sizes: dict[int, dict[Projection, tuple[int, ...]]] = {}
    others: dict[str, Pair] = {}
    path, count, leaves = "", 0, {}
    for name, shape in weight_shapes(model).items():
        if match := _EXPERT.fullmatch(name):
            layer = int(re.findall(r"\.(\d+)\.", match["path"])[0])
            projection = _LEAVES[match["leaf"]]
            path, leaves[projection] = match["path"].replace(f".{layer}.", ".{}."), match["leaf"]
            sizes.setdefault(layer, {})[projection] = shape
            count = max(count, int(match["expert"]) + 1)
        elif len(shape) == 2 and not name.endswith(_NOT_ADAPTED):
            others[name.removesuffix(".weight")] = pair(shape[1], shape[0], 0.3)
    experts: dict[int, dict[Projection, Pair]] = {}
    for layer, shapes in sizes.items():
        for projection in PROJECTIONS:
            rows, columns = shapes[projection]
            pairs = [pair(columns, rows, 1.0) for _ in range(count)]
            a, b = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
            if projection == "up":
                a = experts[layer]["gate"][0]
            if sharing == "all" or (sharing == "outer" and projection != "down"):
                a = a[:1].expand_as(a)
            if sharing == "all" or (sharing == "outer" and projection == "down"):
                b = b[:1].expand_as(b)
            experts.setdefault(layer, {})[projection] = (a, b)
    adapter = Adapter(rank, alpha, use_rslora, experts, others, path, leaves, sharing)
    for layer, shapes in sizes.items() if extra_experts else ():
        hidden, own = shapes["down"][0], 24
        each = [(own, hidden), (own, hidden), (hidden, own)]
        adapter.extra[layer] = [
            tuple((torch.randn(s, generator=generator) / math.sqrt(s[1])).bfloat16().float()
                  for s in each)
            for _ in range(extra_experts)
        ]  # fmt: skip
    return adapter


def _copy(value: torch.Tensor) -> torch.Tensor:
    """Copies to separate contiguous memory, for safetensors."""
    return value.clone(memory_format=torch.contiguous_format)


def per_expert(adapter: Adapter, prefix: str = P, *, neutral: bool = False) -> Tensors:
    """Returns layout a: names on disk, or the ``neutral`` ones of KTransformers for any family."""
    tensors: Tensors = {}
    for layer, loras in adapter.experts.items():
        path = f"model.layers.{layer}.mlp.experts" if neutral else adapter.path.format(layer)
        for projection, pair in loras.items():
            leaf = f"{projection}_proj" if neutral else adapter.leaves[projection]
            for part, stack in zip(("lora_A", "lora_B"), pair, strict=True):
                for expert, matrix in enumerate(stack):
                    tensors[f"{prefix}{path}.{expert}.{leaf}.{part}.weight"] = matrix.clone(
                        memory_format=torch.contiguous_format
                    )
    return tensors


def write_a(folder: Path, adapter: Adapter) -> Path:
    return write_adapter(folder, adapter.rest() | per_expert(adapter), adapter.config())


def write_a_prime(folder: Path, adapter: Adapter) -> Path:
    """Writes the original_moe infix, and copies of the shared experts under both names."""
    tensors = adapter.rest()
    for key, value in [*tensors.items()]:
        if ".shared_experts." in key:
            tensors[key.replace(".shared_experts.", ".original_moe.shared_experts.")] = (
                value.clone()
            )
    for key, value in per_expert(adapter).items():
        tensors[key.replace(".experts.", ".original_moe.experts.")] = value
    return write_adapter(folder, tensors, adapter.config())


def write_b(folder: Path, adapter: Adapter, *, old: bool = False) -> Path:
    """Writes layout b; ``old``: PEFT's before 0.19.1, with A and B on each other's dimension."""
    tensors = adapter.rest()
    for layer, loras in adapter.experts.items():
        gate_up = torch.cat([loras["gate"][1], loras["up"][1]], dim=1)
        stacked = {".base_layer": (loras["gate"][0], gate_up), "": loras["down"]}
        for infix, (a, b) in stacked.items():
            name = f"{P}model.layers.{layer}.mlp.experts{infix}"
            if old:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            tensors[f"{name}.lora_A.weight"] = a.reshape(-1, a.shape[2]).contiguous()
            rows = b.permute(1, 2, 0).reshape(b.shape[1], -1)
            tensors[f"{name}.lora_B.weight"] = rows.contiguous()
    config = adapter.config(
        peft_version="0.18.1" if old else "0.21.0",
        target_modules=sorted({module.rpartition(".")[2] for module in adapter.others}),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return write_adapter(folder, tensors, config)


def write_b_old(folder: Path, adapter: Adapter) -> Path:
    return write_b(folder, adapter, old=True)


def fused(adapter: Adapter, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Returns the tensors of KTransformers' fused file; a shared matrix has one expert."""
    tensors: Tensors = {}
    for layer, loras in adapter.experts.items():
        for projection, pair in loras.items():
            for letter, stack in zip("ab", pair, strict=True):
                own = stack[:1] if stack.stride(0) == 0 else stack
                key = f"layers.{layer}.experts.{projection}_lora_{letter}"
                tensors[key] = own.to(dtype, copy=True).contiguous()
    return tensors


def kt_config(adapter: Adapter) -> dict[str, Any]:
    """Returns PEFT's configuration in KTransformers' training: exclude_modules excludes the routed
    experts."""
    path = adapter.path.replace("{}", r"\d+").replace(".", r"\.")
    leaves = "|".join(adapter.leaves.values())
    # KTransformers scales experts by alpha / r; only then is it the same adapter.
    assert not adapter.use_rslora
    return adapter.config(exclude_modules=rf"(?:{path}\.\d+\.(?:{leaves}))")


def write_c(folder: Path, adapter: Adapter) -> Path:
    write_adapter(folder, adapter.rest(), kt_config(adapter))
    save_file(fused(adapter), folder / FUSED)
    return write_manifest(folder, adapter)


def write_manifest(folder: Path, adapter: Adapter, **changes: Any) -> Path:
    """Writes kt_adapter_manifest.json for the current files."""
    artifacts: dict[str, dict[str, Any]] = {}
    for name in ("adapter_config.json", "adapter_model.safetensors", FUSED):
        data = (folder / name).read_bytes()
        artifacts[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    contract = {
        key: {"shape": list(value.shape), "dtype": names[value.dtype]}
        for key, value in sorted(load_file(folder / FUSED).items())
    }
    artifacts[FUSED] |= {"tensor_count": len(contract), "tensors": contract}
    manifest = {
        "version": 1, "status": "ready", "expert_weight_format": "bf16",
        "base": {"model_name_or_path": "/somewhere/else"},
        "lora": {"rank": adapter.rank, "alpha": float(adapter.alpha)}, "artifacts": artifacts,
        **changes,
    }  # fmt: skip
    (folder / "kt_adapter_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_c_bare(folder: Path, adapter: Adapter) -> Path:
    """Writes no manifest, and float32; a shared matrix has no dimension for experts."""
    write_adapter(folder, adapter.rest(), kt_config(adapter))
    tensors = fused(adapter, torch.float32)
    bare = {key: value[0] if len(value) == 1 else value for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in bare.items()}, folder / FUSED)
    return folder


def write_d(folder: Path, adapter: Adapter) -> Path:
    """Appends .orig_module to every module's name, like KTransformers in 2025."""
    tensors = adapter.rest() | per_expert(adapter)
    infixed = {}
    for key, value in tensors.items():
        module, _, part = key.removeprefix(P).partition(".lora_")
        module = module.replace("model.", "model.orig_module.", 1)
        infixed[f"{P}{module}.orig_module.lora_{part}"] = value
    return write_adapter(folder, infixed, adapter.config())


def write_f(folder: Path, adapter: Adapter) -> Path:
    """Writes like kt_kernel's converter for sglang: no base_model.model., neutral names."""
    tensors = {key.removeprefix(P): value for key, value in adapter.rest().items()}
    tensors |= per_expert(adapter, prefix="", neutral=True)
    names = [f"{projection}_proj" for projection in PROJECTIONS]
    config = adapter.config()
    targets = sorted({*config["target_modules"], *names} - {"w1", "w2", "w3"})
    return write_adapter(folder, tensors, config | {"target_modules": targets})


def write_bin(folder: Path, adapter: Adapter) -> Path:
    """Writes layout a in a pickle."""
    write_a(folder, adapter)
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    return folder


def stacked(adapter: Adapter) -> Tensors:
    """Returns names without the expert's number, [E, …] or [1, …]: Megatron-Bridge, Tinker,
    SGLang."""
    tensors: Tensors = {}
    for layer, loras in adapter.experts.items():
        for projection, pair in loras.items():
            for part, stack in zip(("lora_A", "lora_B"), pair, strict=True):
                own = stack[:1] if stack.stride(0) == 0 else stack
                module = f"{adapter.path.format(layer)}.{adapter.leaves[projection]}"
                tensors[f"{P}{module}.{part}.weight"] = own.clone(
                    memory_format=torch.contiguous_format
                )
    return tensors


def write_stacked(folder: Path, adapter: Adapter) -> Path:
    return write_adapter(folder, adapter.rest() | stacked(adapter), adapter.config())


def write_gate_up(folder: Path, adapter: Adapter) -> Path:
    """Writes like Megatron-Bridge if experts are parameters: gate and up in one B."""
    tensors = adapter.rest()
    for layer, loras in adapter.experts.items():
        gate_up = torch.cat([loras["gate"][1], loras["up"][1]], dim=1)
        if loras["gate"][1].stride(0) == 0:
            gate_up = gate_up[:1].expand_as(gate_up)
        for name, pair in (
            ("gate_up_proj", (loras["gate"][0], gate_up)),
            ("down_proj", loras["down"]),
        ):
            for part, stack in zip(("lora_A", "lora_B"), pair, strict=True):
                own = stack[:1] if stack.stride(0) == 0 else stack
                key = f"{P}model.layers.{layer}.mlp.experts.{name}.{part}.weight"
                tensors[key] = _copy(own)
    return write_adapter(folder, tensors, adapter.config())


def write_mixed(folder: Path, adapter: Adapter) -> Path:
    """Writes shared matrices once and two-dimensional, the others by expert."""
    tensors = adapter.rest()
    for key, value in per_expert(adapter).items():
        layer = int(re.findall(r"layers\.(\d+)\.", key)[0])
        leaf, part = key.split(".")[-3:-1]
        stack = adapter.experts[layer][_LEAVES[leaf]][part == "lora_B"]
        if stack.stride(0) == 0:
            tensors[re.sub(r"\.experts\.\d+\.", ".experts.", key)] = value
        else:
            tensors[key] = value
    return write_adapter(folder, tensors, adapter.config())


WRITERS: dict[str, Callable[[Path, Adapter], Path]] = {
    "a": write_a, "a'": write_a_prime, "b": write_b, "b old": write_b_old, "c": write_c,
    "c bare": write_c_bare, "d": write_d, "f": write_f, "bin": write_bin,
    "stacked": write_stacked, "gate_up": write_gate_up, "mixed": write_mixed,
}  # fmt: skip


def add_extra_experts(
    folder: Path, adapter: Adapter, *, names: str = "le_{}", own_file: bool = False
) -> Path:
    """Adds layout e to a folder: le_gate or gate_proj, in adapter_model or a separate file."""
    tensors = {
        f"{P}model.layers.{layer}.mlp.lora_experts.{i}.{names.format(projection)}.weight": matrix
        for layer, mlps in adapter.extra.items()
        for i, mlp in enumerate(mlps)
        for projection, matrix in zip(PROJECTIONS, mlp, strict=True)
    }
    file = folder / "adapter_model.safetensors"
    if own_file:
        save_file(tensors, folder / EXTRA)
    else:
        save_file(load_file(file) | tensors, file)
    return folder


def read_b(tensors: Tensors, config: dict[str, Any], like: Adapter) -> Adapter:
    """Reads PEFT's own layout b, with both parameters targeted."""
    rank, count = config["r"], like.num_experts
    experts: dict[int, dict[Projection, Pair]] = {}
    others: dict[str, Pair] = {}
    for key in [key for key in tensors if ".lora_A." in key]:
        a, b = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
        module = key.removeprefix(P).partition(".lora_A")[0]
        if not module.endswith((".experts", ".experts.base_layer")):
            others[module] = (a, b)
            continue
        a = a.reshape(count, rank, -1)
        b = b.reshape(b.shape[0], rank, count).permute(2, 0, 1)
        loras = experts.setdefault(int(re.findall(r"layers\.(\d+)\.", key)[0]), {})
        if module.endswith(".base_layer"):
            gate, up = b.chunk(2, dim=1)
            loras["gate"], loras["up"] = (a, gate), (a, up)
        else:
            loras["down"] = (a, b)
    return Adapter(
        rank, config["lora_alpha"], bool(config["use_rslora"]), experts, others, like.path,
        like.leaves,
    )  # fmt: skip
