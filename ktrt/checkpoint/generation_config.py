"""Checks a model folder's generation_config.json before transformers reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.errors import CheckpointError
from ktrt.utils.json_files import JsonObject, read_json_as

if TYPE_CHECKING:
    from pathlib import Path

_NAME = "generation_config.json"
_ADVICE = (
    "It says at which tokens an answer ends: download it again, or remove it to use config.json's "
    "eos_token_id."
)


class _GenerationConfig(JsonObject):
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None


def check_generation_config(folder: Path) -> None:
    """Raises ``CheckpointError`` with file and key if the file exists and cannot be used."""
    file = folder / _NAME
    if not file.exists() and not file.is_symlink():
        return
    read_json_as(file, _GenerationConfig, CheckpointError, _ADVICE)
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library's checks raise several kinds
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file}: transformers refuses it ({type(error).__name__}: {reason}). {_ADVICE}"
        ) from error
