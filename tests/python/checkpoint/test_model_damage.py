"""Random damage (seeded) to tensors and files of a model is refused by name, or has no effect."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.tiny_models import save_model
from safetensors.torch import load_file, save_file

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
TOKENS = torch.arange(2, 22)[None]


def logits(folder: Path) -> torch.Tensor:
    loaded = load_model(ModelArgs(folder), AdapterArgs(None), ExpertArgs(kt_num_threads=1))
    try:
        with torch.no_grad():
            result: torch.Tensor = loaded.model(TOKENS).logits
    finally:
        loaded.close()
    return result


def drop(tensors: Tensors, name: str, _rng: random.Random) -> None:
    del tensors[name]


def rename(tensors: Tensors, name: str, rng: random.Random) -> None:
    words = name.split(".")
    words[rng.randrange(len(words))] += "x"
    tensors[".".join(words)] = tensors.pop(name)


def renumber(tensors: Tensors, name: str, rng: random.Random) -> None:
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdecimal()]
    if numbers:
        words[rng.choice(numbers)] = str(rng.choice([17, 99, 1000]))
    tensors[".".join(words) if numbers else f"{name}.0"] = tensors.pop(name)


def reshape(tensors: Tensors, name: str, rng: random.Random) -> None:
    value = tensors[name]
    shapes = [(1, *value.shape), (value.numel(),), (value.numel(), 1), tuple(value.shape[::-1])]
    other = [shape for shape in shapes if shape != tuple(value.shape)]
    tensors[name] = value.reshape(rng.choice(other)).clone()


def cut(tensors: Tensors, name: str, _rng: random.Random) -> None:
    tensors[name] = tensors[name][:-1].clone()


def empty(tensors: Tensors, name: str, _rng: random.Random) -> None:
    tensors[name] = tensors[name][:0].clone()


def relabel(tensors: Tensors, name: str, rng: random.Random) -> None:
    tensors[name] = tensors[name].view(rng.choice([torch.int16, torch.uint16]))


def convert(tensors: Tensors, name: str, rng: random.Random) -> None:
    kinds = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
    tensors[name] = tensors[name].float().to(rng.choice(kinds))


def add(tensors: Tensors, name: str, rng: random.Random) -> None:
    stem, _, leaf = name.rpartition(".")
    tensors[f"{stem}.{rng.choice(['bias2', 'lora', 'extra'])}_{leaf}"] = tensors[name].clone()


DAMAGES: list[Callable[[Tensors, str, random.Random], None]] = [
    drop, rename, renumber, reshape, cut, empty, relabel, convert, add,
]  # fmt: skip


@pytest.fixture(scope="module", params=["deepseek_v2", "qwen3_moe"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), request.param, 96)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(
    original: Path, tmp_path: Path, damage: Callable[[Tensors, str, random.Random], None]
) -> None:
    expected, rng = logits(original), random.Random(damage.__name__)
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    for _ in range(6):
        tensors = load_file(original / "model.safetensors")
        name = rng.choice(sorted(tensors))
        damage(tensors, name, rng)
        save_file(tensors, folder / "model.safetensors")
        try:
            found = logits(folder)
        except CheckpointError:
            continue
        assert torch.equal(found, expected), f"{damage.__name__} of {name} changes the answer"


def test_damaged_files(original: Path, tmp_path: Path) -> None:
    """Tries truncated files, headers with other bytes, a pointer instead of the file."""
    data = (original / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    rng, folder = random.Random(5), tmp_path / "model"
    shutil.copytree(original, folder)
    expected = logits(original)
    files = [data[: rng.randrange(len(data))] for _ in range(6)]
    files += [b"", b"version https://git-lfs.github.com/spec/v1\n", data + b"more", data[8:]]
    for _ in range(12):
        at = rng.randrange(8, 8 + length)
        files.append(data[:at] + bytes([data[at] ^ (1 << rng.randrange(7))]) + data[at + 1 :])
    for damaged in files:
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            found = logits(folder)
        except CheckpointError:
            continue
        header = json.loads(damaged[8 : 8 + length])
        assert torch.equal(found, expected), header
