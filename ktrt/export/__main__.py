"""``python -m ktrt.export config.yaml --out DIR``: writes base and adapter as one model, or the
adapter in another layout."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt.command_line import NO_CONFIG, new_parser, parse, run_command, set_environment
from ktrt.config import load_config
from ktrt.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ktrt.adapter import AdapterPlan
    from ktrt.config import Config
    from ktrt.loading.plan import BaseCheckpoint

# Defined here since arguments are parsed before torch is imported.
LAYOUTS = ("a", "b", "c", "f")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 after a failure, 130 after Ctrl-C."""
    args = _parse_arguments(argv)

    def body() -> int:
        set_environment()
        summary = export(load_config(args.config, args.overrides), args)
        print(json.dumps(summary, indent=1) if args.json else _in_words(summary))
        return 0

    level = logging.WARNING if args.quiet else logging.INFO
    return run_command(body, args, level=level, interrupted="interrupted; nothing was written")


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "export", "Writes a model with its adapter merged, or the adapter in another layout."
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; a new one")
    parser.add_argument(
        "--format",
        choices=("hf", "kt"),
        help="hf (default): a Hugging Face checkpoint; kt: experts packed for kt_weight_path",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="with hf: instead of the source's dtype")
    parser.add_argument(
        "--adapter-layout",
        choices=LAYOUTS,
        help="write the adapter alone: a: PEFT, each expert; b: PEFT target_parameters; "
        "c: KTransformers fused; f: like a, with the model's names (sglang)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="show warnings only")
    args = parse(parser, argv)
    if args.config is None:
        parser.error(NO_CONFIG)
    if args.adapter_layout and (args.format or args.dtype):
        parser.error("--adapter-layout writes the adapter alone: no --format, no --dtype")
    if args.format == "kt" and args.dtype:
        parser.error("--dtype is for --format hf; the experts' format is kt_backend's")
    return args


def export(config: Config, args: argparse.Namespace) -> dict[str, object]:
    """Runs the export; returns its summary, for JSON.

    Raises ``ConfigError``, ``CheckpointError`` and ``AdapterError``.
    """
    from ktrt.adapter.write.adapter import write_adapter
    from ktrt.export.checkpoint import merge_checkpoint
    from ktrt.export.packed import merge_packed
    from ktrt.export.side_files import copy_words
    from ktrt.loading.plan import base_of_adapters, open_adapter, open_base

    base = open_base(config.model)
    adapter_base = base_of_adapters(base)
    plan = open_adapter(config.adapter, adapter_base)
    if args.adapter_layout:
        if plan is None:
            raise ConfigError("--adapter-layout: the configuration names no adapter_name_or_path")
        written = write_adapter(plan, adapter_base, args.out, args.adapter_layout)
        copy_words(plan.files.folder, args.out)
        return asdict(written)
    words = _words(config, base, plan)
    if args.format == "kt":
        return asdict(merge_packed(base, plan, args.out, config.experts, words))
    return asdict(merge_checkpoint(base, plan, args.out, args.dtype, words))


def _words(config: Config, base: BaseCheckpoint, plan: AdapterPlan | None) -> Path | None:
    """Checks the tokenizers; returns the adapter's folder if its tokenizer or chat template differs
    from the base's. Raises ``ConfigError`` for tokens that are in no tokenizer file."""
    from ktrt.adapter import words_of
    from ktrt.prompt.tokenizer.files import TokenizerFiles
    from ktrt.prompt.tokenizer.words import load_words

    configured = (*config.model.add_tokens, *config.model.add_special_tokens)
    folders = config.adapter.folders
    if not configured and not any(TokenizerFiles(each, AdapterError) for each in folders.values()):
        return None
    plain = replace(config.model, add_tokens=(), add_special_tokens=())
    words = load_words(plain, folders, own_template=True)
    rows = words_of(base.built.model)
    words.check_rows(max(rows, plan.vocabulary or 0) if plan else rows)
    if missing := sorted(set(configured) - set(words.tokenizer.get_vocab())):
        raise ConfigError(
            f"add_tokens, add_special_tokens: {', '.join(missing[:5])} are not in the tokenizer "
            "files of model or adapter, which export copies. Put the tokenizer of the training "
            "into the adapter's folder (LLaMA-Factory saves it there)."
        )
    return words.changed


def _in_words(summary: dict[str, object]) -> str:
    out = summary["out"]
    if "layout" in summary:
        return (
            f"{out}: the adapter in layout {summary['layout']}, {summary['tensors']} tensors from "
            f"{summary['source_tensors']}"
        )
    text = (
        f"{out}: {summary['tensors']} tensors in {summary['files']} files, "
        f"{_gigabytes(summary['bytes'])}, in {summary['seconds']:.1f} s; {summary['merged']} "
        f"changed by the adapter's {summary['adapter_tensors']}"
    )
    if summary["quantized"]:
        text += f"; {summary['quantized']} matrices stay quantised as they were"
    if summary["format"] == "kt":
        from ktrt.export.packed import EXPERTS_FOLDER

        text += (
            "\nTo chat with it, without adapter:\n"
            f"  model_name_or_path: {out}\n  kt_weight_path: {out}/{EXPERTS_FOLDER}"
        )
    return text


def _gigabytes(size: object) -> str:
    assert isinstance(size, int)
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
