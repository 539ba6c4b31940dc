"""Tiny random models and adapters on disk: odd sizes, experts that matter, clear routing.

transformers saves the models in bfloat16, so names on disk are the library's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ktrt.adapter import BaseModel
from ktrt.checkpoint.experts import find_expert_weights
from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.names import WeightNames
from ktrt.experts import find_experts

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

HIDDEN_SIZE = 160
NUM_EXPERTS = 16
TOP_K = 4
VOCAB_SIZE = 384
NUM_LAYERS = 3

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "num_experts_per_tok": TOP_K,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Differences by family; "I" is the expert intermediate size.
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "moe_intermediate_size": "I",
        "intermediate_size": 208,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 48,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "moe_intermediate_size": "I",
        "intermediate_size": 208,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 48,
        "q_lora_rank": 56,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "glm4_moe": {
        "moe_intermediate_size": "I",
        "intermediate_size": 208,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "use_qk_norm": True,
    },
    "qwen3_moe": {
        "moe_intermediate_size": "I",
        "intermediate_size": 208,
        "num_experts": NUM_EXPERTS,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "norm_topk_prob": True,
        # The last layer is dense.
        "mlp_only_layers": [2],
    },
    # Every layer is sparse, so two layers: the other families have two sparse layers too.
    "mixtral": {
        "num_hidden_layers": 2,
        "intermediate_size": "I",
        "num_local_experts": NUM_EXPERTS,
        "num_key_value_heads": 2,
    },
    # Stacks the experts of a layer in one tensor on disk.
    "granitemoe": {
        "intermediate_size": "I",
        "num_local_experts": NUM_EXPERTS,
        "num_key_value_heads": 2,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.16,
        "tie_word_embeddings": True,
    },
}


def save_model(
    folder: Path, model_type: str, intermediate_size: int, /, seed: int = 0, **changes: Any
) -> Path:
    """Saves a random model; ``changes`` override its config. Returns ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        key: intermediate_size if value == "I" else value
        for key, value in {**_COMMON, **_FAMILIES[model_type], **changes}.items()
    }
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _fill(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Fills a parameter: norms near 1; matrices that preserve the size of their inputs, routed
    experts a little more."""
    with torch.no_grad():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            return
        gain = 1.0
        if "experts" in name and "shared" not in name:
            gain = 1.2
        elif name.endswith(("mlp.gate.weight", "router.layer.weight")):
            # This spread of logits leaves few tokens near a tie; with more, every rounding of the
            # inputs moves the routing weights.
            gain = 4.0
        elif "embed" in name:
            gain = math.sqrt(parameter.shape[-1])
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(gain * noise / math.sqrt(parameter.shape[-1]))


@dataclass(frozen=True)
class LoraPlan:
    """Numbers of a random adapter; ``experts`` and ``others``: size of ΔW relative to W."""

    rank: int = 8
    alpha: float = 16
    use_rslora: bool = False
    experts: float = 1.0
    others: float = 0.3
    seed: int = 1

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def pair(
        self, size_in: int, size_out: int, size: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A [rank, in] and B [out, rank] with ‖scaling·B·A‖ about ``size`` · ‖W‖."""
        a = torch.randn(self.rank, size_in, generator=generator) / math.sqrt(size_in)
        b = torch.randn(size_out, self.rank, generator=generator)
        return a, b * size / (self.scaling * math.sqrt(self.rank))


Layout = Literal["a", "b"]


def save_adapter(folder: Path, model: Path, layout: Layout, plan: LoraPlan = LoraPlan()) -> Path:
    """Saves an adapter on every Linear of the saved ``model`` except routers and lm_head; routed
    experts in layout a (one LoRA per expert) or b (stacked, gate and up share A)."""
    generator = torch.Generator().manual_seed(plan.seed)
    shapes = weight_shapes(model)
    tensors: dict[str, torch.Tensor] = {}
    stacked: dict[str, dict[int, dict[str, str]]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if ".experts." in name:
            path, _, rest = module.partition(".experts.")
            expert, _, leaf = rest.partition(".")
            stacked.setdefault(path, {}).setdefault(int(expert), {})[leaf] = name
        if len(shape) != 2 or module.endswith(("embed_tokens", "lm_head", ".gate")):
            continue
        size = plan.experts if ".experts." in name else plan.others
        if layout == "b" and ".experts." in name:
            continue
        a, b = plan.pair(shape[1], shape[0], size, generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    if layout == "b":
        for path, experts in stacked.items():
            _stacked_pairs(tensors, path, experts, shapes, plan, generator)
    leaves = {key.split(".lora_")[0].rpartition(".")[2] for key in tensors} - {"base_layer"}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "peft_version": "0.21.0",
        "task_type": "CAUSAL_LM",
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "use_rslora": plan.use_rslora,
        "lora_dropout": 0.05,
        "target_modules": sorted(leaves - {"experts"}),
    }
    if layout == "b":
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return write_adapter(folder, tensors, config)


def _stacked_pairs(
    tensors: dict[str, torch.Tensor],
    path: str,
    experts: dict[int, dict[str, str]],
    shapes: dict[str, tuple[int, ...]],
    plan: LoraPlan,
    generator: torch.Generator,
) -> None:
    """Adds stacked pairs. B's columns are rank-major: column j·E + e is rank j of expert e."""
    first = experts[0]
    gate = shapes[first.get("gate_proj.weight") or first.get("gate_proj") or first["w1"]]
    intermediate_size, hidden_size = gate
    # transformers 5 names the block mlp in every family.
    prefix = f"base_model.model.{path.replace('block_sparse_moe', 'mlp')}.experts"
    for infix, size_in, size_out in (
        (".base_layer", hidden_size, 2 * intermediate_size),
        ("", intermediate_size, hidden_size),
    ):
        pairs = [plan.pair(size_in, size_out, plan.experts, generator) for _ in experts]
        tensors[f"{prefix}{infix}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        stack = torch.stack([b for _, b in pairs], dim=2)  # [out, rank, E]
        tensors[f"{prefix}{infix}.lora_B.weight"] = stack.reshape(size_out, -1).contiguous()


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """Writes the two files of a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of a saved model's tensors (single file)."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def token_ids(sequences: int = 4, length: int = 80, seed: int = 7) -> torch.Tensor:
    """Returns random ids [sequences, length]; 320 positions by default."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (sequences, length), generator=generator)


def base_of(model: Path) -> BaseModel:
    """Returns the adapters' view of a saved model: on the meta device, with names on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    specs, names = find_experts(skeleton), WeightNames(skeleton)
    weights = find_expert_weights(Checkpoint(model), names, specs)
    modules = {
        (path, *key): name for path, w in weights.items() for key, name in w.modules().items()
    }
    return BaseModel(skeleton, specs, names, modules)


def read_folder(adapter: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors and the config of an adapter folder."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    return load_file(adapter / "adapter_model.safetensors"), config
