"""Interface of chat templates, and of the tokenizer that they need."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ktrt.errors import ConfigError

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """The used subset of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


class Template(Protocol):
    """Renders checked messages, the last one a user's; knows the ids that end the reply.

    ``thinking``: whether the model may think first; None without such a switch.
    ``shown_tokens``: id → text of the special tokens around thoughts. They stay in a reply's text
    even if special tokens are skipped: without them a thought looks like the answer.
    """

    name: str
    stop_ids: frozenset[int]
    shown_tokens: Mapping[int, str]

    @property
    def thinking(self) -> bool | None: ...

    def with_thinking(self, thinking: bool) -> "Template":
        """Returns a copy with the switch set. Raises ``ConfigError`` if there is none."""
        ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the prompt's token ids, up to the start of the reply."""
        ...


def no_switch(name: str) -> ConfigError:
    """Returns the error for a template without a thinking switch."""
    return ConfigError(
        f"template {name!r} cannot switch thinking on or off: it is no reasoning template"
    )
