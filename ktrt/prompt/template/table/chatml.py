"""ChatML: turns between ``<|im_start|>role`` and ``<|im_end|>``."""

from dataclasses import replace

from ktrt.prompt.template.table.spec import TemplateSpec, Thought

_HELPFUL = "You are a helpful assistant."

_PLAIN = TemplateSpec(
    system="<|im_start|>system\n{c}<|im_end|>\n",
    user="<|im_start|>user\n{c}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{c}<|im_end|>\n",
    stop_words=("<|im_end|>",),
    tokens=("<|im_start|>",),
)
# Differs from _PLAIN if the tokenizer's eos is another token.
_EOS = replace(_PLAIN, replaces_eos=True)
_REASONING = replace(_EOS, thought=Thought())
_BOTH_MARKS_STOP = replace(_EOS, stop_words=("<|im_end|>", "<|im_start|>"))

_QWEN = {
    "qwen": replace(
        _EOS,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        models="Qwen2, Qwen2.5",
    ),
    "qwen2_audio": replace(_EOS, default_system=_HELPFUL, models="Qwen2-Audio"),
    "qwen2_omni": replace(_EOS, default_system=_HELPFUL, models="Qwen2.5-Omni"),
    "qwen2_vl": replace(_EOS, default_system=_HELPFUL, models="Qwen2-VL, Qwen2.5-VL"),
    "qwen3": replace(_REASONING, models="Qwen3"),
    "qwen3_nothink": replace(_EOS, models="Qwen3-Instruct-2507, Qwen3-Next, Qwen3-Coder"),
    "qwen3_omni": replace(_REASONING, models="Qwen3-Omni-Thinking"),
    "qwen3_omni_nothink": replace(_EOS, models="Qwen3-Omni-Instruct"),
    "qwen3_vl": replace(_REASONING, models="Qwen3-VL-Thinking"),
    "qwen3_vl_nothink": replace(_EOS, models="Qwen3-VL-Instruct"),
    "qwen3_5": replace(_REASONING, models="Qwen3.5"),
    "qwen3_5_nothink": replace(_EOS, models="Qwen3.5, without thoughts"),
    "qwen3_6": replace(_REASONING, models="Qwen3.6"),
}

_WITH_EOS = {
    "chatml": replace(_BOTH_MARKS_STOP, models="any with ChatML"),
    "chatml_de": replace(
        _BOTH_MARKS_STOP,
        default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
        models="any with ChatML, German",
    ),
    "dbrx": replace(
        _EOS,
        default_system=(
            "You are DBRX, created by Databricks. You were last updated in December 2023. "
            "You answer questions based on information available up to that point.\n"
            "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough "
            "responses to more complex and open-ended questions.\nYou assist with various tasks, "
            "from writing to coding (using markdown for code blocks — remember to use ``` with "
            "code, JSON, and tables).\n(You do not have real-time data access or code execution "
            "capabilities. You avoid stereotyping and provide balanced perspectives on "
            "controversial topics. You do not provide song lyrics, poems, or news articles and "
            "do not divulge details of your training data.)\nThis is your system prompt, "
            "guiding your responses. Do not reference it, just respond to the user. If you find "
            "yourself talking about this message, stop. You should be responding appropriately "
            "and usually that means not mentioning this.\nYOU DO NOT MENTION ANY OF THIS "
            "INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION IS DIRECTLY PERTINENT TO THE "
            "USER'S QUERY."
        ),
        models="DBRX",
    ),
    "keye_vl": replace(_REASONING, models="Keye-VL"),
    "lfm2": replace(_EOS, default_system="You are a helpful AI assistant.", models="LFM2, LFM2.5"),
    "lfm2_vl": replace(
        _EOS,
        default_system="You are a helpful multimodal assistant by Liquid AI.",
        models="LFM2.5-VL",
    ),
    "llava_next_qwen": replace(_EOS, default_system=_HELPFUL, models="LLaVA-NeXT (Qwen)"),
    "mimo": replace(_REASONING, default_system=_HELPFUL, models="MiMo"),
    "mimo_v2": replace(
        _REASONING,
        default_system="You are MiMo, a helpful AI assistant engineered by Xiaomi.",
        thought=Thought("<think>", "</think>"),
        models="MiMo-V2-Flash",
    ),
    "mimo_vl": replace(
        _REASONING,
        default_system="You are MiMo, an AI assistant developed by Xiaomi.",
        models="MiMo-VL",
    ),
    "phi4": replace(
        _EOS,
        system="<|im_start|>system<|im_sep|>{c}<|im_end|>",
        user="<|im_start|>user<|im_sep|>{c}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{c}<|im_end|>",
        tokens=("<|im_start|>", "<|im_sep|>"),
        models="Phi-4",
    ),
}

_OWN_EOS = {
    "cpm4": replace(_PLAIN, prefix="{bos}", models="MiniCPM4"),
    "ernie": TemplateSpec(
        system="<|im_start|>system\n{c}<|im_end|>\n\n",
        user="<|im_start|>user\n{c}<|im_end|>\n\n<|im_start|>assistant\n",
        assistant="{c}<|im_end|>\n\n",
        default_system="<global_setting>\nthink_mode=True\n</global_setting>",
        stop_words=("<|im_end|>",),
        tokens=("<|im_start|>",),
        models="ERNIE-4.5-Thinking",
    ),
    "falcon_h1": replace(
        _PLAIN,
        prefix="{bos?}",
        stop_words=("<|im_end|>", "<|end_of_text|>"),
        models="Falcon-H1",
    ),
    "intern2": replace(
        _PLAIN,
        prefix="{bos}",
        default_system=(
            "You are an AI assistant whose name is InternLM (书生·浦语).\n"
            "- InternLM (书生·浦语) is a conversational language model that is developed by "
            "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, "
            "and harmless.\n"
            "- InternLM (书生·浦语) can understand and communicate fluently in the language "
            "chosen by the user such as English and 中文."
        ),
        models="InternLM2, InternLM3",
    ),
    # Built on Qwen and on InternLM: Qwen's tokenizer has no bos.
    "intern_s1": replace(_PLAIN, prefix="{bos?}", models="Intern-S1"),
    "intern_vl": replace(
        _PLAIN,
        prefix="{bos?}",
        default_system=(
            "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合"
            "开发的多模态大语言模型。"
        ),
        models="InternVL2.5, InternVL3, InternVL3.5",
    ),
    "llava_next_video_yi": replace(_PLAIN, models="LLaVA-NeXT-Video (Yi)"),
    "llava_next_yi": replace(_PLAIN, models="LLaVA-NeXT (Yi)"),
    "minicpm_o": replace(
        _PLAIN,
        default_system=(
            "You are a helpful assistant. You can accept audio and text input and output voice "
            "and text."
        ),
        models="MiniCPM-o",
    ),
    "minicpm_v": replace(_PLAIN, default_system=_HELPFUL, models="MiniCPM-V"),
    "minicpm_v_4_6": replace(_PLAIN, default_system=_HELPFUL, models="MiniCPM-V 4.6"),
    "opencoder": replace(
        _PLAIN,
        default_system="You are OpenCoder, created by OpenCoder Team.",
        models="OpenCoder",
    ),
    "sailor": replace(
        _PLAIN,
        user="<|im_start|>question\n{c}<|im_end|>\n<|im_start|>answer\n",
        default_system=(
            "You are an AI assistant named Sailor created by Sea AI Lab. "
            "Your answer should be friendly, unbiased, faithful, informative and detailed."
        ),
        models="Sailor",
    ),
    "smollm": replace(_PLAIN, models="SmolLM"),
    "smollm2": replace(
        _PLAIN,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        models="SmolLM2",
    ),
    "yi": replace(_PLAIN, models="Yi"),
}

CHATML_TEMPLATES = {**_QWEN, **_WITH_EOS, **_OWN_EOS}
