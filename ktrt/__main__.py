"""``ktrt VERB …`` and ``python -m ktrt VERB …``: runs the verb's own command."""

import sys
from collections.abc import Sequence
from importlib import import_module

from ktrt import __version__
from ktrt.utils.program import program
from ktrt.utils.streams import abandon, escape_unknown

# In the order of use; each is a package with a command, ``python -m ktrt.VERB``.
VERBS = {
    "chat": "chat with a model and its adapters in the terminal",
    "serve": "serve a model and its adapters over HTTP, with a page to chat in",
    "audit": "list what an adapter changes; --verify compares the running model with its files",
    "doctor": "examine this machine: what it reaches, which settings to change",
    "bench": "measure a configuration: prefill, decode, first token, memory",
    "pack": "pack the experts ahead of the first chat; list and remove packs",
    "export": "write a merged checkpoint, packed experts, or the adapter in another layout",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code; 2, with one line, for a verb that does not exist."""
    words = list(sys.argv[1:] if argv is None else argv)
    match words[:1]:
        case ["-h" | "--help"]:
            return _show(_usage())
        case ["--version"]:
            return _show(f"ktrt {__version__}")
        case [verb] if verb in VERBS:
            command = import_module(f"ktrt.{verb}.__main__")
            return int(command.main(words[1:]))
    _complain(_refusal(words))
    return 2


def _show(text: str) -> int:
    """Prints on standard output; returns the exit code as verbs do (``ktrt.command_line``)."""
    escape_unknown(sys.stdout)
    try:
        print(text, flush=True)
    except OSError as error:
        from ktrt.command_line import EXIT_FAILURE, EXIT_NO_READER

        abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return EXIT_NO_READER
        _complain(f"standard output cannot be written: {error.strerror or error}")
        return EXIT_FAILURE
    return 0


def _complain(message: str) -> None:
    if sys.stderr is not None:
        print(f"{program()}: error: {message}", file=sys.stderr)


def _usage() -> str:
    lines = [f"  {verb:<8}{line}" for verb, line in VERBS.items()]
    return "\n".join(
        [
            f"usage: {program()} VERB [CONFIG] [key=value …] [options]",
            "",
            "Chat with LoRA-tuned Mixture-of-Experts models whose routed experts run on the CPU.",
            "CONFIG: a YAML file with LLaMA-Factory's keys, or a model's folder.",
            "",
            "verbs:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this text; after a verb: the verb's options",
            "  --version   show ktrt's version",
        ]
    )


def _refusal(words: Sequence[str]) -> str:
    """Why ``words`` start no command, and the nearest one that exists."""
    from ktrt.config.check import nearest, shown

    known = ", ".join(VERBS)
    if not words:
        return f"expected a verb: {known}; --help describes them"
    word = words[0]
    if "=" in word or "/" in word or word.endswith((".yaml", ".yml", ".json")):
        return f"expected a verb ({known}) before {shown(word)}, as in `{program()} chat {word}`"
    if word.startswith("-"):
        return f"expected a verb ({known}) before {shown(word)}"
    return f"unknown verb {shown(word)}{nearest(word, VERBS) or f'; expected {known}'}"


if __name__ == "__main__":
    sys.exit(main())
