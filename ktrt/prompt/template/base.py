"""Interface of chat templates, and of the tokenizer that they need."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ktrt.errors import ConfigError
from ktrt.prompt.reply.table import ReplyFormat

# In the form of ``ktrt.prompt.messages.plain_messages``.
Message = Mapping[str, Any]
# A function: name, description, parameters (see ``ktrt.prompt.messages.plain_tools``).
Tool = Mapping[str, Any]


class Tokenizer(Protocol):
    """The used subset of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


class Template(Protocol):
    """Renders checked messages, the last one a user's or a tool's; knows the ids that end the
    reply.

    ``thinking``: whether the model may think first; None without such a switch.
    ``shown_tokens``: id → text of the special tokens around thoughts and calls. They stay in a
    reply's text even if special tokens are skipped: without them a thought or a call looks like the
    answer. ``reply``: how the model writes thoughts and calls; None if nothing is known.
    """

    name: str
    stop_ids: frozenset[int]
    shown_tokens: Mapping[int, str]
    reply: ReplyFormat | None

    @property
    def thinking(self) -> bool | None: ...

    def with_thinking(self, thinking: bool) -> "Template":
        """Returns a copy with the switch set. Raises ``ConfigError`` if there is none."""
        ...

    @property
    def reply_start(self) -> str:
        """The text of a reply that the prompt already holds: the mark of a thought, or an empty
        thought; mostly nothing."""
        ...

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Returns the prompt's token ids, up to the start of the reply.

        ``ConfigError``: the template cannot show ``tools``, calls or results.
        """
        ...


def no_switch(name: str) -> ConfigError:
    """Returns the error for a template without a thinking switch."""
    return ConfigError(
        f"template {name!r} cannot switch thinking on or off: it is no reasoning template"
    )


def special_marks(
    marks: Iterable[str], encode: Callable[..., list[int]], decode: Callable[..., str]
) -> dict[int, str]:
    """Returns id → text of the special tokens that the marks encode to."""
    ids = {each for mark in marks for each in encode(mark, add_special_tokens=False)}
    special = [each for each in ids if not decode([each], skip_special_tokens=True)]
    return {each: decode([each], skip_special_tokens=False) for each in special}
