"""The chat's commands: lines that begin with a slash."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from ktrt.chat import choices, status
from ktrt.chat.compare import compare
from ktrt.chat.conversation import Conversation, expanded
from ktrt.chat.dialog import Talk
from ktrt.config import SamplingArgs, override_sampling
from ktrt.config.check import nearest
from ktrt.config.source import parse_overrides
from ktrt.errors import KtrtError

# Words that may follow a command, for completion; "path" stands for existing files.
_PATH = "path"


@dataclass(frozen=True)
class Command:
    """``run`` gets the text after the name, stripped. ``for_people``: the command reads or writes
    files that the line names, and is refused in piped input. ``alone``: no text may follow the
    name, so that a pasted text that begins with it does nothing."""

    usage: str
    summary: str
    run: Callable[[Talk, str], None]
    for_people: bool = False
    words: Callable[[Talk], list[str]] = lambda _talk: []
    alone: bool = False


class Leave(Exception):  # noqa: N818 - no failure
    """The user leaves the chat."""


def run_line(talk: Talk, line: str) -> None:
    """Runs a command, or answers a message. ``Leave``: the line was `exit`.

    ``KtrtError``: an unknown command, or one that fails. A message raises what the session raises.
    """
    text = line.strip()
    if text in ("exit", "clear"):
        text = f"/{text}"
    if text.startswith("//"):
        talk.ask(text[1:])
    elif text.startswith("/"):
        _run_command(talk, text)
    elif text:
        talk.ask(text)


def _run_command(talk: Talk, text: str) -> None:
    name, argument = [*text[1:].split(maxsplit=1), "", ""][:2] if text[1:2].strip() else ("", "")
    command = COMMANDS.get(name)
    if command is None:
        raise KtrtError(
            f"unknown command /{name:.40}{nearest(name, COMMANDS)}; /help lists them, and "
            "a message that begins with a slash is sent with two: //"
        )
    if command.for_people and not talk.terminal.interactive:
        raise KtrtError(
            f"/{name} works in a terminal only, lines from a pipe name no files; use --save, "
            "--resume and --file"
        )
    if command.alone and argument.strip():
        raise KtrtError(
            f"/{name} stands alone, found {argument.strip()!r:.40} after it; a message that begins "
            "with a slash is sent with two: //"
        )
    command.run(talk, argument.strip())


def is_command(line: str) -> bool:
    """Returns whether ``run_line`` takes ``line`` as a command."""
    text = line.strip()
    return text in ("exit", "clear") or (text.startswith("/") and not text.startswith("//"))


def completions(talk: Talk, line: str) -> Iterator[str]:
    """Returns the completions of ``line``, the text before the cursor."""
    name, space, argument = line.partition(" ")
    if not line.startswith("/"):
        return
    if not space:
        yield from (f"/{each} " for each in COMMANDS if f"/{each}".startswith(line))
    elif (command := COMMANDS.get(name[1:])) is not None:
        words = command.words(talk)
        found = _paths(argument) if words == [_PATH] else words
        yield from (f"{name} {each}" for each in found if each.startswith(argument))


def _paths(start: str) -> list[str]:
    folder = start[: start.rfind("/") + 1]
    try:
        found = sorted(Path(folder or ".").expanduser().iterdir())
    except (OSError, RuntimeError):
        return []
    return [f"{folder}{each.name}{'/' if each.is_dir() else ''}" for each in found]


def _help(talk: Talk, _argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.summary}" for command in COMMANDS.values()]
    lines.append("Alt-Enter begins a new line, pasted lines stay one message, Tab completes,")
    lines.append("Ctrl-C stops an answer and keeps what was said (in /retry: the old answer),")
    lines.append(
        "Ctrl-D leaves, during an answer after it; // sends a leading slash. What is typed"
    )
    lines.append("during an answer waits in the next prompt; a paste and Enter is sent.")
    talk.terminal.note("\n".join(lines))


def _system(talk: Talk, argument: str) -> None:
    conversation = talk.conversation
    if not argument:
        shown = conversation.system or "as configured"
        talk.terminal.note(f"System prompt: {shown}")
        return
    conversation.system = None if argument == "default" else argument
    talk.save()
    talk.terminal.note("The system prompt holds from the next message on.")


def _retry(talk: Talk, _argument: str) -> None:
    talk.retry()


def _undo(talk: Talk, _argument: str) -> None:
    removed = talk.conversation.undo()
    if removed is None:
        raise KtrtError("/undo: there is nothing to take back")
    talk.save()
    talk.terminal.note(f"Removed: {_short(removed)}")


def _redo(talk: Talk, _argument: str) -> None:
    again = talk.conversation.redo()
    if again is None:
        raise KtrtError("/redo: nothing was taken back since the last answer")
    talk.save()
    talk.terminal.note(f"Back again: {_short(again)}")


def _clear(talk: Talk, _argument: str) -> None:
    talk.conversation.clear()
    talk.attachments.clear()
    talk.save()
    talk.terminal.note("History has been removed.")


def _save(talk: Talk, argument: str) -> None:
    path = expanded(argument or time.strftime("conversation-%Y%m%d-%H%M%S.json"))
    talk.save_as(path)
    talk.terminal.note(f"Saved {_turns(talk.conversation)} in {path}")


def _load(talk: Talk, argument: str) -> None:
    path = expanded(_required("/load", argument, "FILE"))
    talk.load(path)
    talk.terminal.note(f"Loaded {path}: {describe(talk.conversation)}")


def _set(talk: Talk, argument: str) -> None:
    name, value = _name_and_value(argument)
    settings = talk.conversation.settings
    if value:
        if value in ("default", "null"):
            override_sampling(talk.session.sampling, {name: None})
            settings.pop(name, None)
        else:
            changed = settings | parse_overrides([f"{name}={value}"], ())
            override_sampling(talk.session.sampling, changed)
            settings.update(changed)
        talk.save()
    shown = [each.name for each in fields(SamplingArgs)]
    if name:
        override_sampling(talk.session.sampling, {name: None})
        shown = [each for each in shown if each == name] or shown
    sampling = talk.sampling
    lines = []
    for each in shown:
        mark = "  (set here)" if each in settings else ""
        if talk.server is not None and not mark and each not in talk.server.settings:
            lines.append(f"{each}: the server's default")
        else:
            lines.append(f"{each} = {_value(getattr(sampling, each))}{mark}")
    talk.terminal.note("\n".join(lines))


def _name_and_value(argument: str) -> tuple[str, str]:
    """Splits ``name value`` or ``name=value``; either may be missing."""
    words = argument.replace("=", " ", 1) if "=" in argument.split(" ")[0] else argument
    name, _, value = words.partition(" ")
    return name.strip(), value.strip()


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _stats(talk: Talk, _argument: str) -> None:
    lines = []
    if talk.last is not None:
        lines.append(f"last answer       {status.status_line(talk.last, talk.limit())}")
        held = (talk.last.prompt_tokens or 0) + talk.last.generated_tokens
        lines.append(f"context           {held:,} tokens after the last answer")
    lines += talk.totals.lines()
    lines.append(f"conversation      {describe(talk.conversation)}")
    gpu = getattr(talk.session, "gpu", None)  # a server's client has none
    if gpu is not None and gpu.following is not None:
        lines.append(f"GPU's experts     {gpu.following.numbers}")
    if limit := talk.limit():
        lines.append(f"memory's limit    {limit:.1f} tokens per second")
    talk.terminal.note("\n".join(lines))


def _think(talk: Talk, argument: str) -> None:
    if argument in ("on", "off"):
        talk.session.set_thinking(argument == "on")
        talk.conversation.thinking = argument == "on"
        talk.save()
    elif argument:
        raise KtrtError(f"/think: expected on or off, found {argument!r:.40}")
    thinking = talk.session.template.thinking
    unknown = "this template has no switch for it" if talk.server is None else "the server decides"
    known = {None: unknown, True: "on", False: "off"}
    talk.terminal.note(f"Thinking: {known[thinking]}")


def _file(talk: Talk, argument: str) -> None:
    if argument == "-":
        talk.attachments.clear()
    elif argument:
        characters = talk.attach(argument)
        talk.terminal.note(f"{argument}: {characters:,} characters go with the next message.")
        return
    names = ", ".join(talk.attachments) or "none"
    talk.terminal.note(f"Files for the next message: {names}")


def _compare(talk: Talk, argument: str) -> None:
    compare(talk, _required("/compare", argument, "PROMPT"))


def _exit(_talk: Talk, _argument: str) -> None:
    raise Leave


def _required(name: str, argument: str, what: str) -> str:
    if not argument:
        raise KtrtError(f"{name}: expected {name} {what}")
    return argument


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _turns(conversation: Conversation) -> str:
    count = len(conversation.turns) // 2
    return f"{count} turn" if count == 1 else f"{count} turns"


def describe(conversation: Conversation) -> str:
    """Returns the length of a conversation in words."""
    text = _turns(conversation)
    if conversation.unanswered is not None:
        text += f", and a message without an answer ({_short(conversation.unanswered)})"
    if conversation.undone:
        text += f"; /redo brings back {_short(conversation.undone[0]['content'])}"
    return text


def _sampling_words(_talk: Talk) -> list[str]:
    return [f"{each.name} " for each in fields(SamplingArgs)]


def _path_words(_talk: Talk) -> list[str]:
    return [_PATH]


COMMANDS: dict[str, Command] = {
    "help": Command("/help", "this list", _help, alone=True),
    "system": Command(
        "/system [TEXT]", "show or set the system prompt; `default`: as configured", _system
    ),
    "retry": Command(
        "/retry",
        "answer the last message again; the old answer stays until the new one is complete",
        _retry,
        alone=True,
    ),
    "undo": Command("/undo", "take the last message and its answer back", _undo, alone=True),
    "redo": Command("/redo", "undo /undo, until another answer is complete", _redo, alone=True),
    "clear": Command("/clear, clear", "forget what was said", _clear, alone=True),
    "save": Command("/save [FILE]", "save the conversation", _save, True, _path_words),
    "load": Command("/load FILE", "continue a saved conversation", _load, True, _path_words),
    "set": Command(
        "/set [NAME [VALUE]]",
        "show or change sampling; `default`: as configured",
        _set,
        words=_sampling_words,
    ),
    "stats": Command("/stats", "tokens and speeds so far", _stats, alone=True),
    "think": Command(
        "/think [on|off]",
        "whether a reasoning model thinks first",
        _think,
        words=lambda _: ["on", "off"],
    ),
    "file": Command(
        "/file [PATH|-]", "add a text file to the next message; `-`: none", _file, True, _path_words
    ),
    "adapter": Command(
        "/adapter [NAME|off|on|scale X]",
        "list or choose adapters; NAME=WEIGHT … blends them",
        choices.adapter,
        words=choices.adapter_words,
    ),
    "model": Command(
        "/model [NAME]",
        "list or choose the server's models, with --url",
        choices.model,
        words=choices.model_words,
    ),
    "compare": Command(
        "/compare PROMPT", "base model and adapter side by side, same seed", _compare
    ),
    "exit": Command("/exit, exit", "leave; so do Ctrl-D and Ctrl-C twice", _exit, alone=True),
}
