"""Chat templates published with models, without their branches for tools, and the differences of
the named templates.

The texts follow the `chat_template` of the models' tokenizer files. The named templates have the
strings of training with LLaMA-Factory.
"""

from dataclasses import dataclass

_CHATML = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set c = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content"
    " else m.content %}{%- else %}{%- set c = m.content %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
)
_DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nTEXT<|im_end|>\n' }}{%- endif %}"
)
_GLM_LAST = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
)
_DEEPSEEK3 = (
    "{{- bos_token }}{%- for m in messages if m.role == 'system' %}{{- m.content }}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set c = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}"
    "{{- '<｜Assistant｜>' + c + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜>GENERATION' }}{%- endif %}"
)
_MOONSHOT = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_system|>system<|im_middle|>TEXT<|im_end|>' }}{%- endif %}"
    "{%- for m in messages %}"
    "{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"
)
_GPT_OSS_SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2026-01-01\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, "
    "final. Channel must be included for every message."
)

PUBLISHED = {
    "DeepSeek-V2-Lite-Chat": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
        "{{ 'Assistant: ' + m.content + eos_token }}{% elif m.role == 'system' %}"
        "{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "DeepSeek-V3": _DEEPSEEK3.replace("GENERATION", ""),
    "DeepSeek-R1": _DEEPSEEK3.replace("GENERATION", "<think>\n"),
    "Qwen2-57B-A14B-Instruct": (
        _DEFAULT_SYSTEM.replace("TEXT", "You are a helpful assistant.") + _CHATML + "{%- endif %}"
    ),
    "Qwen2.5-7B-Instruct": (
        _DEFAULT_SYSTEM.replace(
            "TEXT", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        )
        + _CHATML
        + "{%- endif %}"
    ),
    "Qwen3-30B-A3B": (
        _CHATML + "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    ),
    "Qwen3-30B-A3B-Instruct-2507": _CHATML + "{%- endif %}",
    "Qwen3.5-35B-A3B": (
        _CHATML + "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\n\n</think>\n\n' }}{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
    ),
    "Mixtral-8x7B-Instruct-v0.1": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "glm-4-9b-chat": (
        "{{- '[gMASK]<sop>' }}{%- for m in messages %}"
        "{{- '<|' + m.role + '|>\n' + m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
    ),
    "GLM-4.6": (
        "{{- '[gMASK]<sop>' }}" + _GLM_LAST + "{%- set off = enable_thinking is defined"
        " and not enable_thinking %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '<|user|>\n' + m.content + ('/nothink' if off else '') }}"
        "{%- elif m.role == 'assistant' %}"
        "{{- '<|assistant|>\n<think></think>\n' + m.content.split('</think>')[-1].strip() }}"
        "{%- else %}{{- '<|system|>\n' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|assistant|>' + ('\n<think></think>' if off else '') }}{%- endif %}"
    ),
    "GLM-4.7-Flash": (
        "{{- '[gMASK]<sop>' }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- '<|assistant|></think>' + m.content.split('</think>')[-1].strip() }}"
        "{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' + ('</think>' if enable_thinking is"
        " defined and not enable_thinking else '<think>') }}{%- endif %}"
    ),
    "gpt-oss-120b": (
        "{{- '<|start|>system<|message|>" + _GPT_OSS_SYSTEM.replace("\n", "\\n") + "<|end|>' }}"
        "{%- for m in messages %}{%- if m.role == 'system' %}"
        "{{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}"
        "{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}"
        "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}"
        "{%- endif %}"
    ),
    "MiniMax-M2": (
        "{%- set system = messages[0].content if messages[0].role == 'system' else"
        " 'You are a helpful assistant.' %}{{- ']~!b[]~b]system\n' + system + '[e~[\n' }}"
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- ']~b]user\n' + m.content + '[e~[\n' }}{%- elif m.role == 'assistant' %}"
        "{{- ']~b]ai\n' + m.content.split('</think>')[-1].strip('\n') + '[e~[\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- ']~b]ai\n<think>\n' }}{%- endif %}"
    ),
    "Moonlight-16B-A3B-Instruct": _MOONSHOT.replace(
        "TEXT", "You are a helpful assistant provided by Moonshot-AI."
    ),
    "Kimi-K2-Instruct": _MOONSHOT.replace("TEXT", "You are a helpful assistant"),
}


@dataclass(frozen=True)
class Pair:
    """A published template and a named one. ``differences``: (description, regular expression in
    the published prompt, replacement in the named one); an addition matches an empty string.
    """

    published: str
    named: str
    differences: tuple[tuple[str, str, str], ...] = ()
    bos_eos: tuple[str, str] = ("<s>", "</s>")
    has_system: bool = True


_DS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_NO_THINK_PROMPT = ("the prompt opens no thought", "<think>\n$", "")
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_OFF = ("an empty thought if thinking is off", "<think>\nOFF$", _EMPTY_THOUGHT)
PAIRS = (
    Pair(
        "DeepSeek-V2-Lite-Chat", "deepseek", bos_eos=_DS,
        differences=(("no space before a reply", "Assistant: ", "Assistant:"),),
    ),
    Pair("DeepSeek-V3", "deepseek3", bos_eos=_DS),
    Pair("DeepSeek-R1", "deepseekr1", (_NO_THINK_PROMPT, _OFF), bos_eos=_DS),
    Pair(
        "Qwen2-57B-A14B-Instruct", "qwen",
        (("Qwen2.5's default system prompt", "system\nYou are a helpful", "system\nYou are Qwen, "
          "created by Alibaba Cloud. You are a helpful"),),
    ),
    Pair("Qwen2.5-7B-Instruct", "qwen"),
    Pair("Qwen3-30B-A3B", "qwen3"),
    Pair("Qwen3-30B-A3B-Instruct-2507", "qwen3_nothink"),
    Pair("Qwen3.5-35B-A3B", "qwen3_5", (_NO_THINK_PROMPT,)),
    Pair(
        "Mixtral-8x7B-Instruct-v0.1", "mistral", has_system=False,
        differences=(
            ("no space before [/INST]", r" \[/INST\]", "[/INST]"),
            ("a space before a reply", r"\[/INST\](?=.)", "[/INST] "),
        ),
    ),
    Pair("glm-4-9b-chat", "glm4"),
    Pair(
        "GLM-4.6", "glm4_moe",
        (
            ("no empty thought in earlier replies", r"<think></think>\n", ""),
            ("no /nothink after questions", "/nothink", ""),
            ("another empty thought", r"\n<think></think>$", _EMPTY_THOUGHT),
        ),
    ),
    Pair(
        "GLM-4.7-Flash", "glm4_7",
        (
            ("a line break after a role", r"(?<=<\|user\|>)|(?<=<\|system\|>)", "\n"),
            ("no end of thought in earlier replies", r"<\|assistant\|></think>(?=.)",
             "<|assistant|>\n"),
            ("the prompt opens no thought", "<think>$", ""),
        ),
    ),
    Pair(
        "gpt-oss-120b", "gpt_oss", bos_eos=("<|startoftext|>", "<|return|>"),
        differences=(
            ("no dates, effort and channels after the default system prompt",
             r"OpenAI\.\nKnowledge.*?(?=<\|end\|>)", "OpenAI."),
            ("a system prompt is no developer's message and replaces the default",
             r"<\|start\|>system(?:(?!<\|start\|>).)*<\|start\|>developer<\|message\|>"
             r"# Instructions\n\n(.*?)\n\n(?=<\|end\|>)", r"<|start|>system<|message|>\1"),
            ("no channel and no end in earlier replies",
             r"<\|channel\|>final<\|message\|>(.*?)<\|end\|>", r"\1"),
            ("an empty thought if thinking is off", "(?<=assistant)OFF$",
             "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"),
        ),
    ),
    Pair(
        "MiniMax-M2", "minimax2",
        (
            ("M2.1's default system prompt", r"You are a helpful assistant\.",
             "You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax."),
            _NO_THINK_PROMPT,
            _OFF,
        ),
    ),
    Pair("Moonlight-16B-A3B-Instruct", "moonlight"),
    Pair(
        "Kimi-K2-Instruct", "moonlight",
        (("Moonlight's default system prompt", "(?<=_middle.>)You are a helpful assistant(?=<)",
          "You are a helpful assistant provided by Moonshot-AI."),),
    ),
)  # fmt: skip
