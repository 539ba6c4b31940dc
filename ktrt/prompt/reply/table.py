"""How the families of models write thoughts and tool calls, as data.

A call is written in one of four ways:

- a JSON object that holds name and arguments: ``{"name": "f", "arguments": {…}}``;
- a head with the name, then the arguments as a JSON object;
- tags: the name, then a key and a value for each argument;
- as in a program: ``f(key="text", other=1)``.

Between its calls a block holds white space and the marks listed here. Anything else ends the block
and is content again.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ktrt.prompt.reply.notation import GEMMA_QUOTE, Notation


@dataclass(frozen=True)
class ObjectCall:
    """A JSON object with ``name`` and ``arguments`` (or ``parameters``). ``known``: only with a
    name of the request's tools: any other object is content."""

    known: bool = False


@dataclass(frozen=True)
class HeadCall:
    """A head up to the ``{`` of the arguments. ``head`` is a pattern of all of it, with the group
    ``name`` and perhaps ``id``. ``known``: only names of tools that the request has."""

    head: str
    known: bool = False

    # Longer heads are none: the text is content.
    most: int = 300


@dataclass(frozen=True)
class TagCall:
    """Marks around name, keys and values. Between ``key_end`` and the value, ``value_begin``; white
    space next to it is no part of the value, nor is one line break at each end of the value.
    ``name_end`` "" means: up to white space, ``<`` or ``>``. ``end`` "" means: the block's end."""

    name_end: str
    key: str
    key_end: str
    value_end: str
    value_begin: str = ""
    end: str = ""


@dataclass(frozen=True)
class ProgramCall:
    """A head up to the arguments' bracket, with the group ``name``, and arguments in a notation:
    ``(key=value, …)`` in Python's, ``{key:value,…}`` in Gemma's."""

    notation: Notation
    head: str
    known: bool = False

    most: int = 200


Call = ObjectCall | HeadCall | TagCall | ProgramCall


@dataclass(frozen=True)
class CallBlock:
    """The calls between ``begin`` and ``end``, each after one of the marks of ``calls``. The mark
    "{" belongs to the call's text; "" means: whatever else comes.

    ``before`` and ``between`` are marks without a meaning before the first call and after one. A
    block without ``begin`` is a single call, whose mark is found in content, at the begin of a line
    if ``at_line``. A mark with ``{name}`` stands for one of each function of the request, and
    belongs to the call's text too.
    """

    begin: str
    calls: Mapping[str, Call]
    end: str = ""
    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    at_line: bool = False
    # The marks that belong to a call's text.
    kept: tuple[str, ...] = ("{",)

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that begin the block within content."""
        return (self.begin,) if self.begin else tuple(self.calls)

    def named(self, names: Sequence[str]) -> "CallBlock":
        """Returns the block with the names of functions in its marks."""
        if not any("{name}" in mark for mark in self.calls):
            return self
        calls = {
            mark.replace("{name}", name): call
            for mark, call in self.calls.items()
            for name in names
        }
        return replace(self, calls=calls, kept=tuple(calls))


@dataclass(frozen=True)
class ReplyFormat:
    """``thought``: the marks around a thought at the begin of a reply. ``blocks``: the calls.
    ``channels``: messages in OpenAI's harmony format, marked by channels.

    ``calls`` names the entry of ``CALL_TEXTS`` that a grammar enforces; "" for none. ``short_ids``:
    the format allows only ids of nine letters and digits for calls.
    """

    thought: tuple[str, str] | None = None
    blocks: tuple[CallBlock, ...] = ()
    channels: bool = False
    calls: str = ""
    short_ids: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks: special tokens among them must stay in a reply's text."""
        found = list(self.thought or ())
        found += HARMONY_MARKS if self.channels else ()
        for block in self.blocks:
            found += [block.begin, block.end, *block.before, *block.between]
            found += [mark for mark in block.calls if "{name}" not in mark]
            for call in block.calls.values():
                if isinstance(call, TagCall):
                    found += [call.key, call.value_begin, call.value_end, call.end]
                elif isinstance(call, ProgramCall) and call.notation == "gemma":
                    found.append(GEMMA_QUOTE)
                elif isinstance(call, HeadCall):
                    found += re.findall(
                        r"<[|｜][^<>]+[|｜]>|\[[A-Z_]{4,}\]", call.head.replace("\\", "")
                    )
        return tuple(dict.fromkeys(each.strip() for each in found if len(each.strip()) > 1))


HARMONY_MARKS = (
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip
_NAME = r"(?P<name>[^\s<>\[\]{}\"'｜|]+)"

_QWEN_TAGS = TagCall("", "<parameter=", ">", "</parameter>", end="</function>")
_GLM_TAGS = TagCall("", "<arg_key>", "</arg_key>", "</arg_value>", value_begin="<arg_value>")
_INVOKE = TagCall('">', '<parameter name="', '">', "</parameter>", end="</invoke>")

TOOL_CALL = CallBlock(
    "<tool_call>",
    {"{": ObjectCall(), "<function=": _QWEN_TAGS, "": _GLM_TAGS},
    end="</tool_call>",
)
DEEPSEEK = CallBlock(
    "<｜tool▁calls▁begin｜>",
    {
        "<｜tool▁call▁begin｜>": HeadCall(
            rf"\s*(?:function\s*<｜tool▁sep｜>\s*)?{_NAME}\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?\s*)?"
        )
    },
    end="<｜tool▁calls▁end｜>",
    between=("```", "<｜tool▁call▁end｜>"),
)
KIMI = CallBlock(
    "<|tool_calls_section_begin|>",
    {
        "<|tool_call_begin|>": HeadCall(
            r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s<>:{}]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*"
        )
    },
    end="<|tool_calls_section_end|>",
    between=("<|tool_call_end|>",),
)
MINIMAX = CallBlock("<minimax:tool_call>", {'<invoke name="': _INVOKE}, end="</minimax:tool_call>")
# LLaMA-Factory trains MiniMax's calls without the block around them.
BARE_INVOKE = CallBlock("", {'<invoke name="': _INVOKE})
MISTRAL = CallBlock(
    "[TOOL_CALLS]",
    {
        "{": ObjectCall(),
        "": HeadCall(rf"\s*{_NAME}\s*(?:\[CALL_ID\]\s*(?P<id>\w+)\s*)?(?:\[ARGS\]\s*)?"),
    },
    end="]",
    before=("[",),
    between=(",", "[TOOL_CALLS]"),
)
SEED = CallBlock("<seed:tool_call>", {"<function=": _QWEN_TAGS}, end="</seed:tool_call>")
TOOL_CALLS = CallBlock("<tool_calls>", {"{": ObjectCall()}, end="</tool_calls>")
ACTION = CallBlock(
    "",
    {"Action:": HeadCall(rf"\s*{_NAME}\s*Action Input:\s*", known=True)},
    at_line=True,
)


# GLM-4's: a line with the name, then JSON.
NAME_LINE = CallBlock("", {"{name}\n": HeadCall(rf"{_NAME}\s*", known=True)}, at_line=True)
_PYTHON = rf"\s*{_NAME}\s*"
LFM = CallBlock(
    "<|tool_call_start|>",
    {"{": ObjectCall(), "": ProgramCall("python", _PYTHON)},
    end="<|tool_call_end|>",
    before=("[",),
    between=(",", "]"),
)
_GEMMA_CALL = ProgramCall("gemma", rf"\s*call:\s*{_NAME}\s*")
GEMMA = CallBlock("<|tool_call>", {"": _GEMMA_CALL}, end="<tool_call|>", before=("<|tool_call>",))
# LLaMA-Factory trains Gemma's calls with a block around them.
GEMMA_IN_BLOCK = CallBlock(
    "<|tool>", {"<|tool_call>": _GEMMA_CALL}, end="<tool|>", between=("<tool_call|>",)
)
# Without any mark: JSON, alone or in a list, or a list of Python's calls.
BARE = {"{": ObjectCall(known=True)}
LLAMA = (
    CallBlock("", BARE, at_line=True),
    CallBlock(
        "[",
        {**BARE, "": ProgramCall("python", _PYTHON, known=True)},
        "]",
        between=(",",),
        at_line=True,
    ),
)
LLAMA4 = (
    CallBlock(
        "<|python_start|>",
        LLAMA[1].calls,
        "<|python_end|>",
        before=("[",),
        between=(",", ";", "]"),
    ),
    *LLAMA,
)


@dataclass(frozen=True)
class CallText:
    """The text of calls: each as ``one``, joined by ``between`` (None: there is a single one), from
    ``begin`` to ``end``. Marks: ``{name}``, ``{json name}``, ``{index}`` and ``{arguments}``, which
    are in one of xgrammar's styles."""

    one: str
    begin: str = ""
    between: str | None = "\n"
    end: str = ""
    style: str = "json"


_JSON_CALL = '{"name": {json name}, "arguments": {arguments}}'

# The text that a grammar enforces, by name. The blocks above read it, and variants of it.
CALL_TEXTS: Mapping[str, CallText] = {
    "action": CallText("Action: {name}\nAction Input: {arguments}"),
    "deepseek": CallText(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    "deepseek31": CallText(
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        begin="<｜tool▁calls▁begin｜>",
        between="",
        end="<｜tool▁calls▁end｜>",
    ),
    "gemma": CallText("<|tool_call>call:{name}{arguments}<tool_call|>", between="", style="gemma"),
    "glm": CallText("<tool_call>{name}\n{arguments}\n</tool_call>", style="glm_xml"),
    "glm4": CallText("{name}\n{arguments}", between=None),
    "kimi": CallText(
        "<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|>",
        begin="<|tool_calls_section_begin|>",
        between="",
        end="<|tool_calls_section_end|>",
    ),
    # LFM2's models write Python's calls unless the prompt asks for these. xgrammar has no style of
    # Python's.
    "lfm": CallText(
        _JSON_CALL, begin="<|tool_call_start|>[", between=", ", end="]<|tool_call_end|>"
    ),
    "llama": CallText(
        '{"name": {json name}, "parameters": {arguments}}', begin="[", between=", ", end="]"
    ),
    "minimax": CallText(
        '<invoke name="{name}">\n{arguments}\n</invoke>',
        begin="<minimax:tool_call>\n",
        end="\n</minimax:tool_call>",
        style="minimax_xml",
    ),
    "minimax1": CallText(_JSON_CALL, begin="<tool_calls>\n", end="\n</tool_calls>"),
    "mistral": CallText(_JSON_CALL, begin="[TOOL_CALLS] [", between=", ", end="]"),
    "mistral_args": CallText("[TOOL_CALLS]{name}[ARGS]{arguments}", between=""),
    "qwen": CallText(f"<tool_call>\n{_JSON_CALL}\n</tool_call>"),
    "qwen_tags": CallText(
        "<tool_call>\n<function={name}>\n{arguments}\n</function>\n</tool_call>",
        style="qwen_xml",
    ),
    "seed": CallText(
        "<seed:tool_call>\n<function={name}>\n{arguments}\n</function>\n</seed:tool_call>",
        style="qwen_xml",
    ),
}

THINK = ("<think>", "</think>")
_DEEPSEEK = ReplyFormat(THINK, (DEEPSEEK,), calls="deepseek")

# By a mark in the text of a chat template, the first that is found.
BY_MARK: Mapping[str, ReplyFormat] = {
    "<|channel|>": ReplyFormat(channels=True),
    "<｜tool▁calls▁begin｜>": _DEEPSEEK,
    "<|tool_calls_section_begin|>": ReplyFormat(THINK, (KIMI,), calls="kimi"),
    "<minimax:tool_call>": ReplyFormat(THINK, (MINIMAX, BARE_INVOKE), calls="minimax"),
    "<seed:tool_call>": ReplyFormat(("<seed:think>", "</seed:think>"), (SEED,), calls="seed"),
    "[TOOL_CALLS]": ReplyFormat(
        ("[THINK]", "[/THINK]"), (MISTRAL,), calls="mistral", short_ids=True
    ),
    "<arg_key>": ReplyFormat(THINK, (TOOL_CALL,), calls="glm"),
    "<function=": ReplyFormat(THINK, (TOOL_CALL,), calls="qwen_tags"),
    "<tool_call>": ReplyFormat(THINK, (TOOL_CALL,), calls="qwen"),
    "<tool_calls>": ReplyFormat(THINK, (TOOL_CALLS,), calls="minimax1"),
    "<|tool_call>": ReplyFormat(("<|channel>thought\n", "<channel|>"), (GEMMA,), calls="gemma"),
    "<|tool_call_start|>": ReplyFormat(THINK, (LFM,), calls="lfm"),
    "<|tool_list_start|>": ReplyFormat(THINK, (LFM,), calls="lfm"),
    "请使用 Json 格式表示调用的参数": ReplyFormat(THINK, (NAME_LINE,), calls="glm4"),
    "◁think▷": ReplyFormat(("◁think▷", "◁/think▷")),
    "<|python_start|>": ReplyFormat(blocks=LLAMA4, calls="llama"),
    "dictionary of argument name and its value": ReplyFormat(blocks=LLAMA, calls="llama"),
    "</think>": ReplyFormat(THINK),
}

# Later models of a family write calls in other ways with the same marks: the name of their text, a
# mark in the chat template, and whether it is there or missing.
_NEWER = {"deepseek": ("deepseek31", "```json", False), "mistral": ("mistral_args", "[ARGS]", True)}

# By LLaMA-Factory's tool format: what its prompt asks for, and what its adapters were trained with.
BY_TOOL_FORMAT: Mapping[str, ReplyFormat] = {
    "default": ReplyFormat(blocks=(ACTION,), calls="action"),
    "gemma4": ReplyFormat(blocks=(GEMMA, GEMMA_IN_BLOCK), calls="gemma"),
    "glm4": ReplyFormat(blocks=(NAME_LINE,), calls="glm4"),
    "glm4_moe": ReplyFormat(blocks=(TOOL_CALL,), calls="glm"),
    "lfm2": ReplyFormat(blocks=(LFM,), calls="lfm"),
    "ling": ReplyFormat(blocks=(TOOL_CALL,), calls="qwen"),
    "llama3": ReplyFormat(blocks=LLAMA, calls="llama"),
    "minimax1": ReplyFormat(blocks=(TOOL_CALLS,), calls="minimax1"),
    "minimax2": ReplyFormat(blocks=(MINIMAX, BARE_INVOKE), calls="minimax"),
    "mistral": ReplyFormat(blocks=(MISTRAL,), calls="mistral", short_ids=True),
    "phi4_mini": ReplyFormat(blocks=(ACTION,), calls="action"),
    "qwen": ReplyFormat(blocks=(TOOL_CALL,), calls="qwen"),
    "qwen3_5": ReplyFormat(blocks=(TOOL_CALL,), calls="qwen_tags"),
    "seed_oss": ReplyFormat(blocks=(SEED,), calls="seed"),
}

# Next to that, what the models of a named template write without an adapter.
BY_TEMPLATE: Mapping[str, tuple[CallBlock, ...]] = {
    "deepseek3": (DEEPSEEK,),
    "deepseekr1": (DEEPSEEK,),
    "llama4": LLAMA4[:1],
    "moonlight": (KIMI,),
}
HARMONY_TEMPLATES = frozenset(("gpt_oss",))


def named_reply(name: str, tool_format: str, thought: tuple[str, str] | None) -> ReplyFormat | None:
    """Returns the format of a named template's replies; None if nothing is known.

    ``thought``: the marks of the template's thoughts.
    """
    found = BY_TOOL_FORMAT.get(tool_format, ReplyFormat())
    blocks = found.blocks + BY_TEMPLATE.get(name, ())
    channels = name in HARMONY_TEMPLATES
    marks = None if thought is None or channels else (thought[0].strip(), thought[1].strip())
    if not (blocks or channels or marks):
        return None
    return ReplyFormat(marks, blocks, channels, found.calls, found.short_ids)


def published_reply(chat_template: str) -> ReplyFormat | None:
    """Returns the format that a tokenizer's chat template belongs to; None if it is unknown."""
    found = next((form for mark, form in BY_MARK.items() if mark in chat_template), None)
    if found is None:
        return None
    newer, mark, is_there = _NEWER.get(found.calls, (found.calls, "", True))
    return replace(found, calls=newer) if (mark in chat_template) is is_there else found
