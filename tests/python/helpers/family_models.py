"""Makes tiny random models of every MoE model type of the installed transformers, found by scanning
it.

A family is a modelling file whose experts go through ``use_experts_implementation``. Rules on the
names of numbers shrink its config class; ``FIXUPS`` holds the exceptions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers.rounded_experts import experts_of
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

VOCAB_SIZE = 128
# Ids of image, audio and other special tokens; texts use smaller ones.
FIRST_SPECIAL = 100
NUM_EXPERTS = 8
MODELS = Path(transformers.__file__).parent / "models"
_DECORATED = re.compile(r"^@use_experts_implementation", re.MULTILINE)
# Registries of classes that generate text, in ktrt's order.
_AUTO_CLASSES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


@dataclass(frozen=True)
class Family:
    """One model class that generates text: ``folder`` holds its code, ``model_type`` is its
    config's."""

    folder: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.class_name}"


@cache
def moe_folders() -> list[str]:
    """Returns the modelling folders whose experts go through the interface."""
    return sorted(
        file.parent.name
        for file in MODELS.glob("*/modeling_*.py")
        if _DECORATED.search(file.read_text("utf-8"))
    )


@cache
def families() -> list[Family]:
    """Returns every class of these folders that generates text, by folder."""
    classes = {
        name: folder
        for folder in moe_folders()
        for file in (MODELS / folder).glob("modeling_*.py")
        for name in re.findall(r"^class (\w+)\(", file.read_text("utf-8"), re.MULTILINE)
    }
    found: dict[str, Family] = {}
    for auto_class in _AUTO_CLASSES:
        names = getattr(modeling_auto, f"MODEL_FOR_{auto_class}_MAPPING_NAMES", {})
        for class_names in names.values():
            for name in [class_names] if isinstance(class_names, str) else class_names:
                if name in classes:
                    model_type = getattr(transformers, name).config_class.model_type
                    found.setdefault(name, Family(classes[name], model_type, name))
    return sorted(found.values(), key=str)


# Numbers by name, anywhere in a config. Sizes fill neither strips of 32 nor tiles of 64.
_SIZES: dict[str, Any] = {
    "hidden_size": 112, "intermediate_size": 72, "moe_intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "num_experts_per_tok": 3,
    "num_experts_per_token": 3, "moe_k": 3, "moe_topk": 3, "n_group": 2, "topk_group": 1,
    "num_expert_group": 2,
    "kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "qk_head_dim": 24, "v_head_dim": 16, "o_lora_rank": 16, "o_groups": 2,
    # All positions: random scores tie at 0, and sparse attention then chooses arbitrarily.
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,
    "linear_head_dim": 16, "linear_num_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_chunk_size": 16, "mamba_d_head": 56, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_dt_rank": 8, "mamba_head_dim": 56, "mamba_num_heads": 4, "ssm_state_size": 8,
    "n_groups": 2, "chunk_size": 16, "sliding_window": 16, "sliding_window_size": 16,
    "swa_head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "shared_expert_intermediate_size": 40, "shared_experts_intermediate_size": 40,
    "shared_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40,
    "dense_intermediate_size": 88, "d_rel": 8, "rel_extent": 16, "router_hidden_size": 24,
    "rotary_dim": 8, "block_size": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE, "unpadded_vocab_size": VOCAB_SIZE,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    # Vision and sound, which tests do not run.
    "depth": 1, "num_heads": 2, "out_hidden_size": 112, "image_size": 32, "patch_size": 8,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
    "n_layers": 1, "num_position_embeddings": 16, "output_dim": 112, "downsample_hidden_size": 8,
    "projector_hidden_size": 16, "merged_hidden_size": 64, "text_hidden_size": 112,
    "position_embedding_size": 16,
}  # fmt: skip
# Bounds of activations, small enough for a tiny model's numbers to reach.
_BOUNDS = {"swiglu_limit": 1.0, "mlp_gate_softcap": 1.5, "mlp_up_softcap": 2.0}
_AT_MOST = {"first_k_dense_replace": 1, "num_dense_layers": 1, "num_nextn_predict_layers": 0}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOKEN_ID = re.compile(r".*_(token_id|token_index|id)$")
_ORDINARY_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}

# model type → {dotted key: value}, beyond the rules.
_QWEN4: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 24, "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "enable_moe_block": True, "num_experts": NUM_EXPERTS, "top_k_experts": 3,
    "moe_intermediate_size": 56, "global_head_dim": 24,
}  # fmt: skip
_SPARSE = ["sparse", "sparse"]
_TEXT = "text_config."
FIXUPS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {f"{_TEXT}mlp_layer_types": _SPARSE, f"{_TEXT}num_experts_per_tok": 3},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 3},
    "diffusion_gemma": {f"{_TEXT}{key}": value for key, value in _GEMMA4.items()},
    "dots1": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 3,
              "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1},
    "dots3_note": {"vision_config.adapter_in_dim": 112, "vision_config.adapter_out_dim": 112,
                   "audio_config.adapter_input_size": 112, "audio_config.adapter_out_dim": 112},
    "ernie4_5_vl_moe": {f"{_TEXT}rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 6]}},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {f"{_TEXT}{key}": value for key, value in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "glm4v_moe": {f"{_TEXT}rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 2]}},
    "hy_v4_vl": {f"{_TEXT}rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "glm5_next": {f"{_TEXT}layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"],
                         "num_local_experts": NUM_EXPERTS},
    "hunyuan_v1_moe": {"head_dim": 24},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral_large4": {f"{_TEXT}kv_source_layers": [0, 1]},
    "muse_spark": {"audio_config.num_hidden_layers": 4, "audio_config.hidden_sizes": [8, 8, 8, 8],
                   "audio_config.depths": [1, 1, 1, 1], f"{_TEXT}moe_hidden_size": 72},
    "nemotron_h": {"num_hidden_layers": 3,
                   "layer_types": ["linear_attention", "moe", "full_attention"]},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 40,
                       "talker_config.spatial_merge_size": 2},
    "qwen4_exp": {f"{_TEXT}{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_config(model_type: str, **sizes: Any) -> PreTrainedConfig:
    """Returns a config of the type with tiny sizes and two layers, the last one with routed
    experts; ``sizes`` override its numbers."""
    config_class = CONFIG_MAPPING[model_type]
    ids = iter(range(FIRST_SPECIAL, VOCAB_SIZE))
    changes = _smaller(config_class(), ids)
    for key, value in FIXUPS.get(model_type, {}).items():
        *path, name = key.split(".")
        inner = changes
        for word in path:
            inner = inner.setdefault(word, {})
        inner[name] = value
    return config_class(**{**changes, **sizes})


def _smaller(config: PreTrainedConfig, ids: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    layers = vars(config).get("num_hidden_layers")
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changes[key] = _smaller(value, ids)
        elif isinstance(value, list) and len(value) == layers:
            changes[key] = [value[0], value[-1]]
        elif key in _BOUNDS:
            changes[key] = _BOUNDS[key]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif key in _ORDINARY_IDS:
            changes[key] = _ORDINARY_IDS[key]
        elif _TOKEN_ID.fullmatch(key):
            changes[key] = next(ids)
        elif key in _EXPERT_COUNTS:
            changes[key] = NUM_EXPERTS
        elif key in _AT_MOST:
            changes[key] = min(value, _AT_MOST[key])
        elif key in _SIZES and value:
            changes[key] = _SIZES[_same_size(config, key, value)]
    return changes


def _same_size(config: PreTrainedConfig, key: str, value: int) -> str:
    """Returns the key whose size to use: sizes that are equal in the family stay equal."""
    twins = {
        "num_key_value_heads": ("num_attention_heads",),
        "head_dim": ("qk_rope_head_dim", "qk_head_dim"),
    }
    return next((t for t in twins.get(key, ()) if vars(config).get(t) == value), key)


def random_model(family: Family, seed: int = 0, changes: dict[str, Any] | None = None) -> Any:
    """Returns the family's class in float32 with random weights that bfloat16 holds exactly.

    The library initialises it. Then matrices get entries that preserve the size of their inputs, so
    that experts and routing matter, and constants get noise.
    """
    torch.manual_seed(seed)
    model_class = getattr(transformers, family.class_name)
    model = model_class(small_config(family.model_type, **(changes or {}))).eval()
    generator = torch.Generator().manual_seed(seed)
    routed = {id(p) for m in experts_of(model).values() for p in m.parameters(recurse=False)}
    linear = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in routed and parameter.ndim == 3:
                size_in = parameter.shape[-2 if _is_transposed(model, name) else -1]
                parameter.copy_(1.2 * noise / math.sqrt(size_in))
            elif id(parameter) in routed:
                parameter.copy_(0.5 * noise)
            elif id(parameter) in linear or name.endswith(("gate.weight", "router.weight")):
                gain = math.sqrt(parameter.shape[-1]) if "embed" in name else 1.0
                parameter.copy_(gain * noise / math.sqrt(parameter.shape[-1]))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * noise)
        for tensor in (*model.parameters(), *_saved_buffers(model)):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16))
    return model


def _is_transposed(model: torch.nn.Module, name: str) -> bool:
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))


def _saved_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    saved = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in saved]


def folders_without_class() -> list[str]:
    """Returns the modelling folders without a class that generates text."""
    return sorted(set(moe_folders()) - {family.folder for family in families()})
