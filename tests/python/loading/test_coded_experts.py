"""Experts in the formats that big models ship in, from folder to logits: against transformers in
float32 on the dequantised weights.

The measure is what the activations' roundings cost: weights are not rounded again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.coded_checkpoints import FAMILIES, SCHEMES, CodedFolders, code_folder, save_family
from helpers.family_adapters import RANK, write_per_expert, write_stacked
from helpers.rounded_experts import experts_of, random_lora, use_rounded_experts
from transformers import AutoModelForCausalLM

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.experts import KTExperts
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.rounded_experts import Lora

pytestmark = pytest.mark.end_to_end

# The engine's format of a scheme, if it has another name.
_FORMATS = {f"gptq_g{group}": f"int4_g{group}" for group in (32, 64, 128)}
# Every scheme and family, and every kind of adapter, once.
DIAGONAL = [
    ("fp8", "deepseek_v3", "per expert"),
    ("fp8_channel", "glm4_moe", "stacked"),
    ("int4_g32", "kimi_k2", "per expert"),
    ("int4_g128", "minimax_m2", "none"),
    ("gptq_g64", "qwen3_moe", "stacked"),
    ("mxfp4", "gpt_oss", "stacked"),
]
# gpt-oss ships its stacks in MXFP4 only.
MATRIX = [(s, f) for s in SCHEMES for f in FAMILIES if f != "gpt_oss" or s == "mxfp4"]


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 90, (2, 24), generator=generator)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits.float()
    return result


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((found - reference).norm(dim=-1) / reference.norm(dim=-1)).median())


@dataclass
class Case:
    """``original``: the folder before quantisation; ``model``: the dequantised twin in float32."""

    original: Path
    folders: CodedFolders
    model: Any

    @classmethod
    def make(cls, folder: Path, scheme: str, family: str) -> Case:
        original = save_family(folder / "original", family)
        # Kimi-K2-Thinking leaves everything but the routed experts plain.
        only = family == "kimi_k2"
        folders = code_folder(original, folder / "coded", scheme, experts_only=only)
        config = folders.plain / "config.json"
        values = json.loads(config.read_text("utf-8"))
        if family == "kimi_k2":
            values["model_type"] = "deepseek_v3"  # transformers does not know kimi_k2
            config.write_text(json.dumps(values), "utf-8")
        model = AutoModelForCausalLM.from_pretrained(folders.plain, dtype=torch.float32)
        return cls(original, folders, model.eval())

    def adapter(self, kind: str, target: Path) -> tuple[Path | None, dict[str, Lora]]:
        if kind == "none":
            return None, {}
        generator = torch.Generator().manual_seed(2)
        experts = experts_of(self.model)
        stacked = kind == "stacked"
        loras = {p: random_lora(m, RANK, stacked, generator) for p, m in experts.items()}
        if stacked:
            return write_stacked(target, experts, loras), loras
        return write_per_expert(target, self.original, loras), loras

    def check(self, kind: str, target: Path, weight_format: str) -> None:
        adapter, loras = self.adapter(kind, target)
        use_rounded_experts(self.model, loras, "none")
        reference = logits(self.model)
        use_rounded_experts(self.model, loras, "activations")
        allowed = 2 * error(logits(self.model), reference)
        loaded = load_model(
            ModelArgs(self.folders.coded, infer_dtype="float32"),
            AdapterArgs(adapter),
            ExpertArgs(kt_num_threads=1, ktrt_cache=False),
        )
        try:
            layers = [m.layer for m in loaded.model.modules() if isinstance(m, KTExperts)]
            assert {layer.weight_format for layer in layers} == {weight_format}
            found = error(logits(loaded.model), reference)
            assert loaded.audit.not_applied == 0
        finally:
            loaded.close()
        assert 0 < found <= allowed < 0.03, (kind, found, allowed)


@pytest.mark.parametrize(("scheme", "family", "kind"), DIAGONAL)
def test_logits_of_every_format(tmp_path: Path, scheme: str, family: str, kind: str) -> None:
    case = Case.make(tmp_path, scheme, family)
    case.check(kind, tmp_path / "adapter", _FORMATS.get(scheme, scheme))


@pytest.mark.long
@pytest.mark.parametrize(("scheme", "family"), MATRIX)
def test_logits_of_every_format_and_family(tmp_path: Path, scheme: str, family: str) -> None:
    case = Case.make(tmp_path, scheme, family)
    kinds = ["none", "stacked"] if family == "gpt_oss" else ["none", "stacked", "per expert"]
    for kind in kinds:
        case.check(kind, tmp_path / f"adapter {kind}", _FORMATS.get(scheme, scheme))
