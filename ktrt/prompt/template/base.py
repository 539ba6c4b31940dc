"""What every chat template is to the session, and what it needs of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ktrt.errors import ConfigError

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


class Template(Protocol):
    """Renders checked messages that end with the user's, and knows which ids end the reply.

    ``thinking``: whether the model is let think first; None where the template has no such switch.
    ``shown_tokens``: the special tokens, with their text, that mark thoughts. They are part of a
    reply's text, where others may be skipped: without them thoughts could not be told apart.
    """

    name: str
    stop_ids: frozenset[int]
    shown_tokens: Mapping[int, str]

    @property
    def thinking(self) -> bool | None: ...

    def with_thinking(self, thinking: bool) -> "Template":
        """The same template with the switch set. ``ConfigError``: it has none."""
        ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids; the reply is what follows them."""
        ...


def no_switch(name: str) -> ConfigError:
    """The error of a template without a thinking switch."""
    return ConfigError(
        f"template {name!r} cannot switch thinking on or off: it is no reasoning template"
    )
