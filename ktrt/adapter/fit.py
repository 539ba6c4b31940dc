"""Maps writers' names to the base's, and sorts out tensors that change no text.

One table of rules applies to names that the base does not know: other writers' words, and the
prefix before ``layers``, which differs between a multimodal class and its text class. Numbers stay
unchanged, except one writer's transposed matrices.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ktrt.adapter.tensors import Idle
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ktrt.adapter.internal import BaseModel
    from ktrt.adapter.tensors import AdapterFiles, AdapterTensor

logger = logging.getLogger(__name__)

# Unsloth's gpt-oss in 4 bits keeps a list of Linears for each matrix; Tinker uses other words.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.gate_up_projs\.(\d+)$"), r".\1.gate_up_proj"),
    (re.compile(r"\.down_projs\.(\d+)$"), r".\1.down_proj"),
    (re.compile(r"\.router\.linear$"), ".router"),
    (re.compile(r"(?<!\w)attn\."), "self_attn."),
    (re.compile(r"(\.experts(?:\.\d+)?)\.w2$"), r"\1.down_proj"),
    (re.compile(r"(\.experts(?:\.\d+)?)\.w3$"), r"\1.up_proj"),
)
# Gate; up if the experts have no gate.
_FIRST = re.compile(r"(\.experts(?:\.\d+)?)\.w1$")
# NVIDIA NeMo Automodel: [E, in, rank] and [E, rank, out] under these names.
_AUTOMODEL = {
    "lora_gate_and_up_A": (True, "lora_A"), "lora_gate_and_up_B": (True, "lora_B"),
    "lora_down_A": (False, "lora_A"), "lora_down_B": (False, "lora_B"),
}  # fmt: skip
# Possible prefixes of ``layers`` and the embeddings in a text model.
_TEXT = r"(?:(?:model|language_model|text_model|backbone|transformer|thinker|llm|decoder)\.)*"
_IN_LAYER = re.compile(rf"{_TEXT}(?P<tail>layers\.\d+\..+)")
_OUTSIDE = re.compile(rf"{_TEXT}(?P<tail>embed_tokens|lm_head|unembed_tokens|norm)")
# Components of a model that no text reaches.
_NO_TEXT = re.compile(
    r"(?:^|\.)\w*(?:vision|visual|audio|image|speech|multi_modal|mm_projector|talker|code2wav"
    r"|token2wav)\w*(?:\.|$)"
)
# Layers that predict further tokens, which transformers' classes leave out.
_NEXT_TOKENS = re.compile(r"(?:\w+\.)*?mtp(?:_\w+)?\.")
_TINKER = re.compile(r"\.experts\.w[123]$|(?:^|\.)unembed_tokens$")
# Names of models whose projections are fused or split.
_FOREIGN = (
    (re.compile(r"\.in_proj_[qkv]$|\.mixer\.(?:gate|x)_proj$"),
     "These are Tinker's raw names for slices of one matrix: convert the adapter with "
     "tinker_cookbook.weights.build_lora_adapter"),
    (re.compile(r"\.linear_(?:qkv|proj|fc[12])$"),
     "These are Megatron's names: export the adapter to Hugging Face's names first"),
    (re.compile(r"\.(?:qkv_proj|W_pack|c_attn|query_key_value)$"),
     "These are names of a model class with fused projections; export the adapter to the names of "
     "the base's class"),
)  # fmt: skip


def is_for_text(module: str) -> bool:
    """Returns whether text passes through a module, judging by the prefix of its layers."""
    return _NO_TEXT.search(module.partition("layers.")[0]) is None


def fit_names(
    files: AdapterFiles,
    base: BaseModel,
    claims: Callable[[AdapterTensor, BaseModel], bool],
) -> AdapterFiles:
    """Renames tensors to names that the base knows; makes tensors that no text reaches idle, with a
    warning. ``claims``: whether a layout of routed experts takes a tensor by its name.

    Unknown names stay unchanged. Raises ``AdapterError`` for empty tensors, which training saved
    without gathering them.
    """
    tensors, idle, unseen = [], list(files.idle), []
    fitter = _Fitter(base, claims)
    for tensor in files.tensors:
        if not is_for_text(tensor.module):
            unseen.append(Idle(tensor, "outside the text model"))
        elif _NEXT_TOKENS.match(tensor.module) and not fitter.knows(tensor):
            unseen.append(Idle(tensor, "of layers that predict further tokens, which do not run"))
        elif _is_placeholder(tensor, base):
            idle.append(Idle(tensor, "empty: these experts have no gate"))
        else:
            tensors.append(fitter.fit(tensor))
    if unseen:
        if not tensors:
            raise AdapterError(
                f"{files.file}: no text reaches the targets of all {len(unseen)} tensors (first "
                f"{unseen[0].tensor.key}): this adapter does nothing in a chat."
            )
        logger.warning(
            "%s: no text reaches the targets of %d of %d tensors (first %s): they are not applied",
            files.file, len(unseen), len(files.tensors), unseen[0].tensor.key,
        )  # fmt: skip
    _check_gathered(tensors)
    return replace(files, tensors=tensors, idle=idle + unseen)


def is_raw_tinker(files: AdapterFiles) -> bool:
    """Returns whether the names are Tinker's raw ones."""
    return any(_TINKER.search(tensor.trained_module) for tensor in files.tensors)


def _is_placeholder(tensor: AdapterTensor, base: BaseModel) -> bool:
    without_gate = bool(base.experts) and not base.experts[0].has_gate
    return not tensor.value.numel() and without_gate and tensor.module.endswith(".experts.w3")


def _check_gathered(tensors: Sequence[AdapterTensor]) -> None:
    empty = [tensor for tensor in tensors if not tensor.value.numel()]
    if empty:
        raise AdapterError(
            f"{empty[0].where} has shape {list(empty[0].value.shape)}, no numbers ({len(empty)} "
            "such tensors). DeepSpeed ZeRO-3 saved it without gathering its shards: save again "
            "with stage3_gather_16bit_weights_on_model_save, or convert the checkpoint with "
            "zero_to_fp32.py."
        )


class _Candidate(NamedTuple):
    module: str
    part: str
    transposed: bool


class _Fitter:
    """Finds the base's names; looks up A and B of one module once."""

    def __init__(self, base: BaseModel, claims: Callable[[AdapterTensor, BaseModel], bool]) -> None:
        self._base, self._claims = base, claims
        self._unchanged: set[str] = set()

    def knows(self, tensor: AdapterTensor) -> bool:
        """Returns whether the base has the module, by the tensor's own name."""
        return self._claims(tensor, self._base) or _has_module(tensor.module, self._base)

    def fit(self, tensor: AdapterTensor) -> AdapterTensor:
        if tensor.module in self._unchanged and tensor.part in ("lora_A", "lora_B"):
            return tensor
        for module, part, transposed in _candidates(tensor, self._base):
            other = tensor
            if module != tensor.module or transposed:
                value = _transposed(tensor) if transposed else tensor.value
                other = replace(
                    tensor, module=module, part=part, trained=tensor.module, value=value
                )
            if self._claims(other, self._base) or _has_module(module, self._base):
                if other is tensor:
                    self._unchanged.add(tensor.module)
                return other
        return tensor


def _candidates(tensor: AdapterTensor, base: BaseModel) -> Iterator[_Candidate]:
    gated = not base.experts or base.experts[0].has_gate
    module, part, transposed = tensor.module, tensor.part, False
    if part in _AUTOMODEL and module.endswith("experts"):
        is_first, part = _AUTOMODEL[part]
        leaf = ("gate_up_proj" if gated else "up_proj") if is_first else "down_proj"
        module, transposed = f"{module}.{leaf}", True
    renamed = _FIRST.sub(rf"\1.{'gate' if gated else 'up'}_proj", module)
    for pattern, replacement in _RULES:
        renamed = pattern.sub(replacement, renamed)
    for name in dict.fromkeys((module, renamed)):
        yield _Candidate(name, part, transposed)
    for name in dict.fromkeys((module, renamed)):
        if (moved := _in_place(name, tensor, base)) is not None:
            yield _Candidate(moved, part, transposed)


def _transposed(tensor: AdapterTensor) -> Any:
    if tensor.value.ndim != 3:
        raise AdapterError(
            f"{tensor.where} has shape {list(tensor.value.shape)}, expected three dimensions "
            "(experts first), as NeMo Automodel writes it."
        )
    return tensor.value.transpose(1, 2).contiguous()


def _in_place(name: str, tensor: AdapterTensor, base: BaseModel) -> str | None:
    """Returns ``name`` with the base's prefix of ``layers``; None for a name of no text model."""
    prefix = text_prefix(base)
    if match := _IN_LAYER.fullmatch(name):
        return None if prefix is None else f"{prefix}{match['tail']}"
    match = _OUTSIDE.fullmatch(name)
    if match is None:
        return None
    model: Any = base.model
    if match["tail"] == "norm":
        return None if prefix is None else f"{prefix}norm"
    if match["tail"] == "embed_tokens":
        return _name_of(model.get_input_embeddings(), base)
    if match["tail"] == "unembed_tokens" and has_tied_embeddings(base):
        raise AdapterError(
            f"{tensor.where}: this base has one matrix for the embeddings and the output layer; "
            "the file does not say whether training changed both. Convert the adapter with "
            "tinker_cookbook.weights first."
        )
    return _name_of(model.get_output_embeddings(), base)


def has_tied_embeddings(base: BaseModel) -> bool:
    """Returns whether embeddings and output layer are one matrix."""
    model: Any = base.model
    config = getattr(model, "config", None)
    if config is None:
        return False
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def text_prefix(base: BaseModel) -> str | None:
    """Returns the prefix of ``layers`` in the names of all MoE layers, with its dot."""
    found = {re.match(r"(.*?)layers\.\d+\.", site.path) for site in base.experts}
    prefixes = {match[1] for match in found if match}
    return prefixes.pop() if len(prefixes) == 1 else None


def _name_of(module: object, base: BaseModel) -> str | None:
    return next((name for name, each in base.model.named_modules() if each is module), None)


def _has_module(module: str, base: BaseModel) -> bool:
    weight = f"{module.removesuffix('.base_layer')}.weight"
    try:
        base.model.get_submodule(base.names.target(weight).name.removesuffix(".weight"))
    except AttributeError:
        return False
    return True


def explain_unknown(tensor: AdapterTensor, base: BaseModel) -> str:
    """Explains why the base may lack a tensor's module: another depth, or other names."""
    start = (
        f"{tensor.where} adapts {tensor.module or 'nothing'}, which the base model does not have"
    )
    layers = {
        int(match[1]) for name, _ in base.model.named_modules()
        if is_for_text(name) and (match := re.search(r"(?:^|\.)layers\.(\d+)$", name))
    }  # fmt: skip
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", tensor.module)
    if number and layers and int(number[1]) > max(layers):
        return (
            f"{start}: it has layers 0 to {max(layers)}; {base.summary()}. The adapter was trained "
            "on another base model."
        )
    for pattern, advice in _FOREIGN:
        if pattern.search(tensor.module):
            return f"{start}. {advice}."
    return f"{start}; {base.summary()}. {_neighbours(tensor.module, base)}"


def _neighbours(module: str, base: BaseModel) -> str:
    """Lists the base's modules at the deepest common prefix."""
    names = [name for name, _ in base.model.named_modules() if name]
    words = module.split(".")
    for end in range(len(words) - 1, 0, -1):
        start = f"{'.'.join(words[:end])}."
        inside = dict.fromkeys(
            name[len(start) :].split(".")[0] for name in names if name.startswith(start)
        )
        if inside:
            return f"{start[:-1]} holds {', '.join([*inside][:12])}: rename the tensors to these."
    return (
        f"Names of the base look like {next((n for n in names if '.layers.' in n), names[0])}, "
        "with PEFT's base_model.model. before them or not: rename the tensors."
    )
