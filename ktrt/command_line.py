"""Arguments, environment, failures and exit codes of all verbs.

Exit codes mean the same in every verb:

0    done, and nothing wrong was found;
1    done, and something wrong was found: ``audit --verify`` (a layer does not match the adapter's
     files), ``doctor`` (a setting to fix), ``chat --plan`` (the model does not fit into memory);
2    not done, or undecided: an argument, a file, the machine, a defect of ktrt;
129  SIGHUP in the chat: the terminal has gone;
130  Ctrl-C;
141  the reader of the output has gone (a closed pipe; nothing is printed);
143  SIGTERM in the chat; a second SIGTERM to the server, which a single one ends with 0.

Code 2 comes with one line on standard error, with ``--debug`` also with the traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ktrt.config import as_overrides, names_key
from ktrt.errors import ConfigError, EngineError, KtrtError
from ktrt.utils.program import program
from ktrt.utils.streams import abandon, escape_unknown, occupy_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

EXIT_NEGATIVE = 1
EXIT_FAILURE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

NO_CONFIG = (
    "expected a configuration: a YAML file, a model's folder, or model_name_or_path=DIR and other "
    "keys"
)
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def set_environment(*, quiet: bool = True) -> None:
    """Sets the environment for torch and transformers, which read it when they are imported.
    ``quiet`` hides their warnings."""
    # OpenMP's threads spin after every operation of torch, on cores that the engine's threads need:
    # on 2 busy cores the demo made 3 tokens/s with spinning threads, 70 with sleeping ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Models are local, and the log is ours.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")


def new_parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of a verb with the arguments that all verbs have."""
    from ktrt import __version__

    parser = argparse.ArgumentParser(prog=program(name), description=description, epilog=epilog)
    parser.add_argument(
        "config", nargs="?", help="YAML file with LLaMA-Factory's keys, or a model's folder"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replaces a value of the file (--key value does too); adapter_name_or_path= takes "
        "the base model alone",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("--version", action="version", version=f"ktrt {__version__}")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; ``--key value`` of a configuration's keys are overrides.

    ``config`` becomes a path, an empty mapping for overrides without a file, or None. A wrong
    argument exits with code 2 and one line, as in argparse.
    """
    occupy_descriptors()
    escape_unknown(sys.stdout)  # --help has such characters
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        if any(0xD800 <= ord(character) <= 0xDFFF for character in word):
            raw = word.encode("utf-8", "surrogateescape")
            parser.error(f"the argument {raw!r} is not UTF-8 text")
    options = {
        option: action.nargs is None
        for action in parser._actions
        for option in action.option_strings
    }
    try:
        words, overrides = as_overrides(words, options)
    except ConfigError as error:
        parser.error(str(error))
    args = parser.parse_intermixed_args(_with_bare_options(parser, words))
    given = [each for each in (args.config, *args.overrides, *overrides) if each is not None]
    sources = [each for each in given if _is_source(each) and each not in overrides]
    args.config = sources[0] if sources else {} if given else None
    args.overrides = [each for each in given if each is not args.config]
    return args


def _with_bare_options(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Marks options without a value: argparse would take the configuration or the override that
    follows an option with an optional value as the value."""
    bare = {
        option
        for action in parser._actions
        if action.nargs == "?"
        for option in action.option_strings
    }
    following = [*words, ""][1:]
    return [
        f"{word}=" if word in bare and (after.endswith((".yaml", ".yml")) or "=" in after) else word
        for word, after in zip(words, following, strict=True)
    ]


def _is_source(argument: str) -> bool:
    if "=" not in argument:
        return True
    if argument.endswith(_CONFIG_SUFFIXES) and not names_key(argument):
        return True
    try:
        return Path(argument).exists()
    except OSError:
        return False


def run_command(
    body: Callable[[], int], args: argparse.Namespace, *, level: int, interrupted: str = ""
) -> int:
    """Runs ``body``; returns its exit code, or reports its failure on standard error and returns
    the failure's code (see ``guarded``). ``level``: of ktrt's log lines, also on standard error."""
    if sys.stdout is None:
        _report("standard output is closed: there is nowhere to write to", None)
        return EXIT_FAILURE
    escape_unknown(sys.stdout)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger = logging.getLogger("ktrt")
    before = logger.level
    logger.setLevel(level)
    try:
        return guarded(body, _report, debug=args.debug, interrupted=interrupted)
    finally:
        logger.setLevel(before)


def guarded(
    body: Callable[[], int],
    report: Callable[[str, BaseException | None], None],
    *,
    debug: bool,
    interrupted: str = "",
) -> int:
    """Runs ``body``; returns its exit code, or the code of the exception that ended it.

    ``report`` gets the message and, with ``debug``, the exception for a traceback.
    ``interrupted``: the message after Ctrl-C.
    """
    pressed: list[int] = []
    try:
        with _noting_ctrl_c(pressed):
            code = body()
        if sys.stdout is not None:
            # A full disk is found here, and not by the interpreter as it ends.
            sys.stdout.flush()
    except SystemExit:
        raise
    except BrokenPipeError:
        abandon(sys.stdout)
        return EXIT_NO_READER
    except KeyboardInterrupt:
        report(interrupted or "interrupted", None)
        return EXIT_INTERRUPTED
    except BaseException as error:  # noqa: BLE001 - panics of Rust's libraries are no Exception
        if pressed:
            report(interrupted or "interrupted", error if debug else None)
            return EXIT_INTERRUPTED
        unwritable = _drop_output_that_cannot_be_written() if isinstance(error, OSError) else None
        reason = unwritable or describe_failure(error, debug=debug)
        report(reason, error if debug else None)
        _drop_output_that_cannot_be_written()
        return EXIT_FAILURE
    return code


@contextmanager
def _noting_ctrl_c(pressed: list[int]) -> Iterator[None]:
    """Adds to ``pressed`` each Ctrl-C that raises ``KeyboardInterrupt`` within the block.

    Lazy imports of libraries turn it into other exceptions: 2 of 8 Ctrl-Cs in a chat's first 3
    seconds ended in transformers' "Could not import module".
    """

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def describe_failure(error: BaseException, *, debug: bool) -> str:
    """Returns the message of a ``KtrtError``; for other exceptions, and the engine's, one line."""
    if isinstance(error, KtrtError) and not isinstance(error, EngineError):
        return str(error)
    words = " ".join(str(error).split()) or "no message"
    hint = "" if debug else " (--debug shows where)"
    if isinstance(error, EngineError):
        return f"{words}{hint}"
    if isinstance(error, MemoryError):
        words = "there is not enough memory" if words == "no message" else words
    return f"{type(error).__name__}: {words}{hint}"


def _drop_output_that_cannot_be_written() -> str | None:
    """Returns why standard output cannot be written (a full disk); None if it can."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        abandon(sys.stdout)
        return f"standard output cannot be written: {getattr(error, 'strerror', None) or error}"
    return None


def _report(message: str, error: BaseException | None) -> None:
    # None if standard error is closed; OSError if it cannot be written.
    if sys.stderr is None:
        return
    with suppress(OSError):
        if error is not None:
            traceback.print_exception(error)
        sys.stderr.write(f"error: {message}\n")
