"""``template: auto``: the chat template that comes with the tokenizer."""

import logging
import re
from collections.abc import Mapping, Sequence
from copy import copy

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.template_base import Message, Tokenizer, no_switch
from ktrt.template_table import TEMPLATES

_log = logging.getLogger(__name__)


class AutoTemplate:
    """The tokenizer's own chat template."""

    name = "auto"
    shown_tokens: Mapping[int, str] = {}

    def __init__(self, args: TemplateArgs, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "template: the model's tokenizer has no chat template of its own; set template to "
                f"one of {', '.join(TEMPLATES)}"
            )
        self._tokenizer = tokenizer
        self._default_system = args.default_system
        self._thinking = args.enable_thinking
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset[int](() if eos is None else (eos,))
        self._thinks_by_default = self._find_switch()
        self._check_tokens()
        if self._thinking is not None and self._thinks_by_default is None:
            _log.info("enable_thinking has no effect: the chat template has no such switch")

    @property
    def thinking(self) -> bool | None:
        default = self._thinks_by_default
        return default if default is None or self._thinking is None else self._thinking

    def with_thinking(self, thinking: bool) -> "AutoTemplate":
        if self._thinks_by_default is None:
            raise no_switch(self.name)
        changed = copy(self)
        changed._thinking = thinking
        return changed

    def _find_switch(self) -> bool | None:
        """What the chat template does when nobody says; None if it does the same in any case."""
        probe = [{"role": "user", "content": "?"}]
        on, off, default = (self._render(probe, thinking) for thinking in (True, False, None))
        return None if on == off else default != off

    def _check_tokens(self) -> None:
        """A warning that names what looks like special tokens and is none to the tokenizer."""
        texts: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
        )
        encode = self._tokenizer.encode
        unknown = [
            text
            for text in dict.fromkeys(re.findall(r"<[|｜][^<>|｜]+[|｜]>", texts))
            if len(encode(text, add_special_tokens=False)) != 1
        ]
        if unknown:
            _log.warning(
                "The chat template uses %s, which the tokenizer does not know as one token: do its "
                "files belong together?", ", ".join(unknown),
            )  # fmt: skip

    def encode(self, messages: Sequence[Message]) -> list[int]:
        turns = [dict(message) for message in messages]
        if self._default_system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._default_system})
        return self._render(turns, self._thinking)

    def _render(self, turns: list[dict[str, str]], thinking: bool | None) -> list[int]:
        from jinja2 import TemplateError

        # DeepSeek's templates (V3.1 on) and some others have the second name.
        options = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False, **options
            )
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template refuses this: {error}") from error
        return ids
