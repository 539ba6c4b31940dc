"""Recognises folders that are neither a model nor an adapter in the form ktrt reads."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
# All names of adapter weight files by PEFT, KTransformers and LLaMA-Factory.
ADAPTER_WEIGHTS = re.compile(
    r"adapter_model(-\d{5}-of-\d{5})?\.(safetensors|bin|pt)"
    r"|fused_expert_lora\.safetensors|lora_experts\.safetensors"
)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_NAMED = 4


@dataclass(frozen=True)
class Kind:
    """``what`` completes "is …"; ``advice`` says how to get a model from it."""

    what: str
    advice: str


def names_in(folder: Path) -> list[str]:
    """Returns the sorted names of a folder's entries; empty if it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def subfolders(folder: Path) -> list[Path]:
    """Returns the direct subfolders, sorted by name."""
    return [folder / name for name in names_in(folder) if (folder / name).is_dir()]


def listed(items: Sequence[object], limit: int = _NAMED) -> str:
    """Returns the first items as text, and the number of further ones."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(str(item) for item in items[:limit]) + more


def model_weights(names: Sequence[str]) -> list[str]:
    """Returns the safetensors files of a model among ``names``."""
    return [
        name
        for name in names
        if name.endswith(".safetensors") and not ADAPTER_WEIGHTS.fullmatch(name)
    ]


def holds_adapter(folder: Path) -> bool:
    """Returns whether ``folder`` directly holds an adapter's files, complete or not."""
    names = names_in(folder)
    return ADAPTER_CONFIG in names or any(map(ADAPTER_WEIGHTS.fullmatch, names))


def holds_model(folder: Path) -> bool:
    """Returns whether ``folder`` looks like a Hugging Face model with safetensors, complete or
    not."""
    names = names_in(folder)
    return CONFIG in names and bool(model_weights(names))


def describe_folder(folder: Path) -> str:
    """Describes the folder's contents for the middle of a sentence."""
    if holds_model(folder):
        architectures = glance(folder / CONFIG).get("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else CONFIG
        return f"a model folder ({name})"
    if kind := kind_of(folder):
        return kind.what
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"nothing that can be read ({(error.strerror or str(error)).lower()})"
    return listed(names)


def glance(file: Path) -> dict[str, Any]:
    """Reads a JSON object for messages only; empty if the file holds none."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def kind_of(folder: Path) -> Kind | None:
    """Classifies a folder without a model; None if its names say nothing."""
    names = names_in(folder)
    if not names:
        return Kind("an empty folder", "Copy or download the model into it.")
    return next((kind for rule in _RULES if (kind := rule(folder, names))), None)


def _hub(folder: Path, names: list[str]) -> Kind | None:
    """Recognises the hub's cache of one model, or of all."""
    repositories = [each for each in subfolders(folder) if each.name.startswith("models--")]
    if not repositories and "snapshots" in names:
        repositories = [folder]
    if not repositories:
        return None
    found = [path for each in repositories for path in _snapshots(each)]
    advice = f"Name the model's snapshot: {listed(found)}."
    if not found:
        advice = "No snapshot in it holds a config.json: download the model again."
    return Kind("a cache folder of the Hugging Face hub", advice)


def cached_snapshots(hub_id: str) -> list[Path]:
    """Returns the snapshots of a model or an adapter in this user's hub cache."""
    cache = os.environ.get("HF_HUB_CACHE")
    if not cache:
        cache = f"{os.environ.get('HF_HOME') or '~/.cache/huggingface'}/hub"
    try:
        return _snapshots(Path(cache).expanduser() / f"models--{hub_id.replace('/', '--')}")
    except (OSError, RuntimeError):
        return []


def _snapshots(repository: Path) -> list[Path]:
    """Returns the snapshots with a model or an adapter; if the branch main is known, only its."""
    found = [
        each
        for each in subfolders(repository / "snapshots")
        if (each / CONFIG).is_file() or (each / ADAPTER_CONFIG).is_file()
    ]
    try:
        main = (repository / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        return found
    return [each for each in found if each.name == main] or found


def _adapter(folder: Path, names: list[str]) -> Kind | None:
    if ADAPTER_CONFIG not in names and not any(map(ADAPTER_WEIGHTS.fullmatch, names)):
        return None
    base = glance(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f", which was trained on {base}" if isinstance(base, str) and base else ""
    return Kind(
        f"a LoRA adapter, not a model{of}",
        "Name it as adapter_name_or_path, and its base model as model_name_or_path.",
    )


def _with_suffix(suffix: str, what: str, advice: str) -> Callable[[Path, list[str]], Kind | None]:
    def rule(_folder: Path, names: list[str]) -> Kind | None:
        found = [name for name in names if name.endswith(suffix)]
        return Kind(f"{what} ({listed(found)})", advice) if found else None

    return rule


def _named(name: str, what: str, advice: str) -> Callable[[Path, list[str]], Kind | None]:
    def rule(_folder: Path, names: list[str]) -> Kind | None:
        return Kind(f"{what} ({name})", advice) if name in names else None

    return rule


def _pickles(folder: Path, names: list[str]) -> Kind | None:
    found = [name for name in names if re.fullmatch(r"(pytorch_model.*|model.*)\.(bin|pt)", name)]
    if not found or CONFIG not in names:
        return None
    return Kind(
        f"a model whose weights are pickled ({listed(found)}), not safetensors",
        "Convert once:"
        f' python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        " and copy the tokenizer files into the new folder.",
    )


def _output(folder: Path, _names: list[str]) -> Kind | None:
    """Recognises a trainer's output: only its checkpoints hold models or adapters."""
    found = [each for each in subfolders(folder) if CHECKPOINT.fullmatch(each.name)]
    if not found:
        return None
    found.sort(key=lambda each: int(each.name.removeprefix("checkpoint-")))
    models = [each for each in found if holds_model(each)]
    advice = "None of them holds a model."
    if models:
        advice = f"Name the newest one with a model: {models[-1]}."
    elif adapters := [each for each in found if holds_adapter(each)]:
        advice = (
            f"They hold adapters: name {folder} or {adapters[-1]} as adapter_name_or_path, and the "
            "base model as model_name_or_path."
        )
    return Kind(
        f"the output folder of a training ({listed([each.name for each in found])})", advice
    )


def _deeper(folder: Path, _names: list[str]) -> Kind | None:
    found = [each for each in subfolders(folder) if (each / CONFIG).is_file()]
    if not found:
        return None
    what = "a folder of snapshots" if _SNAPSHOT.fullmatch(found[0].name) else "a folder of folders"
    return Kind(what, f"Name the one with the model: {listed(found)}.")


def _without_weights(_folder: Path, names: list[str]) -> Kind | None:
    if CONFIG not in names:
        return None
    return Kind(
        "a model folder without weights: no *.safetensors file lies in it",
        "Download or copy the model again; an interrupted download continues where it stopped.",
    )


def _without_config(_folder: Path, names: list[str]) -> Kind | None:
    if not model_weights(names):
        return None
    return Kind(
        f"a folder with weights ({listed(model_weights(names))}) and no {CONFIG}",
        f"Copy {CONFIG} and the tokenizer's files from the published model.",
    )


_HF_FORM = "ktrt reads Hugging Face folders with safetensors: name the model in that form."
_RULES: tuple[Callable[[Path, list[str]], Kind | None], ...] = (
    _hub,
    _adapter,
    _with_suffix(".gguf", "a folder of GGUF files", _HF_FORM),
    _named("model_index.json", "a diffusers pipeline", "ktrt runs language models only."),
    _named("params.json", "a model in its maker's own format", _HF_FORM),
    _pickles,
    _with_suffix(".onnx", "a model in ONNX", _HF_FORM),
    _with_suffix(".h5", "a model in TensorFlow's format", _HF_FORM),
    _with_suffix(".msgpack", "a model in Flax's format", _HF_FORM),
    _output,
    _named(
        "zero_to_fp32.py",
        "the state of a DeepSpeed training",
        "Run `python zero_to_fp32.py . out --safe_serialization` there, and copy config.json and "
        "the tokenizer's files to its result.",
    ),
    _with_suffix(
        ".distcp",
        "a distributed training checkpoint",
        "Merge it first, as with `accelerate merge-weights`.",
    ),
    _deeper,
    _without_weights,
    _without_config,
)
