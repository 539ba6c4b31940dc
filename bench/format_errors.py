#!/usr/bin/env python3
"""Measures what each weight format of the routed experts costs: errors of matrices, of logits, and
the divergence of the next token's distribution.

    python bench/format_errors.py              # the demo and three tiny random families, 2 minutes
    python bench/format_errors.py --docs       # writes the table of docs/performance.md

The experts' BF16 weights are packed by the engine in each format and unpacked again; the model then
runs in float32 by transformers, so that nothing else is rounded. ``int8_g32`` (INT8 with a BF16
scale for 32 columns) is no format of the engine and stands here for comparison. INT8 and INT4 per
row quantise activations too, which comes on top. KLD: of the next token's distribution with BF16
weights and with the format's, mean over the demo's corpus, in nats.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ktrt import _core
from ktrt.experts.gpu.packed import unpack_weights, unpacked_dtype

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
DOCS = ROOT / "docs" / "performance.md"
FORMATS = ("int8", "int8_g32", "fp8", "fp8_channel", "int4_g32", "int4_g64", "int4_g128", "mxfp4",
           "int4")  # fmt: skip
FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe")
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 64,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
BEGIN, END = "<!-- format errors: bench/format_errors.py --docs -->", "<!-- end -->"
_TEXTS = 400


class Packer:
    """Weights as the engine has them in a format."""

    def __init__(self) -> None:
        self._engine = _core.Engine(num_threads=torch.get_num_threads())
        self._formats = {str(each.name): each for each in _core.weight_formats()}

    def rounded(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Returns a matrix [out, in] with the numbers that the format leaves, float32."""
        if name == "int8_g32":
            return _int8_groups(weight)
        rows, columns = weight.shape
        each = self._formats[name]
        layer = _core.MoeLayer(
            self._engine, num_experts=1, top_k=1, hidden_size=columns, intermediate_size=rows,
            weight_format=each.name, has_gate=False,
        )  # fmt: skip
        layer.load_expert(0, None, weight.contiguous(), torch.zeros(columns, rows))
        codes = torch.frombuffer(bytearray(layer.packed_codes(0, "up")), dtype=torch.uint8)
        packed = bytearray(layer.packed_scales(0, "up"))
        scales = torch.frombuffer(packed, dtype=torch.float32)[None] if packed else None
        padded = [-(-rows // 32) * 32, -(-columns // each.tile_columns) * each.tile_columns]
        out = torch.empty(1, *padded, dtype=unpacked_dtype(each))
        unpack_weights(codes[None], scales, each, out)
        values = out[0].float()
        if each.quantizes_rows:
            assert scales is not None
            values *= scales[0][:, None]
        return values[:rows, :columns]


def _int8_groups(weight: torch.Tensor) -> torch.Tensor:
    columns = weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -columns % 32)).unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16().float().clamp(min=1e-30)
    rounded: torch.Tensor = (groups / scale).round().clamp(-127, 127) * scale
    return rounded.flatten(1)[:, :columns]


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the stacked matrices [num_experts, out, in] of all routed experts."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name) and parameter.ndim == 3
    }


def make_family(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def demo_texts() -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model", local_files_only=True)
    lines = [
        line[2:].strip()
        for file in sorted((DEMO / "corpus").glob("*.txt"))
        for line in file.read_text("utf-8").splitlines()
        if line.startswith(("Q:", "B:"))
    ]
    pairs = [" ".join(lines[i : i + 2]) for i in range(0, len(lines), 2)]
    step = max(1, len(pairs) // _TEXTS)
    return [tokenizer(text, return_tensors="pt").input_ids for text in pairs[::step]]


@torch.inference_mode()
def log_probabilities(model: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(ids).logits[0].float() for ids in texts]


def measure(model: Any, texts: list[torch.Tensor], packer: Packer) -> dict[str, dict[str, float]]:
    """Returns error and KLD by format; the model's experts come back to BF16."""
    matrices = experts_of(model)
    originals = {name: matrix.detach().bfloat16().float() for name, matrix in matrices.items()}
    _put(matrices, originals)
    expected = log_probabilities(model, texts)
    found = {}
    for each in FORMATS:
        rounded = {
            name: torch.stack([packer.rounded(one, each) for one in matrix])
            for name, matrix in originals.items()
        }
        off = sum(float((rounded[n] - m).square().sum()) for n, m in originals.items())
        size = sum(float(m.square().sum()) for m in originals.values())
        _put(matrices, rounded)
        logits = log_probabilities(model, texts)
        errors = [
            float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())
            for a, b in zip(logits, expected, strict=True)
        ]
        divergence = [
            float(
                torch.nn.functional.kl_div(
                    a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean"
                )
            )
            for a, b in zip(logits, expected, strict=True)
        ]
        found[each] = {
            "matrix": (off / size) ** 0.5,
            "logits": statistics.median(errors),
            "kld": statistics.fmean(divergence),
        }
    _put(matrices, originals)
    return found


@torch.no_grad()
def _put(matrices: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, matrix in matrices.items():
        matrix.copy_(values[name])


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    head = "| experts in | bits | matrix, demo | logits, demo | KLD, demo |"
    head += "".join(f" logits, {name} |" for name in FAMILIES)
    lines = [head, "|---" * (5 + len(FAMILIES)) + "|"]
    for each in FORMATS:
        demo = results["demo"][each]
        cells = [
            f"`{each}`", f"{bits(each):g}", f"{demo['matrix']:.2%}", f"{demo['logits']:.2%}",
            f"{demo['kld']:.2g}",
            *(f"{results[name][each]['logits']:.2%}" for name in FAMILIES),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bits(name: str) -> float:
    """Bits of a weight with its share of the scales, of a matrix 2048 x 2048."""
    if name == "int8_g32":
        return 8.5
    each = next(f for f in _core.weight_formats() if f.name == name)
    size = 2048
    return round(8 * (each.code_bytes(size, size) + each.scale_bytes(size, size)) / size**2, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", action="store_true", help="write the table of docs/performance")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    packer = Packer()
    demo = AutoModelForCausalLM.from_pretrained(
        DEMO / "model", dtype=torch.float32, local_files_only=True
    ).eval()
    results = {"demo": measure(demo, demo_texts(), packer)}
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, SIZES["vocab_size"], (1, 64), generator=generator) for _ in range(4)]
    for name in FAMILIES:
        results[name] = measure(make_family(name), ids, packer)
    if args.json:
        print(json.dumps(results))
    else:
        print(table(results))
    if args.docs:
        text = DOCS.read_text("utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
