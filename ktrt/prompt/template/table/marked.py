"""Templates whose turns begin or end with special tokens other than ChatML's."""

from dataclasses import replace

from ktrt.prompt.template.table.spec import TemplateSpec, Thought

_TAGS = Thought("<think>", "</think>")

_DEEPSEEK3 = TemplateSpec(
    prefix="{bos}",
    user="<｜User｜>{c}<｜Assistant｜>",
    tokens=("<｜User｜>", "<｜Assistant｜>"),
)
_DEEPSEEK = {
    "deepseek3": replace(_DEEPSEEK3, models="DeepSeek-V2-0628, DeepSeek-V2.5, DeepSeek-V3"),
    "deepseekr1": replace(_DEEPSEEK3, thought=Thought(), models="DeepSeek-R1, DeepSeek-V3.1"),
}

_GLM4 = TemplateSpec(
    prefix="[gMASK]<sop>",
    system="<|system|>\n{c}",
    user="<|user|>\n{c}<|assistant|>",
    assistant="\n{c}",
    stop_words=("<|user|>", "<|observation|>"),
    tokens=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
)
_GLM4V = replace(_GLM4, optional_stop_words=("</answer>",), thought=Thought())
_GLM47 = replace(_GLM4, thought=Thought("<think>", "</think>", empty="</think>"))
_GLM = {
    "aeva": replace(
        _GLM47,
        default_system=(
            "You are an AI assistant named Aeva created by Zongzhi Lou. "
            "Your answer should be friendly, unbiased, faithful, informative and detailed."
        ),
        models="Aeva",
    ),
    "chatglm3": TemplateSpec(
        prefix="{token [gMASK]}{token sop}",
        system="{token <|system|>}\n{|}{c}",
        user="{token <|user|>}\n{|}{c}{token <|assistant|>}",
        assistant="\n{|}{c}",
        stop_words=("<|user|>", "<|observation|>"),
        tokens=("[gMASK]", "sop", "<|system|>", "<|assistant|>"),
        models="ChatGLM3",
    ),
    "glm4": replace(_GLM4, models="GLM-4"),
    "glm4_5v": replace(_GLM4V, models="GLM-4.5V, GLM-4.6V"),
    "glm4_7": replace(_GLM47, models="GLM-4.7-Flash"),
    "glm4_moe": replace(_GLM4, thought=Thought(), models="GLM-4.5, GLM-4.5-Air"),
    "glm4v": replace(_GLM4V, models="GLM-4.1V"),
    "glm_ocr": replace(_GLM4, models="GLM-OCR"),
    "glmz1": replace(_GLM4, thought=Thought(), models="GLM-Z1"),
}

_MOONSHOT = TemplateSpec(
    system="<|im_system|>system<|im_middle|>{c}<|im_end|>",
    user="<|im_user|>user<|im_middle|>{c}<|im_end|><|im_assistant|>assistant<|im_middle|>",
    assistant="{c}<|im_end|>",
    stop_words=("<|im_end|>",),
    tokens=("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
)
_KIMI = {
    "kimi_vl": replace(
        _MOONSHOT,
        default_system="You are a helpful assistant",
        thought=Thought("◁think▷", "◁/think▷"),
        models="Kimi-VL",
    ),
    "moonlight": replace(
        _MOONSHOT,
        default_system="You are a helpful assistant provided by Moonshot-AI.",
        replaces_eos=True,
        models="Moonlight, Kimi-K2",
    ),
}

_MINIMAX = {
    "minimax1": TemplateSpec(
        system="<beginning_of_sentence>system ai_setting=assistant\n{c}<end_of_sentence>\n",
        user=(
            "<beginning_of_sentence>user name=user\n{c}<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n"
        ),
        assistant="{c}<end_of_sentence>\n",
        default_system="You are a helpful assistant.",
        stop_words=("<end_of_sentence>",),
        tokens=("<beginning_of_sentence>",),
        models="MiniMax-Text-01, MiniMax-M1",
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
        models="MiniMax-M2, MiniMax-M2.1, MiniMax-M2.5",
    ),
}

_GPT_OSS = {
    "gpt_oss": TemplateSpec(
        system="<|start|>system<|message|>{c}<|end|>",
        user="<|start|>user<|message|>{c}<|end|><|start|>assistant",
        assistant="{c}",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        tokens=("<|start|>", "<|message|>", "<|end|>", "<|channel|>"),
        thought=Thought(
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        models="gpt-oss",
    ),
}

_LLAMA3 = TemplateSpec(
    prefix="{bos}",
    system="<|start_header_id|>system<|end_header_id|>\n\n{c}<|eot_id|>",
    user=(
        "<|start_header_id|>user<|end_header_id|>\n\n{c}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    assistant="{c}<|eot_id|>",
    stop_words=("<|eot_id|>",),
    optional_stop_words=("<|eom_id|>",),  # since Llama 3.1
    replaces_eos=True,
    tokens=("<|start_header_id|>", "<|end_header_id|>"),
)
_LLAMA = {
    "llama3": replace(_LLAMA3, models="Llama 3, Llama 3.1, Llama 3.2, Llama 3.3"),
    "llama4": TemplateSpec(
        prefix="{bos}",
        system="<|header_start|>system<|header_end|>\n\n{c}<|eot|>",
        user=(
            "<|header_start|>user<|header_end|>\n\n{c}<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n"
        ),
        assistant="{c}<|eot|>",
        stop_words=("<|eot|>", "<|eom|>"),
        replaces_eos=True,
        tokens=("<|header_start|>", "<|header_end|>"),
        models="Llama 4",
    ),
    "llava_next_llama3": replace(_LLAMA3, models="LLaVA-NeXT (Llama 3)"),
    "mllama": replace(_LLAMA3, models="Llama 3.2 Vision"),
    "openchat-3.6": TemplateSpec(
        prefix="{bos}",
        user=(
            "<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{c}<|eot_id|>"
            "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n"
        ),
        stop_words=("<|eot_id|>",),
        tokens=("<|start_header_id|>", "<|end_header_id|>"),
        models="OpenChat 3.6",
    ),
}

_GEMMA1 = TemplateSpec(
    prefix="{bos}",
    system="{c}\n\n",
    user="<start_of_turn>user\n{c}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{c}<end_of_turn>\n",
    stop_words=("<end_of_turn>",),
    replaces_eos=True,
    tokens=("<start_of_turn>",),
    system_in_user=True,
)
_GEMMA4 = TemplateSpec(
    prefix="{bos}",
    system="<|turn>system\n<|think|>{c}<turn|>\n",
    user="<|turn>user\n{c}<turn|>\n<|turn>model\n",
    assistant="{c}<turn|>\n",
    default_system="You are a helpful assistant.",
    stop_words=("<turn|>",),
    replaces_eos=True,
    tokens=("<|turn>", "<|think|>", "<|channel>", "<channel|>"),
    thought=Thought("<|channel>thought\n", "<channel|>"),
)
_GEMMA = {
    "gemma": replace(_GEMMA1, models="Gemma, CodeGemma"),
    "gemma2": replace(
        _GEMMA1, stop_words=("<eos>", "<end_of_turn>"), replaces_eos=False, models="Gemma 2"
    ),
    "gemma3": replace(_GEMMA1, models="Gemma 3"),
    "gemma3n": replace(_GEMMA1, models="Gemma 3n"),
    "gemma4": replace(_GEMMA4, models="Gemma 4"),
    "gemma4n": replace(_GEMMA4, models="Gemma 4 E2B, Gemma 4 E4B"),
    "paligemma": TemplateSpec(
        prefix="{bos}", user="{c}\n", system_in_user=True, models="PaliGemma"
    ),
    "paligemma_chat": replace(_GEMMA1, system="{c}", models="PaliGemma, chat"),
}

_GRANITE = TemplateSpec(
    system="<|start_of_role|>system<|end_of_role|>{c}<|end_of_text|>\n",
    user=(
        "<|start_of_role|>user<|end_of_role|>{c}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    ),
    assistant="{c}<|end_of_text|>\n",
    tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
)
_HUNYUAN = {
    "hunyuan": TemplateSpec(
        prefix="<|startoftext|>",
        system="{c}<|extra_4|>",
        user="{c}<|extra_0|>",
        assistant="{c}<|eos|>",
        stop_words=("<|eos|>",),
        tokens=("<|startoftext|>", "<|extra_0|>", "<|extra_4|>"),
        models="Hunyuan",
    ),
    "hunyuan_small": TemplateSpec(
        prefix="<｜hy_begin▁of▁sentence｜>",
        system="{c}<｜hy_place▁holder▁no▁3｜>",
        user="<｜hy_User｜>{c}<｜hy_place▁holder▁no▁8｜>",
        assistant="{c}<｜hy_place▁holder▁no▁2｜>",
        stop_words=("<｜hy_place▁holder▁no▁2｜>",),
        tokens=(
            "<｜hy_begin▁of▁sentence｜>",
            "<｜hy_User｜>",
            "<｜hy_place▁holder▁no▁3｜>",
            "<｜hy_place▁holder▁no▁8｜>",
        ),
        models="HY-MT1.5",
    ),
    "hy3": TemplateSpec(
        prefix="{bos}",
        user="<｜hy_User｜>{c}<｜hy_Assistant｜>",
        assistant="{c}<｜hy_eos｜>",
        stop_words=("<｜hy_eos｜>",),
        replaces_eos=True,
        tokens=("<｜hy_User｜>", "<｜hy_Assistant｜>"),
        thought=_TAGS,
        models="Hy3",
    ),
}

_PHI3 = TemplateSpec(
    system="<|system|>\n{c}<|end|>\n",
    user="<|user|>\n{c}<|end|>\n<|assistant|>\n",
    assistant="{c}<|end|>\n",
    stop_words=("<|end|>",),
    replaces_eos=True,
    tokens=("<|user|>", "<|assistant|>"),
)
_PHI = {
    "phi": replace(_PHI3, models="Phi-3, Phi-3.5"),
    "phi4_mini": replace(
        _PHI3,
        system="<|system|>{c}<|end|>",
        user="<|user|>{c}<|end|><|assistant|>",
        assistant="{c}<|end|>",
        models="Phi-4-mini",
    ),
    # LLaMA-Factory's prefix <|endoftext|> encodes to nothing because of the way it is written.
    "phi_small": replace(_PHI3, models="Phi-3-small"),
}

_OTHERS = {
    "bailing_v2": TemplateSpec(
        system="<role>SYSTEM</role>{c}<|role_end|>",
        user="<role>HUMAN</role>{c}<|role_end|><role>ASSISTANT</role>",
        assistant="{c}<|role_end|>",
        stop_words=("<|endoftext|>",),
        tokens=("<|role_end|>",),
        models="Ling 2, Ring 2",
    ),
    "cohere": TemplateSpec(
        prefix="{bos}",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{c}<|END_OF_TURN_TOKEN|>",
        user=(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{c}<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
        tokens=(
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        models="Command R, Aya",
    ),
    "dots_ocr": TemplateSpec(
        system="<|system|>{c}<|endofsystem|>\n",
        user="<|user|>{c}<|endofuser|><|assistant|>",
        assistant="{c}<|endofassistant|>",
        stop_words=("<|endofassistant|>",),
        tokens=("<|system|>", "<|endofsystem|>", "<|user|>", "<|endofuser|>", "<|assistant|>"),
        models="dots.ocr",
    ),
    "granite3": replace(_GRANITE, models="Granite 3"),
    "granite4": replace(
        _GRANITE,
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
        stop_words=("<|end_of_text|>",),
        models="Granite 4",
    ),
    "seed_oss": TemplateSpec(
        system="{bos}system\n{c}{eos}",
        user="{bos}user\n{c}{eos}{bos}assistant\n",
        thought=Thought("<seed:think>", "</seed:think>"),
        models="Seed-OSS",
    ),
    "starchat": TemplateSpec(
        system="<|system|>\n{c}<|end|>\n",
        user="<|user|>\n{c}<|end|>\n<|assistant|>",
        assistant="{c}<|end|>\n",
        stop_words=("<|end|>",),
        tokens=("<|system|>", "<|user|>", "<|assistant|>"),
        models="StarChat",
    ),
    "telechat2": TemplateSpec(
        system="<_system>{c}",
        user="<_user>{c}<_bot>",
        default_system=(
            "你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和"
            "中国电信人工智能研究院（TeleAI）研发的人工智能助手。"
        ),
        tokens=("<_system>", "<_user>", "<_bot>"),
        models="TeleChat2",
    ),
    "youtu": TemplateSpec(
        prefix="{bos}",
        user="<|User|>{c}<|Assistant|>",
        assistant="{c}<|end_of_text|>",
        stop_words=("<|end_of_text|>",),
        replaces_eos=True,
        tokens=("<|User|>", "<|Assistant|>"),
        thought=Thought(),
        models="Youtu-LLM",
    ),
    "youtu_vl": TemplateSpec(
        system="<|begin_of_text|>system\n{c}<|end_of_text|>\n",
        user="<|begin_of_text|>user\n{c}<|end_of_text|>\n<|begin_of_text|>assistant\n",
        assistant="{c}<|end_of_text|>\n",
        default_system="You are a helpful assistant.",
        stop_words=("<|end_of_text|>",),
        tokens=("<|begin_of_text|>",),
        models="Youtu-VL",
    ),
    "yuan": TemplateSpec(
        user="{c}{token <sep>}",
        assistant="{c}<eod>\n",
        stop_words=("<eod>",),
        tokens=("<sep>",),
        models="Yuan 2",
    ),
}

MARKED_TEMPLATES = {
    **_DEEPSEEK,
    **_GLM,
    **_KIMI,
    **_MINIMAX,
    **_GPT_OSS,
    **_LLAMA,
    **_GEMMA,
    **_HUNYUAN,
    **_PHI,
    **_OTHERS,
}
