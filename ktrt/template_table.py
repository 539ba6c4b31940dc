"""The named chat templates: data.

Their strings are those LLaMA-Factory trains with (src/llamafactory/data/template.py): an adapter
needs exactly those, which differ in places from the chat template of the model's tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass


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
