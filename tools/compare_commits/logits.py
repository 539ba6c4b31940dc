"""Writes the demo model's logits as one commit's ktrt computes them; runs in its own process.

    KTRT_ISA=avx2 PYTHONPATH=SITE python logits.py --site SITE --demo FOLDER --out FILE.npz

Uses only what every commit has: ``ktrt.load``, ``session.model`` and ``session.adapters``. Keys of
the file are "format/adapter/forward", values float32 logits [tokens, vocabulary].
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ktrt
from ktrt import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

ISAS = ["portable", "avx2", "avx512", "amx"]
FORMATS: dict[str, dict[str, object]] = {
    "BF16": {"kt_backend": "AMXBF16"},
    "INT8": {"kt_backend": "AMXInt8"},
    "INT4": {"kt_backend": "AMXInt4"},
    "INT8, linears too": {"kt_backend": "AMXInt8", "quantization_bit": 8},
}
ADAPTERS = ("adapter_a", "adapter_b")
# The demo's adapters are one function in two layouts: a sum of 0.5 and 1 is one and a half of it.
SUM = {"adapter_a": 0.5, "adapter_b": 1.0}
# 16 experts, 4 for each token: about 50 rows for each expert in one forward, more than a tile.
PROMPT = 200
CHUNKS = (0, 1, 6, 38, 133, PROMPT)
STEPS = 8


def forwards(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the logits of a prompt at once, in chunks, and of steps of one token after it."""
    vocabulary = model.config.vocab_size
    ids = torch.tensor([[(17 * i * i + 29 * i + 7) % vocabulary for i in range(PROMPT + STEPS)]])
    with torch.inference_mode():
        yield "prompt", array(model(input_ids=ids[:, :PROMPT]).logits)
        cache = None
        logits = []
        for begin, end in [*pairwise(CHUNKS), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
            out = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(array(out.logits))
    joined = np.concatenate(logits)
    yield "chunks", joined[:PROMPT]
    yield "steps", joined[PROMPT:]


def array(logits: torch.Tensor) -> np.ndarray:
    """Logits of all tokens in float32, which holds BF16 exactly."""
    return logits.flatten(0, 1).float().numpy()


def compute(demo: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    common = {"model_name_or_path": str(demo / "model"), "template": "deepseek"}
    folders = {name: str(demo / name) for name in ADAPTERS}
    for label, options in FORMATS.items():
        with ktrt.load({**common, **options}) as session:
            found |= {f"{label}/base/{key}": each for key, each in forwards(session.model)}
        with ktrt.load({**common, **options}, adapters=folders) as session:
            for name in ADAPTERS:
                session.adapters.activate(name)
                found |= {f"{label}/{name}/{key}": each for key, each in forwards(session.model)}
            session.adapters.activate(SUM)
            found |= {f"{label}/sum/{key}": each for key, each in forwards(session.model)}
    check(found)
    return found


def check(found: dict[str, np.ndarray]) -> None:
    """Equal bits mean something only if numbers are finite and adapters act."""
    for key, logits in found.items():
        label, name, forward = key.split("/")
        if not np.isfinite(logits).all():
            raise SystemExit(f"{key}: some logits are not finite")
        if name != "base" and np.array_equal(logits, found[f"{label}/base/{forward}"]):
            raise SystemExit(f"{key}: the logits equal the base's; the adapter does not act")


def check_origin(site: Path) -> None:
    """Stops if a module of ktrt came from another installation."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "ktrt" and file and not Path(file).is_relative_to(site):
            raise SystemExit(f"{name} was imported from {file}, expected it in {site}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--isas", action="store_true", help="print this machine's, and stop")
    args = parser.parse_args()
    if args.isas:
        print(*ISAS[: ISAS.index(_core.detected_isa()) + 1])
    else:
        np.savez(args.out, **compute(args.demo))  # type: ignore[arg-type]
    check_origin(args.site)


if __name__ == "__main__":
    main()
