#!/usr/bin/env python3
"""Writes a random checkpoint of a published model's shape, with fewer layers.

    python bench/make_v2lite.py /tmp/v2lite --layers 4      # 1 dense and 3 MoE layers, 4.5 GB
    python bench/make_v2lite.py /tmp/next --layers 4 --shape qwen3_next           # 5.5 GB

The sizes are in shapes.py. One shard per layer, written one after the other. The tokenizer is the
demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from shapes import SHAPES, STACKED, experts_of, shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Tensors are windows of one pool of random values: generating all would take longer than writing.
POOL = 64 << 20


def shapes_of(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name on disk → shape, with a layer's experts as published folders hold them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    # With the buffers that checkpoints hold.
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if values["model_type"] in STACKED:
        return found
    hidden, intermediate = values["hidden_size"], values["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, whole in found.items():
        prefix, expert_part, _ = name.partition(".experts.")
        if not expert_part:
            shapes[name] = whole
            continue
        for expert in range(experts_of(values)):
            key = f"{prefix}.experts.{expert}"
            shapes |= {f"{key}.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
            shapes[f"{key}.down_proj.weight"] = (hidden, intermediate)
    return shapes


def shards_of(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yields the names of each shard: tensors outside the layers, then layer after layer."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        groups.setdefault(words[2] if words[1] == "layers" else "", []).append(name)
    yield from groups.values()


def make_model(folder: Path, name: str, layers: int, experts: int | None = None) -> None:
    """Writes a checkpoint of a shape and the demo's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples/demo/model" / file, folder)
    values = shape(name, layers, experts)
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    write(folder, shapes_of(values), values["model_type"])


def vector_value(name: str, kind: str) -> float:
    """Returns what all elements of a vector are."""
    # Gemma 4 multiplies scores by 1 instead of head_dim ** -0.5 and leaves it to the trained norms.
    # With ones there, scores have a standard deviation of 16: each head sees one position, and
    # rounding decides which (logits of two equal paths differ by 0.8).
    return 0.0625 if kind == "gemma4_text" and name.endswith("q_norm.weight") else 1.0


def write(folder: Path, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    """Writes weights; ``kind``: the config's ``model_type``."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards_of(shapes)):
        tensors = {}
        for name in names:
            sizes = torch.Size(shapes[name])
            if len(sizes) < 2:
                tensors[name] = torch.full(sizes, vector_value(name, kind), dtype=torch.bfloat16)
                continue
            values = pool.repeat(sizes.numel() // POOL + 2)
            start = int(torch.randint(POOL, (1,), generator=generator))
            tensors[name] = (values[start : start + sizes.numel()] * sizes[-1] ** -0.5).view(sizes)
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in tensors.values())
        print(f"{file}: {len(names)} tensors, {total / 1e9:.2f} GB so far", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A random checkpoint of a published shape.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=27, help="with the dense one (1.1 GB each)")
    parser.add_argument("--shape", choices=SHAPES, default="v2lite")
    parser.add_argument("--experts", type=int, help="of a layer; default: as the shape says")
    args = parser.parse_args(argv)
    make_model(args.folder, args.shape, args.layers, args.experts)


if __name__ == "__main__":
    main()
