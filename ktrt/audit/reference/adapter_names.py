"""Maps keys of any writer's adapter files to module and half of a LoRA pair."""

from __future__ import annotations

import re
from typing import NamedTuple

# Name components added by training wrappers.
_NOISE = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module"
    r"|original_moe|orig_module)(?:\.|$)"
)
_OUTER = re.compile(r"^(?:base_model\.model\.)+")
_PAIR = re.compile(r"(?P<module>.+?)\.lora_(?P<half>[AB])(?:(?:\.[^.]+)?\.weight)?")
# KTransformers' fused file, and NVIDIA NeMo Automodel with transposed matrices.
_FUSED = re.compile(r"(?P<path>(?:.*\.)?experts)\.(?P<what>gate|up|down)_lora_(?P<half>[ab])")
_AUTOMODEL = re.compile(
    r"(?P<path>(?:.*\.)?experts)\.lora_(?P<what>gate_and_up|down)_(?P<half>[AB])"
)
_LISTED = re.compile(r"(?P<path>.*experts)\.(?P<what>gate_up|down)_projs\.(?P<number>\d+)")
_ATTENTION = re.compile(r"(?<=layers\.)(\d+)\.attn\.")
_ELSEWHERE = re.compile(
    r"(?:^|\.)(?:mtp|\w*(?:vision|visual|audio|image|speech|multi_modal|mm_projector|talker"
    r"|code2wav|token2wav)\w*)\."
)


class Half(NamedTuple):
    """``module``: normalised name, ``trained``: name in training; ``half``: A or B."""

    module: str
    trained: str
    half: str
    is_transposed: bool = False


def clean(key: str) -> str:
    """Removes the wrappers' name components."""
    return _OUTER.sub("", _NOISE.sub("", key))


def is_elsewhere(key: str) -> bool:
    """Returns whether a tensor belongs to a component that no text reaches, or to a layer that is
    not run."""
    return _ELSEWHERE.search(clean(key).partition("layers.")[0]) is not None


def half_of(key: str) -> Half | None:
    """Parses a key; None if it is no half of a LoRA pair."""
    name = clean(key)
    if match := _FUSED.fullmatch(name):
        module = f"{match['path']}.{match['what']}"
        return Half(module, module, match["half"].upper())
    if match := _AUTOMODEL.fullmatch(name):
        what = "gate_up_proj" if match["what"] == "gate_and_up" else "down_proj"
        return Half(f"{match['path']}.{what}", match["path"], match["half"], is_transposed=True)
    match = _PAIR.fullmatch(name)
    if match is None:
        return None
    trained = match["module"]
    module = _ATTENTION.sub(r"\1.self_attn.", trained)
    if listed := _LISTED.fullmatch(module):
        module = f"{listed['path']}.{listed['number']}.{listed['what']}_proj"
    return Half(module, trained, match["half"])
