"""``template: auto``: the chat template that comes with the tokenizer."""

import logging
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.prompt.reply.table import ReplyFormat, published_reply
from ktrt.prompt.template.auto_tools import ToolForm, find_tool_form
from ktrt.prompt.template.base import Message, Tokenizer, Tool, no_switch, special_marks
from ktrt.prompt.template.table import TEMPLATES

_log = logging.getLogger(__name__)

# Names of conversation templates; named templates also exist for tools, documents …
_CONVERSATION = ("default", "chat")
# A text that no template contains.
_PROBE = "ktrt-7319"


class AutoTemplate:
    """The tokenizer's own chat template.

    Among several named ones: "default", else "chat", else the first that shows the user's text.
    Templates of multimodal models may expect a message's content as a list of parts: they get one
    text part. Raises ``ConfigError`` if no template takes a conversation of texts.
    """

    name = "auto"

    def __init__(self, args: TemplateArgs, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "template: the model's tokenizer has no chat template; set template to one of "
                f"{', '.join(TEMPLATES)}"
            )
        self._tokenizer = tokenizer
        self._default_system = args.default_system
        self._thinking = args.enable_thinking
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset[int](() if eos is None else (eos,))
        self._in_parts = False
        # Only with several templates: not every tokenizer accepts one as an argument.
        self._source: dict[str, str] = {}
        # The template for requests with tools, if it is another one.
        self._tool_source: dict[str, str] = {}
        self._choose()
        self._tools: ToolForm | None = None
        self._starts: dict[bool | None, str] = {}
        source = self._source.get("chat_template", tokenizer.chat_template)
        self.reply: ReplyFormat | None = published_reply(str(source))
        marks = self.reply.marks if self.reply else ()
        self.shown_tokens: Mapping[int, str] = special_marks(
            marks, tokenizer.encode, tokenizer.decode
        )
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

    def _choose(self) -> None:
        """Chooses the template, and whether it gets parts."""
        given = self._tokenizer.chat_template
        named: dict[str, str] = dict(given) if isinstance(given, Mapping) else {"": given}
        if "tool_use" in named:
            self._tool_source = {"chat_template": named["tool_use"]}
        order = [name for name in _CONVERSATION if name in named]
        silent: list[tuple[str, dict[str, str]]] = []
        reasons = []
        for name in [*order, *(name for name in named if name not in order)]:
            self._source = {"chat_template": named[name]} if name else {}
            try:
                if self._shows(in_parts=False) or self._shows(in_parts=True):
                    self._tell(name, list(named))
                    return
                silent.append((name, self._source))
            except ConfigError as error:
                reasons.append(f"{name}: {error}" if name else str(error))
        self._in_parts = False
        if not silent:
            raise ConfigError(
                f"template: no chat template of the tokenizer takes a conversation of texts "
                f"({'; '.join(reasons)}). Set template to one of {', '.join(TEMPLATES)}"
            )
        name, self._source = silent[0]
        _log.warning(
            "The tokenizer's chat template%s does not show what the user says; set template to a "
            "name that fits the model", f" {name!r}" if name else "",
        )  # fmt: skip

    def _shows(self, *, in_parts: bool) -> bool:
        """Returns whether the prompt contains a message's text. Raises ``ConfigError`` if the
        template takes it in neither form."""
        self._in_parts = in_parts
        try:
            return _PROBE in self._text(_PROBE)
        except ConfigError as error:
            if in_parts:
                raise
            try:
                return self._shows(in_parts=True)
            except ConfigError:
                raise error from None

    def _tell(self, name: str, names: list[str]) -> None:
        if len(names) > 1 and name != "default":
            _log.info("Of the tokenizer's chat templates (%s) %r is used", ", ".join(names), name)
        if self._in_parts:
            _log.info("The chat template wants messages in parts; each gets one text part")

    def _find_switch(self) -> bool | None:
        """Returns whether the template thinks by default; None if the switch changes nothing."""
        probe = [{"role": "user", "content": "?"}]
        on, off, default = (self._render(probe, thinking) for thinking in (True, False, None))
        return None if on == off else default != off

    def _check_tokens(self) -> None:
        """Warns of texts that look like special tokens and are none to the tokenizer."""
        encode = self._tokenizer.encode
        unknown = [
            text
            for text in dict.fromkeys(re.findall(r"<[|｜][^<>|｜]+[|｜]>", self._text("?")))
            if len(encode(text, add_special_tokens=False)) != 1
        ]
        if unknown:
            _log.warning(
                "The chat template uses %s, which the tokenizer does not know as one token: do its "
                "files belong together?", ", ".join(unknown),
            )  # fmt: skip

    @property
    def reply_start(self) -> str:
        if self._thinking not in self._starts:
            self._starts[self._thinking] = self._find_start()
        return self._starts[self._thinking]

    def _find_start(self) -> str:
        """Returns the prompt's end from the reply's first mark on."""
        if self.reply is None:
            return ""
        text = self._text(_PROBE, **_switch(self._thinking))
        end = text[text.rfind(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
        if self.reply.channels:
            return end.rpartition("<|start|>assistant")[2]
        found = [end.find(mark) for mark in self.reply.thought or () if mark in end]
        return end[min(found) :] if found else ""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        turns = [dict(message) for message in messages]
        if self._default_system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self._default_system})
        options: dict[str, Any] = {}
        if tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
            if self._tools is None:
                self._tools = find_tool_form(self._apply_plain)
            turns, options = self._tools.shown(turns, tools)
        return self._render(turns, self._thinking, options)

    def _text(self, content: str, **options: Any) -> str:
        """Returns the prompt for one message of the user."""
        text: str = self._apply([{"role": "user", "content": content}], tokenize=False, **options)
        return text

    def _apply_plain(self, turns: list[dict[str, Any]], **options: Any) -> str:
        text: str = self._apply(turns, tokenize=False, **options)
        return text

    def _render(
        self, turns: list[dict[str, Any]], thinking: bool | None, options: Mapping[str, Any] = {}
    ) -> list[int]:
        ids: list[int] = self._apply(
            turns, tokenize=True, return_dict=False, **_switch(thinking), **options
        )
        return ids

    def _apply(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        messages: list[Any] = turns
        if self._in_parts:
            messages = [{**turn, "content": _parts(turn["content"])} for turn in turns]
        source = self._source | (self._tool_source if "tools" in options else {})
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, **source, **options
            )
        except Exception as error:
            # Jinja's errors, and any error of the template's expressions.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"the tokenizer's chat template refuses this: {reason}") from error


def _switch(thinking: bool | None) -> dict[str, bool]:
    # DeepSeek's templates (V3.1 on) and some others have the second name.
    return {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}


def _parts(content: str | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if content else []
