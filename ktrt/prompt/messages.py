"""Messages as callers give them: checked, and reduced to text."""

from collections.abc import Mapping, Sequence

from ktrt.errors import ConfigError
from ktrt.prompt.template.base import Message

_ROLES = ("system", "user", "assistant")


def check_messages(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """Returns the messages with plain text as content, ready to be answered.

    ``ConfigError`` names the first message that is malformed or out of turn.
    """
    plain = plain_messages(messages)
    expected = "user"
    for index, role in enumerate(message["role"] for message in plain):
        if role == "system" and index == 0:
            continue
        if role != expected:
            raise ConfigError(
                f"messages[{index}]: expected a message of the {expected}, found one of the {role}"
            )
        expected = "assistant" if role == "user" else "user"
    if expected == "user":
        raise ConfigError("messages: expected a last message of the user, nothing to answer")
    return plain


def plain_messages(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """Returns the messages with plain text as content, in any order of roles.

    Content may be a list of OpenAI's text parts, which are joined. ``ConfigError`` names the first
    message that is malformed.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages: expected a list of messages, found {messages!r:.80}")
    return [_plain(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _plain(where: str, message: object) -> Message:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise ConfigError(f"{where}: expected a mapping of role and content, found {message!r}")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ConfigError(f"{where}: role: expected {', '.join(_ROLES)}, found {role!r}")
    where = f"{where}: content"
    if isinstance(content, list | tuple):
        content = "".join(_part_text(f"{where}[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str) or not content.strip():
        raise ConfigError(f"{where}: expected text, not empty, found {content!r:.80}")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in content):
        raise ConfigError(f"{where}: {content!r:.40} holds half a character (U+D800 …)")
    return {"role": role, "content": content}


def _part_text(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise ConfigError(f"{where}: expected a part with a type, found {part!r:.80}")
    if kind != "text":
        raise ConfigError(
            f"{where}: expected type 'text', found {kind!r:.40}: ktrt reads text only"
        )
    text = part.get("text")
    if not isinstance(text, str) or set(part) != {"type", "text"}:
        raise ConfigError(f"{where}: expected type and text, found {part!r:.80}")
    return text
