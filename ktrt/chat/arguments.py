"""The chat's command line."""

import argparse
from collections.abc import Sequence

from ktrt.command_line import NO_CONFIG, new_parser, parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; a wrong one exits with code 2 and one line."""
    parser = _parser()
    args = parse(parser, argv)
    if args.config is None and args.url is None:
        parser.error(f"{NO_CONFIG}; or --url, a server to talk with")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("argument -p/--prompt: expected a message that is not empty")
    if args.prompt is None and "-" in args.file:
        parser.error("argument --file: `-` is standard input, which holds the messages without -p")
    _check_server(args, parser)
    return args


def reads_stdin(args: argparse.Namespace) -> bool:
    """Whether the chat reads standard input."""
    return "-" in args.file or (args.prompt is None and not args.plan)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "chat",
        "Chat with a Mixture-of-Experts model whose routed experts run on the CPU, or with a "
        "server.",
        "Piped input works too: every line is one message or command, answers go to "
        "standard output.",
    )
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and leave")
    parser.add_argument(
        "--file", action="append", default=[], metavar="PATH",
        help="a text file that goes with the first message (`-`, with -p: standard input)",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="continue a saved conversation; without FILE, the last one held in a terminal",
    )  # fmt: skip
    parser.add_argument("--save", metavar="FILE", help="save the conversation after every turn")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per answer; with --plan: the plan"
    )
    parser.add_argument("--no-stream", action="store_true", help="print answers when complete")
    parser.add_argument(
        "--plan", action="store_true", help="print what memory the model will take, and leave"
    )
    server = parser.add_argument_group("a server in place of CONFIG")
    server.add_argument(
        "--url", metavar="URL",
        help="talk with `ktrt serve` or another OpenAI server, as http://127.0.0.1:8000",
    )  # fmt: skip
    server.add_argument("--model", metavar="NAME", help="a model or adapter that the server lists")
    server.add_argument(
        "--api-key", metavar="KEY",
        help="the server's key; better in OPENAI_API_KEY or API_KEY, which other users cannot see",
    )  # fmt: skip
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="show speeds and details")
    loudness.add_argument("-q", "--quiet", action="store_true", help="show warnings only")
    return parser


def _check_server(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses arguments that do not go with, or without, ``--url``."""
    if args.url is None:
        for name in ("model", "api_key"):
            if getattr(args, name) is not None:
                parser.error(f"argument --{name.replace('_', '-')}: works with --url only")
        return
    if args.plan:
        parser.error("argument --plan: the model is in the server's memory, not here")
    if args.config:
        parser.error(
            f"expected key=value with --url, found {args.config}: the server has loaded its model "
            "and adapters; --model NAME chooses one of them"
        )
