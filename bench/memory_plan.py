#!/usr/bin/env python3
"""Compares the memory plan of models in coded formats with what a process then holds.

    python bench/memory_plan.py /tmp/coded [--formats fp8,int4_g32,mxfp4] [--layers 5] [--json]

Writes a folder of DeepSeek-V2-Lite's shape with random codes for each format, as published ones:
experts in it, in FP8 also the other linear layers. A fresh process plans, loads, runs a prompt and
some tokens; first packing and writing the pack cache, then from the cache. ``peak`` is VmHWM,
``after`` the memory held in the end, both in GB and as a share of the plan.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from formats import matrix
from make_v2lite import ROOT, TOKENIZER_FILES, shapes_of, shards_of
from safetensors.torch import save_file
from shapes import shape

from ktrt.config import load_config
from ktrt.loading.model import load_model
from ktrt.loading.plan import plan_memory

FORMATS = "fp8,int4_g32,mxfp4"
PROMPT, TOKENS = 1024, 16


matrix_once = functools.cache(matrix)


def coded_tensors(name: str, sizes: tuple[int, ...], form: str) -> dict[str, torch.Tensor]:
    """Returns random numbers of one tensor as a checkpoint in ``form`` has them."""
    routed = ".experts." in name
    if len(sizes) != 2 or not (routed or (form == "fp8" and name.endswith("_proj.weight"))):
        return {name: torch.ones(sizes, dtype=torch.bfloat16) * sizes[-1] ** -0.5}
    rows, columns = sizes
    codes, scales = (each.clone() for each in matrix_once(form, rows, columns))
    stem = name.removesuffix("weight")
    if form == "fp8":
        blocks = torch.full((-(-rows // 128), -(-columns // 128)), columns**-0.5)
        return {name: codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": blocks}
    if form == "mxfp4":
        return {name: codes.view(torch.int8), f"{stem}scale": scales.view(torch.float8_e8m0fnu)}
    return {
        f"{name}_packed": codes.view(torch.int32),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(sizes, dtype=torch.int32),
    }


def write_folder(folder: Path, form: str, layers: int) -> None:
    folder.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples/demo/model" / file, folder)
    values = shape("v2lite", layers, None)
    if form == "fp8":
        values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    shapes = shapes_of(values)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards_of(shapes)):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors |= coded_tensors(name, shapes[name], form)
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def status(key: str) -> int:
    """Returns a size of /proc/self/status in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def child(folder: Path, cache: Path) -> None:
    """Prints the plan and the measured memory as JSON."""
    config = load_config({"model_name_or_path": str(folder), "ktrt_cache_dir": str(cache)})
    plan = plan_memory(config.model, config.adapter, config.experts)
    loaded = load_model(config.model, config.adapter, config.experts)
    peak = status("VmHWM")
    cache_of_keys = loaded.new_cache()
    cache_of_keys.forward([10 + i % 50 for i in range(PROMPT)])
    for token in range(TOKENS):
        cache_of_keys.forward([10 + token])
    gc.collect()
    found = {
        "plan": plan.total(PROMPT + TOKENS).ram,
        "items": {item.name: item.ram for item in plan.items},
        "load_peak": peak,
        "peak": status("VmHWM"),
        "after": status("VmRSS"),
        "anonymous": status("RssAnon"),
    }
    print(json.dumps(found))
    loaded.close()


def measure(folder: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), str(cache)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for models and caches; kept")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for form in args.formats.split(","):
        model = args.folder / form
        if not model.exists():
            write_folder(model, form, args.layers)
        shutil.rmtree(args.folder / f"{form}-cache", ignore_errors=True)
        for start in ("packing", "cached"):
            found = measure(model, args.folder / f"{form}-cache")
            rows.append({"format": form, "start": start, **found})
            if args.json:
                continue
            plan = found["plan"]
            shares = "".join(
                f"  {key.replace('_', ' ')} {found[key] / 1e9:.2f} ({found[key] / plan - 1:+.1%})"
                for key in ("load_peak", "peak", "after")
            )
            print(f"{form:10} {start:8} plan {plan / 1e9:.2f} GB{shares}", flush=True)
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
