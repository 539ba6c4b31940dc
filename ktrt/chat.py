"""``python -m ktrt.chat config.yaml``: a conversation in the terminal."""

import argparse
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ktrt import __version__
from ktrt.config import Config, load_config
from ktrt.errors import KtrtError
from ktrt.terminal import Terminal

if TYPE_CHECKING:
    from ktrt.session import Response, Session

_log = logging.getLogger("ktrt.chat")

_WELCOME = (
    "Type a message; `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer."
)
_EXIT_FAILURE = 2
_EXIT_INTERRUPTED = 130


def main(
    argv: Sequence[str] | None = None,
    *,
    open_session: Callable[[Config], "Session"] | None = None,
    terminal: Terminal | None = None,
) -> int:
    """Runs a chat and returns the exit code: 0, 2 after a failure, 130 after Ctrl-C while loading.

    ``open_session`` and ``terminal`` stand in for ``ktrt.api.open_session`` and the real terminal.
    """
    args = _parse_arguments(argv)
    terminal = terminal or Terminal.standard()
    with _logging_to(terminal.stderr, _log_level(args)):
        try:
            config = load_config(args.config, args.overrides)
            if args.plan:
                return _show_plan(config, terminal, as_json=args.json)
            with (open_session or _open_session)(config) as session:
                return _converse(session, terminal, debug=args.debug)
        except BrokenPipeError:
            terminal.abandon_output()
            return 0
        except KeyboardInterrupt:
            terminal.error("interrupted")
            return _EXIT_INTERRUPTED
        except Exception as error:  # noqa: BLE001 - any failure is one message
            _report(terminal, error, debug=args.debug)
            return _EXIT_FAILURE


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ktrt.chat",
        description="Chat with a Mixture-of-Experts model whose routed experts run on the CPU.",
        epilog="Piped input works too: every line is one message, answers go to standard output.",
    )
    parser.add_argument("config", help="YAML file with LLaMA-Factory's keys")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replaces a value of the file; adapter_name_or_path= chats with the base model",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what memory the model will take, and leave"
    )
    parser.add_argument("--json", action="store_true", help="with --plan: as JSON, in bytes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="show speeds and details")
    loudness.add_argument("-q", "--quiet", action="store_true", help="show warnings only")
    parser.add_argument("--version", action="version", version=f"ktrt {__version__}")
    return parser.parse_intermixed_args(argv)


def _show_plan(config: Config, terminal: Terminal, *, as_json: bool) -> int:
    """Prints the memory plan; 0 if the model fits, else 2."""
    _set_environment()
    from ktrt.prepare import plan_memory

    plan = plan_memory(config.model, config.adapter, config.experts)
    terminal.note(json.dumps(plan.as_dict(), indent=1) if as_json else plan.table())
    return 0 if plan.fitting_context() else _EXIT_FAILURE


def _open_session(config: Config) -> "Session":
    _set_environment()
    # Imports and loading make a million objects that stay: looking among them for garbage took 0.5
    # of 4 seconds, and would cost every later collection as much.
    gc.disable()
    try:
        from ktrt.api import open_session

        return open_session(config)
    finally:
        gc.freeze()
        gc.enable()


def _set_environment() -> None:
    # Before the imports that read them once. OpenMP's threads spin after every operation of torch,
    # on cores that the engine's threads need: with both on 2 busy cores the demo made 3 tokens/s,
    # with sleeping ones 70.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Models are local, and the log is ours.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not _log.isEnabledFor(logging.DEBUG):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


def _converse(session: "Session", terminal: Terminal, *, debug: bool) -> int:
    history: list[dict[str, str]] = []
    if terminal.interactive:
        terminal.note(_WELCOME)
    while (text := terminal.read()) is not None:
        text = text.strip()
        if text == "exit":
            break
        if text == "clear":
            history.clear()
            terminal.note("History has been removed.")
        elif text:
            turn = {"role": "user", "content": text}
            try:
                answer = _answer(session, terminal, [*history, turn])
            except BrokenPipeError:
                raise
            except Exception as error:
                if not terminal.interactive:
                    raise
                _report(terminal, error, debug=debug)
                continue
            if answer.strip():
                history += [turn, {"role": "assistant", "content": answer}]
    return 0


def _answer(session: "Session", terminal: Terminal, messages: list[dict[str, str]]) -> str:
    last: Response | None = None

    def pieces() -> Iterator[str]:
        nonlocal last
        for last in session.stream_responses(messages):
            yield last.text

    text = terminal.answer(pieces())
    if last is not None:
        _log.debug("%s", last.summary())
    return text


def _report(terminal: Terminal, error: Exception, *, debug: bool) -> None:
    message = str(error)
    if not isinstance(error, KtrtError):
        hint = "" if debug else " (--debug shows where)"
        message = f"{type(error).__name__}: {error}{hint}"
    terminal.error(message, trace=error if debug else None)


def _log_level(args: argparse.Namespace) -> int:
    if args.verbose:
        return logging.DEBUG
    return logging.WARNING if args.quiet else logging.INFO


@contextmanager
def _logging_to(stream: TextIO, level: int) -> Iterator[None]:
    """ktrt's own log lines on ``stream``: INFO as they are, others with their level."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("ktrt")
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname}: {text}"


if __name__ == "__main__":
    sys.exit(main())
