"""A conversation in OpenAI's terms, and what the engine gets for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ktrt.prompt.messages import plain_messages, plain_tools
from ktrt.prompt.reply import reply_parser
from ktrt.serve.errors import ApiError
from ktrt.serve.generation import Asked
from ktrt.serve.openai.constraints import make_constraint, needs_grammar
from ktrt.serve.openai.reply import Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.serve.server import Server
    from ktrt.session import Adapter

# Keys of a message that the session reads. Clients send others back that answers had: refusal,
# annotations, audio.
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_SEPARATOR = "\n\n"
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A request for an answer. ``tool_choice``: none, auto, required, or (``function``) the name of
    the function that is called. ``response_format`` is OpenAI's mapping."""

    adapter: Adapter
    messages: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    function: str | None = None
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    thinking: bool | None = None
    n: int = 1


@dataclass(frozen=True)
class Prepared:
    """The engine's request, and a function that makes the reply of a choice."""

    asked: Asked
    new_reply: Callable[[], Reply]


async def prepare_in_thread(server: Server, conversation: Conversation) -> Prepared:
    """Calls ``prepare`` outside the event loop."""
    needed = needs_grammar(conversation.response_format, conversation.tool_choice)
    threads = server.grammar_threads if needed else server.threads
    return await asyncio.get_running_loop().run_in_executor(threads, prepare, server, conversation)


def prepare(server: Server, conversation: Conversation) -> Prepared:
    """Checks a conversation, and compiles the grammar that it may need: takes up to 20 s."""
    called = conversation.tool_choice != "none"
    tools = plain_tools(conversation.tools) if called else None
    thinking = thinking_of(server, conversation.thinking)
    template = server.session.template
    if thinking is not None:
        template = template.with_thinking(thinking)
    asked = Asked(
        adapter=conversation.adapter,
        messages=conversation.messages,
        tools=tools,
        thinking=thinking,
        constraint=make_constraint(
            server.grammars,
            template,
            tools,
            response_format=conversation.response_format,
            must_call=conversation.tool_choice == "required",
            function=conversation.function,
            parallel=conversation.parallel_tool_calls,
        ),
        sampling=conversation.sampling,
        n=conversation.n,
    )
    scored = server.token_texts if asked.sampling.get("logprobs") else None

    def new_reply() -> Reply:
        return Reply(
            reply_parser(template, tools),
            most_calls=None if conversation.parallel_tool_calls else 1,
            scored=scored,
            stop_ids=stop_ids(server, asked),
        )

    return Prepared(asked, new_reply)


def stop_ids(server: Server, asked: Asked) -> frozenset[int]:
    """Returns the token ids that are not part of an answer that ends with them. Some models end it
    with special tokens that their template does not name."""
    own = asked.sampling.get("stop_token_ids", ())
    return server.session.template.stop_ids | {*own, *server.session.tokenizer.all_special_ids}


def thinking_of(server: Server, thinking: bool | None) -> bool | None:
    """Returns the switch for the session: a model that has none does not think, which is what False
    asks for."""
    return None if thinking is False and server.session.template.thinking is None else thinking


# ---- messages


def readable_messages(messages: object) -> list[dict[str, Any]]:
    """Returns OpenAI's messages as the session takes them: without the keys that it does not read,
    neighbours of the system or of the user as one."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(
            400, f"messages: expected a list of messages, not empty, found {messages!r:.80}",
            param="messages",
        )  # fmt: skip
    plain = plain_messages([_readable(each) for each in messages])
    found: list[dict[str, Any]] = []
    for role, group in groupby(plain, key=lambda each: each["role"]):
        if role in ("system", "user"):
            first, *others = group
            # Joined once: to append 4,000 texts of 2 KB one by one took a second.
            texts = [first["content"], *(each["content"] for each in others)]
            found.append({**first, "content": _SEPARATOR.join(texts)})
        else:
            found += [dict(each) for each in group]
    return found


def _readable(message: object) -> Any:
    if not isinstance(message, Mapping):
        return message
    found = {key: message[key] for key in _KEYS if message.get(key) is not None}
    if message.get("reasoning") is not None:
        found.setdefault("reasoning_content", message["reasoning"])
    if isinstance(content := found.get("content"), list):
        found["content"] = [_readable_part(each) for each in content]
    if message.get("audio") is not None or message.get("function_call") is not None:
        name = "audio" if message.get("audio") is not None else "function_call"
        raise ApiError(400, f"messages: {name} is not supported in a message", param="messages")
    return found


def _readable_part(part: object) -> object:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return {"type": "text", "text": part.get("text")}
    return part


# ---- tools


def choose_tools(tools: object, choice: object) -> tuple[list[Mapping[str, Any]], str, str | None]:
    """Returns the functions, the choice (none, auto, required) and the function that is called.

    Takes OpenAI's forms of ``tool_choice``: a word, a function, or a list of allowed functions.
    """
    found = _functions(tools)
    if choice is None:
        return found, "auto", None
    if isinstance(choice, Mapping):
        return _choice_of(found, choice)
    if choice not in _CHOICES:
        raise _wrong_choice(f"{', '.join(_CHOICES)} or a function", choice)
    if choice == "required" and not found:
        raise _wrong_choice("tools next to required", "none")
    return found, str(choice), None


def _choice_of(
    tools: list[Mapping[str, Any]], choice: Mapping[str, Any]
) -> tuple[list[Mapping[str, Any]], str, str | None]:
    kind, names = choice.get("type"), [_name(each) for each in tools]
    if kind == "function":
        name = _name(choice)
        if name not in names:
            raise _wrong_choice(f"one of the tools ({', '.join(map(str, names))})", name)
        return tools, "required", str(name)
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        fields = allowed if isinstance(allowed, Mapping) else {}
        mode, listed = fields.get("mode", "auto"), fields.get("tools")
        listed = listed if isinstance(listed, list) else []
        wanted = [_name(each) for each in listed if isinstance(each, Mapping)]
        chosen = [each for each in tools if _name(each) in wanted]
        if mode not in ("auto", "required") or not chosen:
            raise _wrong_choice("allowed tools among tools, in mode auto or required", choice)
        return chosen, str(mode), None
    raise _wrong_choice("a function, or allowed_tools", choice)


def _functions(tools: object) -> list[Mapping[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ApiError(400, f"tools: expected a list, found {tools!r:.80}", param="tools")
    for index, each in enumerate(tools):
        if not isinstance(each, Mapping) or each.get("type") != "function":
            kind = each.get("type") if isinstance(each, Mapping) else each
            raise ApiError(
                400, f"tools[{index}]: expected type 'function', found {kind!r:.80}", param="tools"
            )
    return tools


def _name(tool: Mapping[str, Any]) -> object:
    """Returns a function's name in either of OpenAI's forms: chat's is nested."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _wrong_choice(expected: str, found: object) -> ApiError:
    return ApiError(
        400, f"tool_choice: expected {expected}, found {found!r:.80}", param="tool_choice"
    )


# ---- thinking


def thinking_switch(
    kwargs: Mapping[str, Any] | None, effort: str | None, enable: bool | None = None
) -> bool | None:
    """Returns the switch that a request sets: vLLM's ``chat_template_kwargs`` and
    ``enable_thinking``, or OpenAI's ``reasoning_effort``, of which only "none" switches off."""
    found: set[bool] = set() if enable is None else {enable}
    for name, value in (kwargs or {}).items():
        if name not in ("enable_thinking", "thinking") or not isinstance(value, bool | None):
            raise ApiError(
                400, "chat_template_kwargs: expected enable_thinking (true or false), found "
                f"{name}: {value!r:.80}", param="chat_template_kwargs",
            )  # fmt: skip
        found |= {value} if value is not None else set()
    if not found and effort is not None:
        found.add(effort not in ("none", "minimal"))
    if len(found) > 1:
        raise ApiError(
            400, "enable_thinking is given twice, as true and as false; keep one of them",
            param="enable_thinking",
        )  # fmt: skip
    return found.pop() if found else None
