"""How the named templates write tools, calls and results, as data.

The strings are LLaMA-Factory 0.9.5's: an adapter that was trained with tools knows exactly these,
even where they differ from the model's own format. Some surprise: ``glm4_moe`` does not close a
call, ``seed_oss`` not the tag of its name, and ``BETWEEN_RESULTS`` joins the results of one turn in
every template.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"


@dataclass(frozen=True)
class Calls:
    """The text of an assistant's calls: each as ``one``, joined by ``between``, inside ``around``.

    Marks: ``{name}`` is the function's name, ``{json name}`` the same as JSON, ``{arguments}`` all
    arguments: as a JSON object, or, if ``argument`` is set, each in that form (marks ``{key}`` and
    ``{value}``), joined by ``between_arguments``. ``values`` tells how a value is written: JSON
    ("json"); the same but texts as they are ("text"), in quotes without escapes ("quoted"), or as
    Gemma writes them, keys sorted ("gemma"). ``around_one`` replaces ``around`` for a single call;
    ``most`` is the most calls of one turn.
    """

    one: str
    between: str = "\n"
    around: str = "{calls}"
    around_one: str = ""
    argument: str = ""
    between_arguments: str = ""
    values: Literal["json", "text", "quoted", "gemma"] = "json"
    most: int | None = None


@dataclass(frozen=True)
class ToolFormat:
    """The text that follows the system prompt, and the text of calls.

    ``prompt`` holds ``{tools}``, and may hold ``{names}`` and ``{date}``. ``tool`` is the text of
    one tool: ``{json}`` is its JSON, ``{name}`` its name; "" stands for one JSON list of all;
    "listing" and "gemma" are texts that no slot can describe. ``wrapped``: the JSON has OpenAI's
    outer mapping. ``indent`` as in ``json.dumps``.
    """

    prompt: str
    calls: Calls
    tool: str = ""
    between: str = ""
    wrapped: bool = False
    indent: int | None = None


@dataclass(frozen=True)
class ToolSlots:
    """A template's tool format and its slots for calls and results, with the marks of
    ``TemplateSpec``. An empty slot stands for the assistant's or the user's.
    """

    format: str = "default"
    calls: str = ""
    results: str = ""


_JSON_CALL = '{"name": {json name}, "arguments": {arguments}}'
_QWEN_CALLS = Calls(f"<tool_call>\n{_JSON_CALL}\n</tool_call>")
_LING_PROMPT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n"
    "</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "default": ToolFormat(
        prompt=(
            "You have access to the following tools:\n{tools}"
            "Use the following format if using a tool:\n```\n"
            "Action: tool name (one of [{names}])\n"
            "Action Input: the input to the tool, in a JSON format representing the kwargs "
            '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
        ),
        tool="listing",
        calls=Calls("Action: {name}\nAction Input: {arguments}"),
    ),
    "gemma4": ToolFormat(
        prompt="{tools}",
        tool="gemma",
        between="\n",
        calls=Calls(
            "<|tool_call>call:{name}{{arguments}}<tool_call|>",
            between="",
            argument="{key}:{value}",
            between_arguments=",",
            values="gemma",
        ),
    ),
    "glm4": ToolFormat(
        prompt=(
            "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型"
            "开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{tools}"
        ),
        tool="\n\n## {name}\n\n{json}\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
        indent=4,
        calls=Calls("{name}\n{arguments}", most=1),
    ),
    "glm4_moe": ToolFormat(
        prompt=(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n"
            "<tools>{tools}\n</tools>\n\nFor each function call, output the function name and "
            "arguments within the following XML format:\n<tool_call>{function-name}\n"
            "<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
            "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n"
            "...\n</tool_call>\n"
        ),
        tool="\n{json}",
        wrapped=True,
        calls=Calls(
            "\n<tool_call>{name}{arguments}",
            argument="\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>",
            values="text",
        ),
    ),
    "lfm2": ToolFormat(
        prompt="List of tools: <|tool_list_start|>{tools}<|tool_list_end|>",
        calls=Calls(
            "{name}({arguments})",
            between=", ",
            around="<|tool_call_start|>[{calls}]<|tool_call_end|>",
            argument="{key}={value}",
            between_arguments=", ",
            values="quoted",
        ),
    ),
    "ling": ToolFormat(
        prompt=_LING_PROMPT + "\ndetailed thinking off",
        tool="\n{json}",
        wrapped=True,
        calls=_QWEN_CALLS,
    ),
    "llama3": ToolFormat(
        prompt=(
            "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
            "You have access to the following functions. To call a function, please respond with "
            'JSON for a function call. Respond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}. Do not use variables.\n\n{tools}"
        ),
        tool="{json}\n\n",
        wrapped=True,
        indent=4,
        calls=Calls(
            '{"name": {json name}, "parameters": {arguments}}',
            between=", ",
            around="[{calls}]",
            around_one="{calls}",
        ),
    ),
    "minimax1": ToolFormat(
        prompt=(
            "You are provided with these tools:\n<tools>\n{tools}</tools>\n\n"
            "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, "
            "and provide tool-name and json-object of arguments, following the format below:\n"
            '<tool_calls>\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n'
            "</tool_calls>"
        ),
        tool="{json}\n",
        calls=Calls(_JSON_CALL, around="<tool_calls>\n{calls}\n</tool_calls>"),
    ),
    "minimax2": ToolFormat(
        prompt=(
            "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
            "Here are the tools available in JSONSchema format:\n\n<tools>\n{tools}</tools>\n\n"
            "When making tool calls, use XML format to invoke tools and pass parameters:\n\n"
            '<minimax:tool_call>\n<invoke name="tool-name-1">\n'
            '<parameter name="param-key-1">param-value-1</parameter>\n'
            '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n'
            "</minimax:tool_call>"
        ),
        tool="<tool>{json}</tool>\n",
        calls=Calls(
            '<invoke name="{name}">{arguments}\n</invoke>',
            argument='\n<parameter name="{key}">{value}</parameter>',
            values="text",
        ),
    ),
    "mistral": ToolFormat(
        prompt="[AVAILABLE_TOOLS] {tools}[/AVAILABLE_TOOLS]",
        wrapped=True,
        calls=Calls(_JSON_CALL, between=", ", around="[{calls}]"),
    ),
    "phi4_mini": ToolFormat(
        prompt="<|tool|>{tools}<|/tool|>",
        calls=Calls("Action: {name}\nAction Input: {arguments}"),
    ),
    "qwen": ToolFormat(
        prompt="\n\n" + _LING_PROMPT, tool="\n{json}", wrapped=True, calls=_QWEN_CALLS
    ),
    "qwen3_5": ToolFormat(
        prompt=(
            "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>{tools}\n"
            "</tools>\n\nIf you choose to call a function ONLY reply in the following format with "
            "NO suffix:\n\n<tool_call>\n<function=example_function_name>\n"
            "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
            "<parameter=example_parameter_2>\nThis is the value for the second parameter\n"
            "that can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
            "<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: "
            "an inner <function=...></function> block must be nested within "
            "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
            "- You may provide optional reasoning for your function call in natural language "
            "BEFORE the function call, but NOT after\n"
            "- If there is no function call available, answer the question like normal with your "
            "current knowledge and do not tell the user about function calls\n</IMPORTANT>"
        ),
        tool="\n{json}",
        calls=Calls(
            "<tool_call>\n<function={name}>{arguments}\n</function>\n</tool_call>",
            argument="\n<parameter={key}>\n{value}\n</parameter>",
            values="text",
        ),
    ),
    "seed_oss": ToolFormat(
        prompt=(
            "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to "
            "assist with the user query.Tool List:\nYou are authorized to use the following tools "
            "(described in JSON Schema format). Before performing any task, you must decide how "
            "to call them based on the descriptions and parameters of these tools.\n{tools}\n"
            "工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
            "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>"
            "This is the value for the second parameter\nthat can span\nmultiple lines</parameter>"
            "\n</function>\n</seed:tool_call>\n"
        ),
        calls=Calls(
            "\n<seed:tool_call>\n<function={name}{arguments}\n</function>\n</seed:tool_call>",
            argument="\n<parameter={key}>{value}</parameter>",
            values="text",
        ),
    ),
}

_CHATML_TOOL = ToolSlots(results="<|im_start|>tool\n{c}<|im_end|>\n<|im_start|>assistant\n")
_GEMMA_TOOL = ToolSlots(
    results="<start_of_turn>tool\n{c}<end_of_turn>\n<start_of_turn>model\n",
)
_GEMMA4_TOOL = ToolSlots(
    "gemma4",
    calls="<|tool>{c}<tool|>",
    results="<|turn>tool\n{c}<turn|>\n<|turn>model\n",
)
_GLM4 = ToolSlots("glm4", calls="{c}", results="<|observation|>\n{c}<|assistant|>")
_GLM4_MOE = replace(_GLM4, format="glm4_moe")
_LFM2 = ToolSlots(
    "lfm2",
    results=(
        "<|im_start|>tool\n<|tool_response_start|>{c}<|tool_response_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
)
_LLAMA3 = ToolSlots(
    "llama3",
    results=(
        "<|start_header_id|>ipython<|end_header_id|>\n\n{c}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
)
_MISTRAL = ToolSlots(
    "mistral",
    calls="[TOOL_CALLS] {c}{eos}",
    results='[TOOL_RESULTS] {"content": {c}}[/TOOL_RESULTS]',
)
_TEKKEN = ToolSlots(
    "mistral",
    calls="[TOOL_CALLS]{c}{eos}",
    results='[TOOL_RESULTS]{"content": {c}}[/TOOL_RESULTS]',
)
_QWEN = ToolSlots(
    "qwen",
    results=(
        "<|im_start|>user\n<tool_response>\n{c}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
)
_QWEN3_5 = replace(_QWEN, format="qwen3_5")

# Templates that are not here have ToolSlots().
TOOL_SLOTS: Mapping[str, ToolSlots] = {
    "bailing": ToolSlots(results="<role>OBSERVATION</role>{c}<role>ASSISTANT</role>"),
    "bailing_v2": ToolSlots(
        "ling",
        results=(
            "<role>OBSERVATION</role>\n<tool_response>\n{c}\n</tool_response><|role_end|>"
            "<role>ASSISTANT</role>"
        ),
    ),
    "chatglm3": ToolSlots(
        "glm4",
        calls="{c}",
        results="{token <|observation|>}\n{|}{c}{token <|assistant|>}",
    ),
    "ernie": ToolSlots(
        results="<|im_start|>tool\n{c}<|im_end|>\n\n<|im_start|>assistant\n",
    ),
    "granite4": ToolSlots(
        results=(
            "<|start_of_role|>tool<|end_of_role|>{c}<|end_of_text|>\n<|start_of_role|>assistant\n"
        ),
    ),
    "llama4": ToolSlots(
        "llama3",
        results=(
            "<|header_start|>ipython<|header_end|>\n\n{c}<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n"
        ),
    ),
    "minimax1": ToolSlots(
        "minimax1",
        results=(
            "<beginning_of_sentence>tool name=tools\n{c}<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n"
        ),
    ),
    "minimax2": ToolSlots(
        "minimax2", results="]~b]tool\n<response>{c}</response>[e~[\n]~b]ai\n"
    ),
    "phi4_mini": ToolSlots("phi4_mini"),
    "seed_oss": ToolSlots("seed_oss", calls="{bos}\n{c}{eos}"),
    "youtu": ToolSlots(
        calls="{c}", results="<tool_response>\n{c}\n</tool_response><|Assistant|>"
    ),
    **dict.fromkeys(
        ("chatml", "chatml_de", "cpm4", "dbrx", "falcon_h1", "opencoder"), _CHATML_TOOL
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3n", "paligemma_chat"), _GEMMA_TOOL),
    **dict.fromkeys(("gemma4", "gemma4n"), _GEMMA4_TOOL),
    **dict.fromkeys(("glm4", "glm4v", "glm_ocr", "glmz1"), _GLM4),
    **dict.fromkeys(("aeva", "glm4_5v", "glm4_7", "glm4_moe"), _GLM4_MOE),
    **dict.fromkeys(("lfm2", "lfm2_vl"), _LFM2),
    **dict.fromkeys(("llama3", "llava_next_llama3", "mllama"), _LLAMA3),
    **dict.fromkeys(("mistral", "llava_next_mistral", "llava_next_video_mistral"), _MISTRAL),
    **dict.fromkeys(("ministral", "ministral3", "mistral_small", "pixtral"), _TEKKEN),
    **dict.fromkeys(
        (
            "keye_vl", "llava_next_qwen", "mimo", "mimo_v2", "mimo_vl", "qwen", "qwen2_omni",
            "qwen2_vl", "qwen3", "qwen3_nothink", "qwen3_omni", "qwen3_omni_nothink", "qwen3_vl",
            "qwen3_vl_nothink",
        ),
        _QWEN,
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_nothink", "qwen3_6"), _QWEN3_5),
}  # fmt: skip
