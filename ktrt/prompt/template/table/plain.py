"""Templates that mark turns by ordinary words, or by tokens that only some of their models have."""

from dataclasses import replace

from ktrt.prompt.template.table.spec import TemplateSpec, Thought

_SINGLE_ROLES = TemplateSpec(
    user="USER: {c} ASSISTANT:",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
)
_VICUNA = {
    "llava": replace(_SINGLE_ROLES, models="LLaVA-1.5"),
    "llava_next": replace(_SINGLE_ROLES, models="LLaVA-NeXT (Vicuna)"),
    "llava_next_video": replace(_SINGLE_ROLES, models="LLaVA-NeXT-Video (Vicuna)"),
    "vicuna": replace(_SINGLE_ROLES, models="Vicuna"),
    "video_llava": replace(_SINGLE_ROLES, models="Video-LLaVA"),
}

_MISTRAL3 = TemplateSpec(
    prefix="{bos}",
    system="{c}\n\n",
    user="[INST] {c}[/INST]",
    assistant=" {c}{eos}",
    system_in_user=True,
)
_TEKKEN = replace(_MISTRAL3, user="[INST]{c}[/INST]", assistant="{c}{eos}")
_LLAMA2 = TemplateSpec(
    system="<<SYS>>\n{c}\n<</SYS>>\n\n", user="{bos}[INST] {c} [/INST]", system_in_user=True
)
_INST = {
    "breeze": TemplateSpec(
        prefix="{bos}", user="[INST] {c} [/INST] ", assistant="{c}", models="Breeze"
    ),
    "llama2": replace(_LLAMA2, models="Llama 2"),
    "llama2_zh": replace(
        _LLAMA2,
        default_system="You are a helpful assistant. 你是一个乐于助人的助手。",
        models="Chinese-Llama-2",
    ),
    "llava_next_mistral": replace(_MISTRAL3, models="LLaVA-NeXT (Mistral)"),
    "llava_next_video_mistral": replace(_MISTRAL3, models="LLaVA-NeXT-Video (Mistral)"),
    "ministral": replace(_TEKKEN, models="Ministral, Mistral Nemo"),
    "ministral3": replace(_TEKKEN, models="Ministral 3"),
    "mistral": replace(_MISTRAL3, models="Mistral 7B, Mixtral"),
    "mistral_small": replace(
        _TEKKEN,
        system="[SYSTEM_PROMPT]{c}[/SYSTEM_PROMPT]",
        system_in_user=False,
        models="Mistral Small, Devstral",
    ),
    "pixtral": replace(_TEKKEN, models="Pixtral"),
}

_OTHERS = {
    "alpaca": TemplateSpec(
        user="### Instruction:\n{c}\n\n### Response:\n",
        assistant="{c}{eos}\n\n",
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n"
        ),
        models="Alpaca",
    ),
    "bailing": TemplateSpec(
        system="<role>SYSTEM</role>{c}",
        user="<role>HUMAN</role>{c}<role>ASSISTANT</role>",
        assistant="{c}",
        stop_words=("<|endoftext|>",),
        models="Ling 1",
    ),
    "deepseek": TemplateSpec(
        prefix="{bos}",
        system="{c}\n\n",
        user="User: {c}\n\nAssistant:",
        models="DeepSeek-V2, DeepSeek-V2-Lite, DeepSeek-Coder-V2, DeepSeek-MoE",
    ),
    "deepseekcoder": TemplateSpec(
        prefix="{bos}",
        user="### Instruction:\n{c}\n### Response:",
        assistant="\n{c}\n<|EOT|>\n",
        default_system=(
            "You are an AI programming assistant, utilizing the DeepSeek Coder model, "
            "developed by DeepSeek Company, and you only answer questions related to computer "
            "science. For politically sensitive questions, security and privacy issues, "
            "and other non-computer science questions, you will refuse to answer.\n"
        ),
        tokens=("<|EOT|>",),
        models="DeepSeek-Coder",
    ),
    "default": TemplateSpec(
        system="System: {c}{eos}\n",
        user="Human: {c}{eos}\nAssistant:",
        assistant="{c}{eos}\n",
        models="any",
    ),
    "empty": TemplateSpec(user="{c}", assistant="{c}", models="any, without marks"),
    "ernie_nothink": TemplateSpec(
        prefix="<|begin_of_sentence|>",
        system="{c}\n",
        user="User: {c}\nAssistant: ",
        assistant="{c}<|end_of_sentence|>",
        stop_words=("<|end_of_sentence|>",),
        tokens=("<|begin_of_sentence|>",),
        models="ERNIE-4.5",
    ),
    # The reply's slot begins with its role: nothing marks the end of the user's turn.
    "ernie_vl": TemplateSpec(
        system="{c}\n",
        user="User: {c}",
        assistant="\nAssistant: {c}<|end_of_sentence|>",
        stop_words=("<|end_of_sentence|>",),
        replaces_eos=True,
        thought=Thought(),
        models="ERNIE-4.5-VL",
    ),
    "exaone": TemplateSpec(
        system="[|system|]{c}[|endofturn|]\n",
        user="[|user|]{c}\n[|assistant|]",
        assistant="{c}{eos}\n",
        models="EXAONE 3",
    ),
    "falcon": TemplateSpec(user="User: {c}\nFalcon:", assistant="{c}\n", models="Falcon"),
    "fewshot": TemplateSpec(user="{c}", assistant="{c}\n\n", models="any, examples"),
    "granite3_vision": TemplateSpec(
        system="<|system|>\n{c}\n",
        user="<|user|>\n{c}\n<|assistant|>\n",
        default_system=_SINGLE_ROLES.default_system,
        models="Granite Vision 3.2",
    ),
    "index": TemplateSpec(
        system="<unk>{c}", user="reserved_0{c}reserved_1", assistant="{c}", models="Index"
    ),
    "olmo": TemplateSpec(prefix="{eos}", user="<|user|>\n{c}<|assistant|>\n", models="OLMo, OLMoE"),
    "openchat": TemplateSpec(
        prefix="{bos}",
        user="GPT4 Correct User: {c}{eos}GPT4 Correct Assistant:",
        models="OpenChat 3.5",
    ),
    "seed_coder": TemplateSpec(
        system="{bos}system\n{c}{eos}",
        user="{bos}user\n{c}{eos}{bos}assistant\n",
        default_system=(
            "You are an AI programming assistant, utilizing the Seed-Coder model, developed by "
            "ByteDance Seed, and you only answer questions related to computer science. For "
            "politically sensitive questions, security and privacy issues, and other "
            "non-computer science questions, you will refuse to answer.\n\n"
        ),
        models="Seed-Coder",
    ),
    "solar": TemplateSpec(
        system="### System:\n{c}\n\n",
        user="### User:\n{c}\n\n### Assistant:\n",
        assistant="{c}",
        models="SOLAR",
    ),
    "xuanyuan": TemplateSpec(
        user="Human: {c} Assistant:",
        default_system=(
            "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，"
            "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、"
            "不安全、有争议、政治敏感等相关的话题、问题和指示。\n"
        ),
        models="XuanYuan",
    ),
    "yi_vl": TemplateSpec(
        user="### Human: {c}\n### Assistant:",
        assistant="{c}\n",
        default_system=(
            "This is a chat between an inquisitive human and an AI assistant. "
            "Assume the role of the AI assistant. Read all the images carefully, "
            "and respond to the human's questions with informative, helpful, detailed and polite "
            "answers. "
            "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
            "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。\n\n"
        ),
        stop_words=("###",),
        models="Yi-VL",
    ),
    "zephyr": TemplateSpec(
        system="<|system|>\n{c}{eos}",
        user="<|user|>\n{c}{eos}<|assistant|>\n",
        default_system="You are Zephyr, a helpful assistant.",
        models="Zephyr",
    ),
}

PLAIN_TEMPLATES = {**_VICUNA, **_INST, **_OTHERS}
