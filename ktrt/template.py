"""Chat templates: from messages to token ids.

A named template is data, one row of ``TEMPLATES``, with the strings LLaMA-Factory trains with
(src/llamafactory/data/template.py): an adapter needs exactly those, which differ in places from the
tokenizer's own chat template. ``auto`` renders that one.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

from ktrt.config import TemplateArgs
from ktrt.config.check import nearest
from ktrt.errors import ConfigError

_log = logging.getLogger(__name__)

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


class Template(Protocol):
    """Renders checked messages that end with the user's, and knows which ids end the reply.

    ``thinking``: whether the model is let think first; None where the template has no such switch.
    """

    name: str
    stop_ids: frozenset[int]

    @property
    def thinking(self) -> bool | None: ...

    def with_thinking(self, thinking: bool) -> "Template":
        """The same template with the switch set. ``ConfigError``: it has none."""
        ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids; the reply is what follows them."""
        ...


@dataclass(frozen=True)
class Thought:
    """How a reasoning template marks thoughts: they are dropped from earlier replies, and with
    ``enable_thinking: false`` the prompt ends with ``empty``.
    """

    begin: str = "<think>\n"
    end: str = "\n</think>\n\n"
    empty: str = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class TemplateSpec:
    """The slots of a template. ``{c}`` is the content, ``{bos}`` and ``{eos}`` the tokenizer's ids.

    The prompt is prefix, system (unless empty), then the turns; the texts between ``{bos}`` and
    ``{eos}`` are encoded one by one, without special tokens added. ``tokens`` are the texts that
    the tokenizer must know as one token each; ``stop_words`` are such tokens too and, like eos,
    end the reply. ``system_in_user`` puts the system slot before the first user text.
    """

    user: str
    assistant: str = "{c}{eos}"
    system: str = "{c}"
    prefix: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    system_in_user: bool = False
    thought: Thought | None = None


def _deepseek3(thought: Thought | None = None) -> TemplateSpec:
    return TemplateSpec(
        prefix="{bos}",
        user="<｜User｜>{c}<｜Assistant｜>",
        tokens=("<｜User｜>", "<｜Assistant｜>"),
        thought=thought,
    )


def _qwen(default_system: str = "", thought: Thought | None = None) -> TemplateSpec:
    return TemplateSpec(
        system="<|im_start|>system\n{c}<|im_end|>\n",
        user="<|im_start|>user\n{c}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{c}<|im_end|>\n",
        default_system=default_system,
        stop_words=("<|im_end|>",),
        tokens=("<|im_start|>",),
        thought=thought,
    )


def _glm4(thought: Thought | None = None) -> TemplateSpec:
    return TemplateSpec(
        prefix="[gMASK]<sop>",
        system="<|system|>\n{c}",
        user="<|user|>\n{c}<|assistant|>",
        assistant="\n{c}",
        stop_words=("<|user|>", "<|observation|>"),
        tokens=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        thought=thought,
    )


TEMPLATES: Mapping[str, TemplateSpec] = {
    "default": TemplateSpec(
        system="System: {c}{eos}\n",
        user="Human: {c}{eos}\nAssistant:",
        assistant="{c}{eos}\n",
    ),
    "deepseek": TemplateSpec(prefix="{bos}", system="{c}\n\n", user="User: {c}\n\nAssistant:"),
    "deepseek3": _deepseek3(),
    "deepseekr1": _deepseek3(Thought()),
    "qwen": _qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _qwen(thought=Thought()),
    "qwen3_nothink": _qwen(),
    "qwen3_5": _qwen(thought=Thought()),
    "qwen3_5_nothink": _qwen(),
    "mistral": TemplateSpec(
        prefix="{bos}",
        system="{c}\n\n",
        user="[INST] {c}[/INST]",
        assistant=" {c}{eos}",
        system_in_user=True,
    ),
    "glm4": _glm4(),
    "glm4_moe": _glm4(Thought()),
    "glm4_7": _glm4(Thought("<think>", "</think>", empty="</think>")),
    "gpt_oss": TemplateSpec(
        system="<|start|>system<|message|>{c}<|end|>",
        user="<|start|>user<|message|>{c}<|end|><|start|>assistant",
        assistant="{c}",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        tokens=("<|start|>", "<|message|>", "<|end|>", "<|channel|>"),
        thought=Thought(
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
            empty=(
                "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
            ),
        ),
    ),
    "minimax2": TemplateSpec(
        system="]~!b[]~b]system\n{c}[e~[\n",
        user="]~b]user\n{c}[e~[\n]~b]ai\n",
        assistant="{c}[e~[\n",
        default_system=(
            "You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax."
        ),
        stop_words=("[e~[",),
        tokens=("]~!b[", "]~b]"),
        thought=Thought(),
    ),
    "moonlight": TemplateSpec(
        system="<|im_system|>system<|im_middle|>{c}<|im_end|>",
        user=("<|im_user|>user<|im_middle|>{c}<|im_end|><|im_assistant|>assistant<|im_middle|>"),
        assistant="{c}<|im_end|>",
        default_system="You are a helpful assistant provided by Moonshot-AI.",
        stop_words=("<|im_end|>",),
        tokens=("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
    ),
}


def load_template(args: TemplateArgs, tokenizer: Tokenizer) -> Template:
    """The template that ``args`` names, bound to ``tokenizer``.

    ``ConfigError``: an unknown name; a special token of the template that the tokenizer does not
    encode to exactly one id; for ``auto``, a tokenizer without a chat template.
    """
    if args.template in (None, "", "auto"):
        return AutoTemplate(args, tokenizer)
    name = str(args.template)
    if name not in TEMPLATES:
        raise ConfigError(
            f"template: unknown name {name!r}{nearest(name, TEMPLATES)}; "
            f"known: auto, {', '.join(TEMPLATES)}"
        )
    if args.enable_thinking is False and TEMPLATES[name].thought is None:
        _log.info("enable_thinking has no effect: %s is not a reasoning template", name)
    return NamedTemplate(name, args, tokenizer)


class NamedTemplate:
    """A row of ``TEMPLATES`` bound to a tokenizer."""

    def __init__(self, name: str, args: TemplateArgs, tokenizer: Tokenizer) -> None:
        spec = TEMPLATES[name]
        self.name = name
        self._tokenizer = tokenizer
        self.stop_ids = _stop_ids(name, spec, tokenizer)
        self._prefix = self._compile(spec.prefix)
        self._system = self._compile(spec.system)
        self._user = self._compile(spec.user)
        self._assistant = self._compile(spec.assistant)
        self._first_user_system = spec.system if spec.system_in_user else None
        self._default_system = (
            spec.default_system if args.default_system is None else args.default_system
        )
        self._thought = spec.thought
        self._skip_thought = args.enable_thinking is False

    @property
    def thinking(self) -> bool | None:
        return None if self._thought is None else not self._skip_thought

    def with_thinking(self, thinking: bool) -> "NamedTemplate":
        if self._thought is None:
            raise _no_switch(self.name)
        changed = copy(self)
        changed._skip_thought = not thinking
        return changed

    def encode(self, messages: Sequence[Message]) -> list[int]:
        turns = list(messages)
        system = self._default_system
        if turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        before = ""
        ids = self._fill(self._prefix)
        if system and self._first_user_system is not None:
            before = self._first_user_system.replace("{c}", system)
        elif system:
            ids += self._fill(self._system, system)
        for turn in turns:
            if turn["role"] == "assistant":
                ids += self._fill(self._assistant, self._without_thought(turn["content"]))
            else:
                ids += self._fill(self._user, before + turn["content"])
                before = ""
        if self._thought and self._skip_thought:
            ids += self._fill([self._thought.empty])
        return ids

    def _compile(self, slot: str) -> list[str | int]:
        """A slot's texts and, in place of ``{bos}`` and ``{eos}``, ids."""
        ids = {"{bos}": self._tokenizer.bos_token_id, "{eos}": self._tokenizer.eos_token_id}
        parts: list[str | int] = []
        for part in re.split(r"(\{bos\}|\{eos\})", slot):
            special = ids.get(part)
            if special is not None:
                parts.append(special)
            elif part:
                parts.append(part)
        return parts

    def _fill(self, slot: Sequence[str | int], content: str = "") -> list[int]:
        ids: list[int] = []
        for part in slot:
            if isinstance(part, int):
                ids.append(part)
            else:
                text = part.replace("{c}", content)
                ids += self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _without_thought(self, reply: str) -> str:
        thought = self._thought
        if thought is None:
            return reply
        marked = f"{re.escape(thought.begin)}.*?{re.escape(thought.end)}"
        return re.sub(marked, "", reply, flags=re.DOTALL).lstrip("\n")


def _stop_ids(name: str, spec: TemplateSpec, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a reply. ``ConfigError`` lists the tokens that the tokenizer lacks."""
    missing = []
    ids: dict[str, int] = {}
    for text in (*spec.tokens, *spec.stop_words):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) == 1 and encoded[0] != tokenizer.unk_token_id:
            ids[text] = encoded[0]
        else:
            missing.append(text)
    if "{bos}" in spec.prefix and tokenizer.bos_token_id is None:
        missing.append("bos")
    if tokenizer.eos_token_id is None:
        missing.append("eos")
    if missing:
        raise ConfigError(
            f"template {name!r} does not fit this model: its tokenizer has no token "
            f"{', '.join(missing)}; set the template that the model (and adapter) was trained "
            "with, or `template: auto`"
        )
    stops = {ids[text] for text in spec.stop_words}
    return frozenset(stops if tokenizer.eos_token_id is None else stops | {tokenizer.eos_token_id})


def _no_switch(name: str) -> ConfigError:
    return ConfigError(
        f"template {name!r} cannot switch thinking on or off: it is no reasoning template"
    )


class AutoTemplate:
    """The tokenizer's own chat template."""

    name = "auto"

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
        if self._thinking is not None and self._thinks_by_default is None:
            _log.info("enable_thinking has no effect: the chat template has no such switch")

    @property
    def thinking(self) -> bool | None:
        default = self._thinks_by_default
        return default if default is None or self._thinking is None else self._thinking

    def with_thinking(self, thinking: bool) -> "AutoTemplate":
        if self._thinks_by_default is None:
            raise _no_switch(self.name)
        changed = copy(self)
        changed._thinking = thinking
        return changed

    def _find_switch(self) -> bool | None:
        """What the chat template does when nobody says; None if it does the same in any case."""
        probe = [{"role": "user", "content": "?"}]
        on, off, default = (self._render(probe, thinking) for thinking in (True, False, None))
        return None if on == off else default != off

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
