"""Writes one random model for two programs: a Hugging Face folder with a PEFT adapter, and GGUF
files with the same numbers. Qwen3-MoE's architecture with the experts of DeepSeek-V2-Lite's shape.

Nothing is converted: both writers get the same tensors from ``Weights``.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
GgufType = Literal["bf16", "q8_0"]
PROJECTIONS = ("gate", "up", "down")
# Values of one block of Q8_0: a float16 scale and 32 integers.
BLOCK = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are V2-Lite's experts below an attention of their width."""

    layers: int = 4
    vocab: int = 8192
    hidden: int = 2048
    inner: int = 1408
    experts: int = 64
    top_k: int = 6
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    context: int = 4096
    rank: int = 8
    alpha: int = 16

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns [rows, columns] of a layer's attention matrices, by Hugging Face's name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
        }

    def expert(self, projection: str) -> tuple[int, int]:
        return (self.hidden, self.inner) if projection == "down" else (self.inner, self.hidden)

    def token_bytes(self, experts: float, others: float) -> float:
        """Returns the bytes of weights that decoding one token reads. ``experts``, ``others``:
        bytes per weight of experts, and of attention and head. Ignores LoRA, router and norms."""
        expert = 3 * self.hidden * self.inner
        attention = sum(rows * columns for rows, columns in self.linears().values())
        layer = self.top_k * expert * experts + attention * others
        return self.layers * layer + self.vocab * self.hidden * others

    def config(self) -> dict[str, object]:
        """Returns config.json. norm_topk_prob: llama.cpp always normalises the routing weights."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "torch_dtype": "bfloat16", "vocab_size": self.vocab, "hidden_size": self.hidden,
            "intermediate_size": self.inner, "moe_intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "num_experts": self.experts, "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "max_position_embeddings": self.context, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "rope_theta": 10000.0, "tie_word_embeddings": False,
            "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip


class Weights:
    """The numbers: windows of one random pool, chosen by the tensor's name."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        need = max(shape.vocab * shape.hidden, shape.inner * shape.hidden)
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(need + (1 << 22), generator=generator).to(torch.bfloat16)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        """Returns bfloat16 [rows, columns]; its product has ``gain`` times its input's size."""
        start = zlib.crc32(name.encode()) % (self._pool.numel() - rows * columns)
        window = self._pool[start : start + rows * columns].view(rows, columns)
        scaled: torch.Tensor = window.float() * (gain * columns**-0.5)
        return scaled.to(torch.bfloat16)

    def linear(self, layer: int, name: str) -> torch.Tensor:
        return self.matrix(f"{layer}.{name}", *self.shape.linears()[name])

    def expert(self, layer: int, expert: int, projection: str) -> torch.Tensor:
        name = f"{layer}.{expert}.{projection}"
        return self.matrix(name, *self.shape.expert(projection), gain=1.2)

    def router(self, layer: int) -> torch.Tensor:
        # This spread of logits leaves few tokens near a tie, where any rounding decides.
        return self.matrix(f"{layer}.router", self.shape.experts, self.shape.hidden, gain=4.0)

    def embeddings(self) -> torch.Tensor:
        gain = self.shape.hidden**0.5
        return self.matrix("embeddings", self.shape.vocab, self.shape.hidden, gain)

    def head(self) -> torch.Tensor:
        return self.matrix("head", self.shape.vocab, self.shape.hidden)

    def lora(self, name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A [rank, columns] and B [rows, rank]; ΔW is 0.3 times the matrix's size."""
        shape = self.shape
        a = self.matrix(f"{name}.a", shape.rank, columns)
        return a, self.matrix(f"{name}.b", rows, shape.rank, 0.3 * shape.rank / shape.alpha)


def make_pair(folder: Path, shape: Shape) -> Weights:
    """Writes the Hugging Face side, folder/model and folder/adapter, unless it exists."""
    weights = Weights(shape)
    stamp = folder / "shape.json"
    wanted = json.dumps(asdict(shape))
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return weights
    for name in ("model", "adapter"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_model(folder / "model", weights)
    _write_adapter(folder / "adapter", weights)
    stamp.write_text(wanted, "utf-8")
    return weights


def _write_model(folder: Path, weights: Weights) -> None:
    shape = weights.shape
    weight_map: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples/demo/model" / name, folder)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), "utf-8")
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(-1, shape.layers):
        tensors = dict(_hf_layer(weights, layer)) if layer >= 0 else {
            "model.embed_tokens.weight": weights.embeddings(),
            "model.norm.weight": ones,
            "lm_head.weight": weights.head(),
        }  # fmt: skip
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, "utf-8")


def _hf_layer(weights: Weights, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    shape, at = weights.shape, f"model.layers.{layer}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
    for name in ("q_norm", "k_norm"):
        ones = torch.ones(shape.head_dim, dtype=torch.bfloat16)
        yield f"{at}.self_attn.{name}.weight", ones
    for name in shape.linears():
        yield f"{at}.self_attn.{name}.weight", weights.linear(layer, name)
    yield f"{at}.mlp.gate.weight", weights.router(layer)
    for expert in range(shape.experts):
        for projection in PROJECTIONS:
            name = f"{at}.mlp.experts.{expert}.{projection}_proj.weight"
            yield name, weights.expert(layer, expert, projection)


def _write_adapter(folder: Path, weights: Weights) -> None:
    shape, tensors = weights.shape, {}
    for layer in range(shape.layers):
        at = f"base_model.model.model.layers.{layer}"
        for name, size in shape.linears().items():
            pair = weights.lora(f"{layer}.{name}", *size)
            for part, tensor in zip("AB", pair, strict=True):
                tensors[f"{at}.self_attn.{name}.lora_{part}.weight"] = tensor
        for expert in range(shape.experts):
            for projection in PROJECTIONS:
                pair = weights.lora(f"{layer}.{expert}.{projection}", *shape.expert(projection))
                for part, tensor in zip("AB", pair, strict=True):
                    name = f"{at}.mlp.experts.{expert}.{projection}_proj.lora_{part}.weight"
                    tensors[name] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "peft_version": "0.21.0", "task_type": "CAUSAL_LM", "r": shape.rank,
        "lora_alpha": shape.alpha, "lora_dropout": 0.0,
        "target_modules": [*shape.linears(), *(f"{each}_proj" for each in PROJECTIONS)],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), "utf-8")


# ---- GGUF


def write_gguf(file: Path, weights: Weights, gguf_type: GgufType) -> None:
    """Writes the base model; norms and router in float32, like llama.cpp's converter."""
    import gguf

    shape = weights.shape
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_expert_feed_forward_length(shape.inner)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    _write_tensors(writer, list(_gguf_tensors(weights, gguf_type)))


def write_gguf_lora(file: Path, weights: Weights) -> None:
    """Writes the adapter in float16, the smallest lossless format of llama.cpp's converter."""
    import gguf

    shape = weights.shape
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(shape.alpha))
    tensors: list[_Tensor] = []
    for layer in range(shape.layers):
        for name, size in shape.linears().items():
            target = f"blk.{layer}.{_ATTENTION[name]}.weight"
            tensors += _lora_pair(weights, target, [f"{layer}.{name}"], size, stacked=False)
        for projection in PROJECTIONS:
            names = [f"{layer}.{expert}.{projection}" for expert in range(shape.experts)]
            target = f"blk.{layer}.ffn_{projection}_exps.weight"
            size = shape.expert(projection)
            tensors += _lora_pair(weights, target, names, size, stacked=True)
    _write_tensors(writer, tensors)


_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a GGUF file, made when it is written."""

    name: str
    shape: tuple[int, ...]
    kind: str  # a name of gguf.GGMLQuantizationType
    make: Any  # () -> torch.Tensor of that shape, or an iterator over its first dimension


def _gguf_tensors(weights: Weights, gguf_type: GgufType) -> Iterator[_Tensor]:
    shape, kind = weights.shape, gguf_type.upper()
    whole = (shape.vocab, shape.hidden)
    yield _Tensor("token_embd.weight", whole, kind, weights.embeddings)
    yield _Tensor("output_norm.weight", (shape.hidden,), "F32", lambda: torch.ones(shape.hidden))
    yield _Tensor("output.weight", whole, kind, weights.head)
    for layer in range(shape.layers):
        sizes = {"attn_norm": shape.hidden, "ffn_norm": shape.hidden}
        sizes |= {"attn_q_norm": shape.head_dim, "attn_k_norm": shape.head_dim}
        for name, size in sizes.items():
            ones = torch.ones(size)
            yield _Tensor(f"blk.{layer}.{name}.weight", (size,), "F32", lambda ones=ones: ones)
        for name, matrix in shape.linears().items():

            def linear(layer: int = layer, name: str = name) -> torch.Tensor:
                return weights.linear(layer, name)

            yield _Tensor(f"blk.{layer}.{_ATTENTION[name]}.weight", matrix, kind, linear)

        def router(layer: int = layer) -> torch.Tensor:
            return weights.router(layer)

        router_shape = (shape.experts, shape.hidden)
        yield _Tensor(f"blk.{layer}.ffn_gate_inp.weight", router_shape, "F32", router)
        for projection in PROJECTIONS:

            def experts(layer: int = layer, projection: str = projection) -> Iterator[torch.Tensor]:
                for expert in range(shape.experts):
                    yield weights.expert(layer, expert, projection)

            stacked = (shape.experts, *shape.expert(projection))
            yield _Tensor(f"blk.{layer}.ffn_{projection}_exps.weight", stacked, kind, experts)


def _lora_pair(
    weights: Weights, target: str, names: list[str], size: tuple[int, int], *, stacked: bool
) -> list[_Tensor]:
    pairs = [weights.lora(name, *size) for name in names]
    found = []
    for index, part in enumerate("ab"):
        each = [pair[index] for pair in pairs]
        tensor = torch.stack(each) if stacked else each[0]
        found.append(
            _Tensor(f"{target}.lora_{part}", tuple(tensor.shape), "F16", lambda t=tensor: t)
        )
    return found


def _write_tensors(writer: Any, tensors: list[_Tensor]) -> None:
    import gguf
    import numpy as np

    kinds = gguf.GGMLQuantizationType
    for tensor in tensors:
        kind = kinds[tensor.kind]
        size = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        count = int(np.prod(size))
        writer.add_tensor_info(tensor.name, size, np.dtype(np.uint8), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        made = tensor.make()
        matrices = [made] if isinstance(made, torch.Tensor) else made
        encoded = [_encoded(matrix, tensor.kind) for matrix in matrices]
        writer.write_tensor_data(np.concatenate(encoded))
    writer.close()


def _encoded(tensor: torch.Tensor, kind: str) -> Any:
    """Returns the bytes of a tensor in one of GGUF's formats, as a flat NumPy array of uint8."""
    if kind == "Q8_0":
        return q8_0(tensor).flatten().numpy()
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return tensor.to(dtype).contiguous().view(torch.uint8).flatten().numpy()


def q8_0(matrix: torch.Tensor) -> torch.Tensor:
    """Converts a matrix, whose columns are a multiple of 32, to Q8_0: uint8
    [rows, columns / 32 · 34]. Equals ``gguf.quants`` (half away from zero), several times faster.
    """
    blocks = matrix.float().reshape(matrix.shape[0], -1, BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    scaled = blocks * inverse
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()
    packed = [scale.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)]
    return torch.cat(packed, dim=-1).reshape(matrix.shape[0], -1)
