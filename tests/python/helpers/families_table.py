"""The table of families in docs/models.md: ``make docs`` writes it, a test compares it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[3])]

from helpers.documents import DOCS, generated, replace_generated
from helpers.family_models import Family, families, folders_without_class, small_config

from ktrt.experts import ExpertsSpec, find_experts

DOCUMENT = DOCS / "models.md"
_START = "<!-- families: transformers"
_END = "<!-- families: end -->"
# Classes that transformers lists as generating text and ktrt refuses, with ktrt's reason (a regular
# expression); tests/python/checkpoint/test_families.py asserts it.
REFUSED = {
    "DiffusionGemmaForBlockDiffusion": "does not continue its input token by token",
    "Qwen3OmniMoeForConditionalGeneration": "several models in one and has no forward",
}


def current_block() -> str:
    """The block in the document, markers included; empty if there is none."""
    return generated(DOCUMENT, _START, _END)


def table_block() -> str:
    """Returns the block for the installed transformers."""
    groups: dict[str, list[str]] = {}
    refused = []
    for family in families():
        if family.class_name in REFUSED:
            refused.append(f"`{family.model_type}` ({REFUSED[family.class_name]})")
        else:
            groups.setdefault(_form(family), []).append(f"`{family.model_type}`")
    refused += [f"`{folder}` (no class that generates text)" for folder in folders_without_class()]
    lines = [f"<!-- families: transformers {transformers.__version__} (make docs) -->"]
    lines += ["| experts | model types |", "|---|---|"]
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    lines += [f"| {form} | {', '.join(sorted(set(types)))} |" for form, types in ordered]
    lines += [f"| refused | {', '.join(refused)} |", _END]
    return "\n".join(lines)


def _form(family: Family) -> str:
    try:
        with torch.device("meta"):
            model = getattr(transformers, family.class_name)(small_config(family.model_type))
    except ModuleNotFoundError:  # a vision tower with an additional dependency
        text = next(f for f in families() if f.folder == family.folder and f != family)
        return _form(text)
    return _words(find_experts(model)[0])


def _words(spec: ExpertsSpec) -> str:
    activation = spec.activation
    name = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU",
            "relu2": "ReLU²", "softcap_silu": "softcapped SiLU"}[activation.activation]  # fmt: skip
    words = [name if spec.has_gate else f"{name}, no gate"]
    if activation.gate_limit != float("inf") and activation.activation != "softcap_silu":
        words.append("clamped")
    words += ["slope and offset"] if activation.up_offset else []
    words += ["biases"] if spec.has_bias else []
    words += ["stored transposed"] if spec.is_transposed else []
    words += ["gate and up interleaved"] if spec.is_interleaved else []
    words += ["norm after each expert"] if spec.has_post_expert_norm else []
    return ", ".join(words)


def main() -> None:
    replace_generated(DOCUMENT, _START, _END, table_block())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
