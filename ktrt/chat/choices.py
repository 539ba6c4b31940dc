"""The commands that choose who answers: ``/adapter`` and ``/model``."""

from collections.abc import Mapping

from ktrt.chat.dialog import Talk
from ktrt.errors import KtrtError


def adapter(talk: Talk, argument: str) -> None:
    """``/adapter [NAME|off|on|scale X|NAME=WEIGHT …]``. ``KtrtError``: there is none, or it cannot
    act so."""
    adapters = talk.adapters
    words = argument.split()
    if words[:1] == ["scale"]:
        if len(words) != 2:
            raise KtrtError("/adapter scale: expected one number, as in /adapter scale 0.5")
        adapters.scale(_number(words[1]))
    elif words == ["off"]:
        adapters.off()
    elif words == ["on"]:
        adapters.on()
    elif words:
        adapters.activate(_weights(words))
    talk.terminal.note("\n".join(_adapter_line(name, adapters.active) for name in adapters.names))
    if not adapters.active:
        talk.terminal.note("The base model answers.")


def _adapter_line(name: str, active: Mapping[str, float]) -> str:
    return f"* {name}, weight {active[name]:g}" if name in active else f"  {name}"


def _weights(words: list[str]) -> str | dict[str, float]:
    """Parses an adapter's name, or weights as in ``a=0.7 b=0.3``."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    pairs = [word.rpartition("=") for word in words]
    return {name or text: _number(text) if name else 1.0 for name, _, text in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise KtrtError(f"/adapter: expected a number, found {text!r:.40}") from None


def adapter_words(talk: Talk) -> list[str]:
    """Returns the words that may follow ``/adapter``."""
    return [*talk.session.adapters.names, "on", "off", "scale "]


def model(talk: Talk, argument: str) -> None:
    """``/model [NAME]``. ``KtrtError``: the model is local, or the server has none of that name."""
    server = talk.server
    if server is None:
        if argument:
            raise KtrtError(
                "/model: the model is the configuration's; leave, and start the chat with another "
                "one (/adapter chooses among its adapters)"
            )
        talk.terminal.note(talk.keeping.model or "the configuration's model")
        return
    if argument:
        server.use_model(argument)
        talk.keep_with(server.name)
    else:
        server.refresh()
    chosen = server.adapters.model
    listed = [
        (each.name, f", adapter of {each.parent}" if each.parent else "") for each in server.models
    ]
    if chosen not in (name for name, _ in listed):
        listed.append((chosen, ""))
    talk.terminal.note(
        "\n".join(f"{'*' if name == chosen else ' '} {name}{more}" for name, more in listed)
    )


def model_words(talk: Talk) -> list[str]:
    """Returns the words that may follow ``/model``."""
    return [] if talk.server is None else [each.name for each in talk.server.models]
