"""``python -m ktrt.audit config.yaml``: shows the changes of an adapter, verifies that they are
applied."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from ktrt.command_line import (
    EXIT_NEGATIVE,
    NO_CONFIG,
    new_parser,
    parse,
    run_command,
    set_environment,
)
from ktrt.config import load_config
from ktrt.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from rich.text import Text

    from ktrt.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 if a layer does not match its files, 2 if
    it cannot be verified or the adapter does not fit, 130 after Ctrl-C."""
    args = _parse_arguments(argv)

    def body() -> int:
        set_environment()
        config = load_config(args.config, args.overrides)
        if config.adapter.single() is None:
            raise ConfigError("the configuration has no adapter_name_or_path: nothing to audit")
        if args.verify is not None:
            return _verify(config, args.verify, as_json=args.json)
        _audit(config, as_json=args.json, norms=args.norms)
        return 0

    return run_command(body, args, level=logging.INFO if args.verbose else logging.WARNING)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "audit",
        "Shows the target of each tensor of an adapter, and the size of its change.",
        "Exit code: 0; 1 if --verify finds a difference; 2 if something cannot be read.",
    )
    parser.add_argument("--json", action="store_true", help="all rows as JSON")
    parser.add_argument(
        "--no-norms",
        dest="norms",
        action="store_false",
        help="do not read the base weights: ‖ΔW‖ without ‖W‖",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="LAYER|all",
        help="load the model and compare it with the raw files, recomputed in NumPy: the first "
        "layer with LoRA on routed experts, layer LAYER, or all",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what loading logs")
    args = parse(parser, argv)
    if args.config is None:
        parser.error(NO_CONFIG)
    if args.verify not in (None, "", "all") and not args.verify.isdecimal():
        parser.error(f"--verify {args.verify}: expected the number of a layer, or all")
    return args


def _audit(config: Config, *, as_json: bool, norms: bool) -> None:
    from ktrt.audit.changes import find_changes
    from ktrt.audit.report import report
    from ktrt.loading.plan import base_of_adapters, open_adapter, open_base

    base = open_base(config.model)
    plan = open_adapter(config.adapter, base_of_adapters(base))
    assert plan is not None
    # Nothing is loaded: the status names the component that will apply the tensor.
    inside = tuple(f"{path}." for path in plan.experts)
    for row in plan.audit.rows:
        if row.status == "no effect":
            continue
        row.status = "experts" if row.acts_on.startswith(inside) else "peft"
    changes = find_changes(base, plan, norms=norms)
    if not as_json:
        _print(report(config.model.model_name_or_path, plan.audit, changes))
        return
    _print_json(
        {
            "base": str(config.model.model_name_or_path),
            "adapter": str(plan.audit.file),
            "found": plan.audit.found,
            "applied_experts": plan.audit.applied_experts,
            "applied_peft": plan.audit.applied_peft,
            "not_applied": plan.audit.not_applied,
            "no_effect": plan.audit.no_effect,
            "notes": plan.audit.notes,
            "tensors": [asdict(row) for row in plan.audit.rows],
            "changes": [
                asdict(change) | {"ratio": change.ratio, "unchanged": change.unchanged}
                for change in changes
            ],
        }
    )


def _verify(config: Config, which: str, *, as_json: bool) -> int:
    from ktrt.audit.report import verification
    from ktrt.audit.verify.model import verify

    reports = verify(
        config.model,
        config.adapter,
        config.experts,
        int(which) if which.isdecimal() else None,
        everything=which == "all",
    )
    passed = all(report.passed for report in reports)
    if as_json:
        layers = [asdict(each) | {"passed": each.passed} for each in reports]
        _print_json({"passed": passed, "layers": layers})
    else:
        _print(verification(reports))
    return 0 if passed else EXIT_NEGATIVE


def _print(lines: Iterable[Text]) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line)


def _print_json(value: dict[str, Any]) -> None:
    _write(sys.stdout, json.dumps(value, indent=1, ensure_ascii=False))


def _write(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
