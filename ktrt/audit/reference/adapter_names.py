"""Keys of adapter files → module and half of a LoRA pair, whoever wrote them."""

from __future__ import annotations

import re
from typing import NamedTuple

# What wrappers of training leave in names.
_NOISE = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module"
    r"|original_moe|orig_module)(?:\.|$)"
)
_OUTER = re.compile(r"^(?:base_model\.model\.)+")
_PAIR = re.compile(r"(?P<module>.+?)\.lora_(?P<half>[AB])(?:(?:\.[^.]+)?\.weight)?")
# KTransformers' fused file, and NVIDIA NeMo Automodel, whose matrices are transposed.
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
    """``module`` in neutral words, ``trained`` as training named it; ``half`` is A or B."""

    module: str
    trained: str
    half: str
    is_transposed: bool = False


def clean(key: str) -> str:
    """The key without what wrappers put into it."""
    return _OUTER.sub("", _NOISE.sub("", key))


def is_elsewhere(key: str) -> bool:
    """Whether a tensor is of a part that no text reaches, or of a layer that is not run."""
    return _ELSEWHERE.search(clean(key).partition("layers.")[0]) is not None


def half_of(key: str) -> Half | None:
    """None for what is no half of a LoRA pair."""
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
