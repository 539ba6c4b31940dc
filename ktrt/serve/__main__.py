"""``ktrt serve CONFIG``: serves a model and its adapters over HTTP."""

import logging
import sys
from collections.abc import Sequence

from ktrt.command_line import NO_CONFIG, new_parser, parse, run_command, set_environment
from ktrt.config import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server and returns the exit code; see ktrt.command_line."""
    parser = new_parser("serve", "Serve a model and its adapters over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="the port to listen on")
    args = parse(parser, argv)
    if args.config is None:
        parser.error(NO_CONFIG)

    def body() -> int:
        set_environment()
        config = load_config(args.config, args.overrides)
        import uvicorn

        from ktrt.api import open_session
        from ktrt.serve.app import create_app
        from ktrt.serve.settings import ServeSettings

        with open_session(config) as session:
            settings = ServeSettings(
                host=args.host, port=args.port, model_name=config.model.model_name_or_path.name
            )
            uvicorn.run(create_app(session, settings), host=args.host, port=args.port)
        return 0

    return run_command(body, args, level=logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
