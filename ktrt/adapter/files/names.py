"""Normalises tensor names of all writers to PEFT's module and part, without the base.

Removes wrappers' words, PEFT's outer names, the adapter's name inside keys, and the names of PEFT's
copies of modules saved whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Words to remove anywhere in a name: wrappers of DDP, torch.compile, FSDP and activation
# checkpointing; original_moe, which LLaMA-Factory wrote around 2026-01 (layout a'); orig_module,
# which KTransformers' fine-tuning of 2025 put after any name (layout d).
_WRAPPERS = frozenset({
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
    "original_moe", "orig_module",
})  # fmt: skip
_PEFT_PREFIX = ["base_model", "model"]
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# Parameters that are no modules: PEFT appends only the adapter's name.
_BARE = _LORA[2:]
_LEAVES = ("weight", "bias")
_SAVED, _ORIGINAL = "modules_to_save", "original_module"


@dataclass(frozen=True)
class Name:
    """A parsed key: ``part`` is lora_A, lora_B, lora_B.bias, … or the parameter's own name.

    ``adapter``: the adapter's name in the key, if any. ``is_original``: PEFT's copy of a module
    before training.
    """

    module: str
    part: str
    adapter: str | None = None
    is_original: bool = False


def parse_names(file: Path, keys: Iterable[str]) -> dict[str, Name]:
    """Parses the keys of one file. Raises ``AdapterError`` if they belong to several adapters."""
    words = {key: _words(key) for key in keys}
    found: dict[str, Name] = {}
    for key, each in words.items():
        if (name := _lora_name(each)) is not None:
            found[key] = name
    adapters = sorted({name.adapter for name in found.values() if name.adapter})
    if len(adapters) > 1:
        raise AdapterError(
            f"{file} holds several adapters ({', '.join(adapters[:4])}); expected one. Save each "
            "to its own folder (save_pretrained with selected_adapters)."
        )
    for key, each in words.items():
        if key not in found:
            found[key] = _whole_name(each, [*adapters, "default"])
    return found


def _words(key: str) -> list[str]:
    words = [word for word in key.split(".") if word not in _WRAPPERS]
    while words[:2] == _PEFT_PREFIX:
        words = words[2:]
    return words


def _lora_name(words: list[str]) -> Name | None:
    """Parses ``…lora_A[.adapter].weight`` and similar; None for other names."""
    at = next((i for i, word in enumerate(words) if word in _LORA), 0)
    if not at:
        return None
    module, part, rest = ".".join(words[:at]), words[at], words[at + 1 :]
    adapter = None
    if len(rest) == 2 or (len(rest) == 1 and part in _BARE and rest[0] not in _LEAVES):
        adapter, *rest = rest
    if rest not in ([], ["weight"], ["bias"]):
        return None
    return Name(module, f"{part}.bias" if rest == ["bias"] else part, adapter)


def _whole_name(words: list[str], adapters: list[str]) -> Name:
    """Parses a parameter's own name; its module's trained copy has the same."""
    original = False
    if _SAVED in words[:-1]:
        at = words.index(_SAVED)
        named = words[at + 1] in adapters and at + 2 < len(words)
        words = words[:at] + words[at + (2 if named else 1) :]
    elif _ORIGINAL in words[:-1]:
        at = words.index(_ORIGINAL)
        words, original = words[:at] + words[at + 1 :], True
    return Name(".".join(words[:-1]), words[-1] if words else "", is_original=original)
