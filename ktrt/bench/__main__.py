"""``python -m ktrt.bench config.yaml``: speeds of a configuration, and their limits."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktrt import __version__
from ktrt.bench.report import markdown, plot, require_matplotlib
from ktrt.command_line import NO_CONFIG, new_parser, parse, run_command, set_environment
from ktrt.config import load_config
from ktrt.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ktrt.config import Config

# Length of the prompt before the decoded tokens.
DECODE_PROMPT = 32
Report = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The measurements: ``prefill`` lengths, ``decode`` tokens, ``rounds`` of each."""

    prefill: tuple[int, ...] = (32, 512, 2048)
    decode: int = 128
    rounds: int = 5
    notes: tuple[str, ...] = field(default=(), compare=False)

    def within(self, context: int) -> Sizes:
        """Returns sizes that fit into ``context`` tokens, with a note for each that was reduced."""
        notes, prefill = list(self.notes), []
        for size in self.prefill:
            # The prompt is followed by one token.
            fitting = size if size < context else 1 << (context - 1).bit_length() - 1
            if fitting >= context:
                fitting //= 2
            if fitting != size:
                notes.append(
                    f"prefill {size} does not fit the model's context of {context} tokens: "
                    f"{fitting} instead"
                )
            if fitting not in prefill:
                prefill.append(fitting)
        decode = min(self.decode, context - DECODE_PROMPT - 1)
        if decode < 1:
            raise ConfigError(f"the model's context holds {context} tokens: too few to measure")
        if decode < self.decode:
            notes.append(
                f"decode {self.decode} does not fit the model's context of {context} tokens: "
                f"{decode} instead"
            )
        return Sizes(tuple(prefill), decode, self.rounds, tuple(notes))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns 0, 2 on failure, 130 after Ctrl-C."""
    args = _parse_arguments(argv)

    def body() -> int:
        set_environment()
        if args.plot:
            require_matplotlib()
        report = run(load_config(args.config, args.overrides), args.sizes)
        print(json.dumps(report, indent=1) if args.json else markdown(report))
        if args.plot:
            plot(report, args.plot)
        return 0

    return run_command(body, args, level=logging.INFO if args.verbose else logging.WARNING)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(
        "bench", "Measures a configuration: prefill, decoding, first token, memory, limits."
    )
    parser.add_argument("--json", action="store_true", help="all figures, as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="a chart as well (needs matplotlib)")
    defaults = Sizes()
    listed = ",".join(map(str, defaults.prefill))
    parser.add_argument("--prefill", default=listed, help=f"prompt lengths, default {listed}")
    parser.add_argument("--decode", type=int, default=defaults.decode, help="tokens, default 128")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="default 5")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the load's log lines")
    args = parse(parser, argv)
    if args.config is None:
        parser.error(NO_CONFIG)
    try:
        lengths = tuple(int(each) for each in args.prefill.split(","))
    except ValueError:
        parser.error(f"--prefill: expected numbers with commas, found {args.prefill}")
    if min(*lengths, args.decode, args.rounds) < 1:
        parser.error("--prefill, --decode and --rounds: expected at least 1")
    args.sizes = Sizes(lengths, args.decode, args.rounds)
    return args


def run(config: Config, sizes: Sizes) -> Report:
    """Loads the model, measures it, and returns all figures in basic types; times in seconds.
    ``KtrtError``: the model cannot be loaded."""
    from ktrt.api import open_session
    from ktrt.bench.measure import Bench
    from ktrt.loading.plan import open_base

    specs = open_base(config.model, config.experts.kt_weight_path).experts.specs
    with open_session(config) as session:
        bench = Bench(session, config.experts, specs)
        sizes = sizes.within(bench.context)
        for note in sizes.notes:
            print(note, file=sys.stderr, flush=True)
        rows = bench.phases(sizes.prefill, sizes.decode, DECODE_PROMPT, sizes.rounds)
        return {
            "version": __version__,
            "model": str(config.model.model_name_or_path),
            "adapter": str(config.adapter.adapter_name_or_path or ""),
            "notes": list(sizes.notes),
            "rounds": sizes.rounds,
            **bench.settings(),
            "rows": rows,
            "first_token": bench.first_token(sizes.rounds),
            "memory": bench.memory(),
        }


if __name__ == "__main__":
    sys.exit(main())
