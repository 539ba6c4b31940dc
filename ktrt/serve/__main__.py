"""``ktrt serve CONFIG``: serves a model and its adapters over HTTP."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

from ktrt.command_line import (
    EXIT_INTERRUPTED,
    NO_CONFIG,
    new_parser,
    parse,
    run_command,
    set_environment,
)
from ktrt.config import Config, load_config
from ktrt.errors import ConfigError
from ktrt.serve.settings import ServeSettings, add_options, read_settings, settled
from ktrt.utils.signals import Terminated, terminations

_log = logging.getLogger("ktrt.serve")

# After a second SIGTERM: requests were cut off. After one alone the end is regular, and 0.
EXIT_TERMINATED = 143
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server and returns the exit code; see ktrt.command_line."""
    parser = new_parser(
        "serve",
        "Serve a model and its adapters over HTTP: OpenAI's, Anthropic's and vLLM's APIs, and a "
        "page to chat in.",
    )
    add_options(parser)
    args = parse(parser, argv)
    if args.config is None:
        parser.error(NO_CONFIG)
    try:
        with terminations():
            return run_command(lambda: _serve(args), args, level=logging.INFO)
    except Terminated as end:
        return end.exit_code


def _serve(args: argparse.Namespace) -> int:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the server needs {', '.join(missing)}: pip install '.[serve]' in ktrt's source folder"
        )
    config, settings = _settled(args)
    set_environment()
    # A warning for each client that speaks no HTTP would fill the log.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    from ktrt.api import open_session
    from ktrt.serve.access import access_log
    from ktrt.serve.app import create_app
    from ktrt.serve.uvicorn_server import HttpServer, allow_connections, bind

    allow_connections(settings.max_connections)
    with bind(settings) as listener, open_session(config) as session:
        app = create_app(session, settings)
        app.state.server.memory_limit.measure()  # while nobody waits
        server = HttpServer(app, settings)
        with access_log() if settings.access_log else nullcontext():
            server.serve_on(listener)
        _log.info("Closing the model")
    if signal.SIGINT in server.signalled:
        return EXIT_INTERRUPTED
    return EXIT_TERMINATED if len(server.signalled) > 1 else 0


def _settled(args: argparse.Namespace) -> tuple[Config, ServeSettings]:
    """Returns the configuration and the settings, which share the number of answers at once."""
    settings = read_settings(args, os.environ)
    config = load_config(args.config, args.overrides)
    if "max_concurrent" not in args and any(
        each.startswith("max_num_seqs=") for each in args.overrides
    ):
        settings = replace(settings, max_concurrent=None)  # the environment's
    return settled(config, settings)


if __name__ == "__main__":
    sys.exit(main())
