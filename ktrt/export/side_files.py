"""Copies the files of a model folder other than weights; updates config.json."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from ktrt.errors import AdapterError, CheckpointError
from ktrt.export.quantization import QUANTIZATION_KEYS, with_exceptions
from ktrt.export.shards import write_synced
from ktrt.prompt.tokenizer.files import TEMPLATE_FILES, TEMPLATES_FOLDER, TokenizerFiles
from ktrt.utils.json_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".ot", ".npz",
}  # fmt: skip
# README.md describes the base model on the hub, not the export. The quantisation files belong to
# weights that are written plain.
_NOT_COPIED = {
    "README.md", "config.json", "hf_quant_config.json", "quantize_config.json",
    "quant_config.json", "quantization_config.json",
}  # fmt: skip
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def side_files(source: Path) -> Iterator[Path]:
    """Yields tokenizer, chat templates, generation and other configs, licences, code: all files at
    the top of the folder that are no weights, as relative paths."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        hidden = path.name.startswith(".")
        if path.is_file() and not weights and not hidden and path.name not in _NOT_COPIED:
            yield path.relative_to(source)
    if (source / TEMPLATES_FOLDER).is_dir():
        yield from (p.relative_to(source) for p in sorted((source / TEMPLATES_FOLDER).iterdir()))


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies the side files, following symbolic links."""
    for relative in side_files(source):
        (folder / relative).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / relative, folder / relative)


def copy_words(source: Path, folder: Path) -> None:
    """Replaces tokenizer files and chat templates in ``folder`` by the files of ``source``; keeps
    vocabularies that ``source`` lacks."""
    files = TokenizerFiles(source, AdapterError)
    if files.chat_template() is not None:
        for name in TEMPLATE_FILES:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / TEMPLATES_FOLDER, ignore_errors=True)
    for relative in files.paths():
        (folder / relative).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / relative, folder / relative)


def write_config(
    source: Path,
    folder: Path,
    *,
    dtype: str | None,
    untied: bool,
    vocabulary: tuple[int, int] | None = None,
    plain: Sequence[str] | None = None,
) -> None:
    """Writes config.json of the merged model: with ``dtype`` (in safetensors' words; None keeps the
    source's), with untied embeddings if ``untied``. ``vocabulary``: its size before and after a
    resize. ``plain``: modules that the quantisation does not cover; None: it is removed."""
    config = read_json(source / "config.json", CheckpointError)
    for each in _configs(config):
        each.pop("transformers_weights", None)
        for key in QUANTIZATION_KEYS:
            if plain is None:
                each.pop(key, None)
            elif isinstance(each.get(key), dict):
                each[key] = with_exceptions(each[key], plain)
        key = "torch_dtype" if "torch_dtype" in each else "dtype"
        if dtype is not None and (each is config or key in each):
            each[key] = _NAMES[dtype]
        if vocabulary is not None and each.get("vocab_size") == vocabulary[0]:
            each["vocab_size"] = vocabulary[1]
        if untied and (each is config or "tie_word_embeddings" in each):
            each["tie_word_embeddings"] = False
    if vocabulary is not None and not any("vocab_size" in each for each in _configs(config)):
        config["vocab_size"] = vocabulary[1]
    write_synced(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the config and its inner configs (text_config, vision_config …)."""
    inner = [v for k, v in config.items() if k.endswith("_config") and k not in QUANTIZATION_KEYS]
    return [config, *(each for each in inner if isinstance(each, dict))]
