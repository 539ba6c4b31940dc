"""``python -m ktrt.chat config.yaml``: a conversation in the terminal."""

import argparse
import functools
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ktrt.chat.arguments import parse_arguments, reads_stdin
from ktrt.chat.commands import Leave, completions, describe, is_command, run_line
from ktrt.chat.conversation import (
    Conversation,
    ConversationFile,
    decode_text,
    exists,
    expanded,
    last_conversation,
    read_conversation,
    read_text,
    state_directory,
)
from ktrt.chat.dialog import MAX_FILE_BYTES, Keeping, Talk
from ktrt.chat.terminal import Terminal
from ktrt.command_line import (
    EXIT_NEGATIVE,
    describe_failure,
    guarded,
    set_environment,
)
from ktrt.config import Config, load_config
from ktrt.errors import KtrtError
from ktrt.utils.signals import Terminated, terminations

if TYPE_CHECKING:
    from ktrt.chat.partner import Partner
    from ktrt.session import Session

_log = logging.getLogger("ktrt.chat")

_WELCOME = "Type a message; /help lists the commands, `exit` leaves, Ctrl-C stops an answer."


def main(
    argv: Sequence[str] | None = None,
    *,
    open_session: Callable[[Config], "Session"] | None = None,
    terminal: Terminal | None = None,
) -> int:
    """Runs a chat and returns the exit code; see ktrt.command_line.

    ``open_session`` and ``terminal`` replace ``ktrt.api.open_session`` and the real terminal.
    """
    terminal = terminal or Terminal.standard()
    args = parse_arguments(argv)

    def body() -> int:
        terminal.require(stdin=reads_stdin(args))
        config = load_config(args.config, args.overrides) if args.url is None else None
        if args.plan and config is not None:
            return _show_plan(config, terminal, as_json=args.json)
        if args.json or args.prompt is not None:
            terminal.use_script()
        start = _prepare(args, terminal)
        with terminal.attended(is_command):
            if config is None:
                return _run(_talk_with_server(terminal, start, args), start, args)
            with (open_session or _open_session)(config) as session:
                return _run(_talk(session, config, terminal, start, args), start, args)

    try:
        with _logging_to(terminal.stderr, _log_level(args), block=args.debug), terminations():
            return guarded(body, terminal.error, debug=args.debug)
    except Terminated as end:
        return end.exit_code
    finally:
        terminal.finish()


def _show_plan(config: Config, terminal: Terminal, *, as_json: bool) -> int:
    """Prints the memory plan; 0 if the model fits, else 1."""
    set_environment(quiet=not _log.isEnabledFor(logging.DEBUG))
    from ktrt.loading.plan import plan_memory

    plan = plan_memory(config.model, config.adapter, config.experts)
    terminal.note(json.dumps(plan.as_dict(), indent=1) if as_json else plan.table())
    return 0 if plan.fitting_context() else EXIT_NEGATIVE


def _open_session(config: Config) -> "Session":
    set_environment(quiet=not _log.isEnabledFor(logging.DEBUG))
    # Imports and loading make a million objects that stay: looking for garbage among them took 0.5
    # of 4 seconds, and would take as long in every later collection.
    gc.disable()
    try:
        from ktrt.api import open_session

        return open_session(config)
    finally:
        gc.freeze()
        gc.enable()


@dataclass
class _Start:
    """The state that a chat starts with; it is read before the model is loaded."""

    conversation: Conversation
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    save: ConversationFile | None = None


def _prepare(args: argparse.Namespace, terminal: Terminal) -> _Start:
    start = _Start(Conversation())
    resumed: Path | None = None
    if args.resume is not None:
        resumed = expanded(args.resume) if args.resume else last_conversation()
        start.conversation = read_conversation(resumed)
        start.notes.append(f"Resumed {resumed}: {describe(start.conversation)}")
        if start.conversation.unanswered is not None:
            start.notes.append("/retry sends the message without an answer again.")
    if args.system is not None:
        start.conversation.system = args.system or None
    for name in args.file:
        if name == "-":
            start.files["standard input"] = decode_text(terminal.read_all(), "standard input")
        else:
            start.files[name] = read_text(Path(name), MAX_FILE_BYTES)
    if start.files:
        start.notes.append(f"Files for the next message: {', '.join(start.files)}")
    if args.save is not None:
        path = expanded(args.save)
        if exists(path) and not _same(path, resumed) and not read_conversation(path).empty:
            raise KtrtError(
                f"--save: {path} holds another conversation; go on with it by --resume {path}, or "
                "name a new file"
            )
        if not path.absolute().parent.is_dir():
            raise KtrtError(f"--save: there is no directory {path.parent}")
        start.save = ConversationFile(path)
    return start


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def _full(path: Path) -> str:
    return str(path.resolve())


def _talk(
    session: "Session",
    config: Config,
    terminal: Terminal,
    start: _Start,
    args: argparse.Namespace,
) -> Talk:
    folders = ", ".join(_full(folder) for folder in config.adapter.folders.values())
    keeping = Keeping(_full(config.model.model_name_or_path), folders, save=start.save)
    return _new_talk(
        session,
        terminal,
        start,
        args,
        keeping=keeping,
        limit=_limit(session) if terminal.interactive else lambda: None,
    )


def _talk_with_server(terminal: Terminal, start: _Start, args: argparse.Namespace) -> Talk:
    from ktrt.chat.remote.connect import open_server

    session = open_server(args)
    keeping = Keeping(session.name, save=start.save)
    return _new_talk(session, terminal, start, args, keeping=keeping, server=session)


def _new_talk(
    session: "Partner",
    terminal: Terminal,
    start: _Start,
    args: argparse.Namespace,
    *,
    keeping: Keeping,
    **options: Any,
) -> Talk:
    before = start.conversation
    if before.model and (before.model, before.adapter) != (keeping.model, keeping.adapter):
        start.notes.append(f"It was held with {before.model} {before.adapter or '(no adapter)'}.")
    talk = Talk(
        session,
        terminal,
        before,
        keeping=keeping,
        stream=not args.no_stream,
        as_json=args.json,
        **options,
    )
    talk.attachments = start.files
    return talk


def _limit(session: "Session") -> Callable[[], float | None]:
    """Returns a function for the limit in tokens per second that the memory's bandwidth sets; the
    first call measures it."""

    @functools.cache
    def bandwidth() -> float | None:
        from ktrt.engine.probes import read_bandwidth

        try:
            return read_bandwidth(passes=3)
        except MemoryError:
            return None

    def limit() -> float | None:
        size = session.bytes_per_token
        rate = bandwidth() if size else None
        return rate / size if size and rate else None

    return limit


def _run(talk: Talk, start: _Start, args: argparse.Namespace) -> int:
    for note in start.notes:
        if talk.terminal.interactive:
            talk.terminal.note(note)
        else:
            _log.info("%s", note)
    if args.prompt is not None:
        talk.ask(args.prompt)
        return 0
    terminal = talk.terminal
    if not terminal.interactive:
        return _converse(talk, debug=args.debug)
    terminal.use_editor(_history_file(), lambda line: completions(talk, line))
    talk.start_autosave()
    terminal.note(_WELCOME)
    with terminal.undisturbed():
        return _converse(talk, debug=args.debug)


def _history_file() -> Path | None:
    try:
        return state_directory() / "history"
    except KtrtError:
        return None  # reported once, when the conversation cannot be saved either


def _converse(talk: Talk, *, debug: bool) -> int:
    terminal = talk.terminal
    while (line := terminal.read()) is not None:
        try:
            run_line(talk, line)
        except Leave:
            break
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
        except Exception as error:
            if not terminal.interactive:
                raise
            _report(terminal, error, debug=debug)
    return 0


def _report(terminal: Terminal, error: Exception, *, debug: bool) -> None:
    terminal.error(describe_failure(error, debug=debug), trace=error if debug else None)


def _log_level(args: argparse.Namespace) -> int:
    if args.verbose:
        return logging.DEBUG
    return logging.WARNING if args.quiet else logging.INFO


@contextmanager
def _logging_to(stream: TextIO, level: int, *, block: bool = False) -> Iterator[None]:
    """Shows ktrt's log lines on ``stream``: INFO as they are, others with their level. ``block``:
    the DEBUG block of the model's structure is complete, unless ``level`` hides it."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter())
    logger, structure = logging.getLogger("ktrt"), logging.getLogger("ktrt.debug")
    before = logger.level, structure.level
    logger.setLevel(level)
    if block and level <= logging.INFO:
        structure.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        structure.setLevel(before[1])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname}: {text}"


if __name__ == "__main__":
    sys.exit(main())
