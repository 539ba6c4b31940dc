"""Make the whole demo from scratch: ``python -m examples.demo.build`` from the repository's root.

Steps: tokenizer → base model → adapter (layout b) → the same adapter in layout a → checks. All is
written to a temporary folder in the target and renamed when every check has passed, so a broken run
leaves the old demo alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import convert_adapter, train_tokenizer
from .train_adapter import train_adapter
from .train_base import train_base

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("demo")
FOLDER = Path(__file__).parent
PRODUCTS = ("model", "adapter_a", "adapter_b")


def sort_config(path: Path) -> None:
    """Sort the module lists of an ``adapter_config.json``.

    PEFT writes them from sets, in an order that changes with each run.
    """
    config = json.loads(path.read_text("utf-8"))
    for key in ("target_modules", "target_parameters"):
        config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def build(work: Path, reuse_base: Path | None) -> None:
    """Write all products into ``work``; the model is a copy of ``reuse_base`` if that is given."""
    model, layout_a, layout_b = (work / name for name in PRODUCTS)
    if reuse_base is None:
        train_tokenizer.save(model)
        train_base(model)
    else:
        shutil.copytree(reuse_base, model)
    log.info("joint and slot-wise ids agree in %d conversations", train_tokenizer.check(model))
    train_adapter(model, layout_b)
    (
        layout_b / "README.md"
    ).unlink()  # PEFT's empty model card; the demo's README.md is the model card
    sort_config(layout_b / convert_adapter.CONFIG)
    convert_adapter.convert(layout_b, layout_a)
    log.info(
        "layouts a and b agree in %d weights", convert_adapter.check(model, layout_a, layout_b)
    )
    for path in work.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and move the products into place; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder that receives the products"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads (a second gains nothing)"
    )
    parser.add_argument(
        "--reuse-base", type=Path, help="model folder to keep; only the adapter is trained"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    start, cpu = time.monotonic(), time.process_time()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".build-") as folder:
        work = Path(folder)
        build(work, args.reuse_base)
        for name in PRODUCTS:
            shutil.rmtree(args.out / name, ignore_errors=True)
            (work / name).rename(args.out / name)
    log.info("done in %.0f s, CPU %.0f s", time.monotonic() - start, time.process_time() - cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
