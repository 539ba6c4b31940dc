"""Anthropic's API with its own client, over HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ktrt.prompt.reply import Content, Reasoning, ToolArguments, ToolCallStart
from ktrt.serve.anthropic import messages
from ktrt.serve.anthropic.blocks import Blocks
from ktrt.serve.anthropic.request import answer_begin, conversation_of
from ktrt.serve.anthropic.schema import MessagesRequest

anthropic = pytest.importorskip("anthropic")

if TYPE_CHECKING:
    from anthropic import Anthropic
    from fastapi import FastAPI

    from ktrt.generate.response import TokenResponse
    from ktrt.prompt.reply import Event
    from ktrt.serve.openai.conversation import Conversation
    from ktrt.serve.server import Server
    from ktrt.session import Session

QUESTION: list[Any] = [{"role": "user", "content": "What is LoRA?"}]
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
    },
}  # fmt: skip


def parameters(**options: Any) -> dict[str, Any]:
    """Returns arguments of the client's methods, some of which know no sampling fields."""
    given: dict[str, Any] = {
        "model": "adapter_a", "max_tokens": 24, "messages": QUESTION, "temperature": 0, **options,
    }  # fmt: skip
    body = {name: given.pop(name) for name in ("temperature", "top_p", "top_k") if name in given}
    return {**given, "extra_body": body | given.pop("extra_body", {})}


def ask(client: Anthropic, **options: Any) -> Any:
    return client.messages.create(**parameters(**options))


def text_of(message: Any) -> str:
    assert all(block.type == "text" for block in message.content)
    return "".join(block.text for block in message.content)


def prompt_of(message: Any) -> int:
    """The tokens of the prompt, computed and held ones."""
    held: int = message.usage.cache_read_input_tokens or 0
    computed: int = message.usage.input_tokens
    return computed + held


class TestAnswers:
    def test_a_whole_one(self, anthropic_client: Anthropic, serve_session: Session) -> None:
        found = ask(anthropic_client)
        alone = serve_session.chat(QUESTION, adapter="adapter_a", max_new_tokens=24)
        assert text_of(found) == alone.text
        assert (found.model, found.role, found.type) == ("adapter_a", "assistant", "message")
        assert (
            found.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[alone.finish_reason]
        )
        assert prompt_of(found) == alone.prompt_tokens
        assert found.usage.output_tokens == alone.generated_tokens

    def test_the_end_of_the_turn(self, anthropic_client: Anthropic) -> None:
        found = ask(anthropic_client, messages=[{"role": "user", "content": "Hello"}])
        assert (found.stop_reason, found.stop_sequence) == ("end_turn", None)

    def test_base_adapter_and_sum(
        self, anthropic_client: Anthropic, serve_session: Session
    ) -> None:
        """The base answers under its name, whatever is active in the session."""
        serve_session.adapters.activate("adapter_b")
        half = {"adapter_a": 0.5, "adapter_b": 0.25}
        for model, adapter in (("demo", None), ("adapter_a*0.5+adapter_b*0.25", half)):
            expected = serve_session.chat(QUESTION, adapter=adapter, max_new_tokens=24).text
            assert text_of(ask(anthropic_client, model=model)) == expected
        field = ask(anthropic_client, model="demo", extra_body={"adapter_weights": half})
        assert text_of(field) == expected

    @pytest.mark.parametrize(
        "system", ["Answer in French.", [{"type": "text", "text": "Answer in French.",
                                          "cache_control": {"type": "ephemeral"}}]],
    )  # fmt: skip
    def test_system(self, anthropic_client: Anthropic, serve_session: Session, system: Any) -> None:
        found = ask(anthropic_client, system=system)
        messages = [{"role": "system", "content": "Answer in French."}, *QUESTION]
        alone = serve_session.chat(messages, adapter="adapter_a", max_new_tokens=24)
        assert (text_of(found), prompt_of(found)) == (alone.text, alone.prompt_tokens)

    def test_stop_sequences(self, anthropic_client: Anthropic) -> None:
        whole = text_of(ask(anthropic_client))
        stop = whole[10:14]
        found = ask(anthropic_client, stop_sequences=["\x00", stop, "zzz"])
        assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
        assert text_of(found) == whole[: whole.index(stop)]

    def test_the_answer_continues_its_begin(
        self, anthropic_client: Anthropic, serve_session: Session
    ) -> None:
        whole = text_of(ask(anthropic_client))
        begin = whole[: whole.index(" ", 12)]
        given = [*QUESTION, {"role": "assistant", "content": begin}]
        rest = ask(anthropic_client, messages=given, max_tokens=12)
        assert (begin + text_of(rest)).strip() in whole or whole.startswith(begin + text_of(rest))
        assert prompt_of(rest) > len(serve_session.render(QUESTION))

    def test_sampling(self, anthropic_client: Anthropic, serve_session: Session) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 20}
        found = ask(anthropic_client, **options, extra_body={"seed": 7})
        alone = serve_session.chat(
            QUESTION, adapter="adapter_a", max_new_tokens=24, do_sample=True, seed=7, **options
        )
        assert text_of(found) == alone.text

    def test_tokens_are_counted(self, anthropic_client: Anthropic) -> None:
        for more in ({}, {"system": "Be brief."}, {"tools": [TOOL]}):
            options: Any = {"model": "demo", "messages": QUESTION, **more}
            counted = anthropic_client.messages.count_tokens(**options).input_tokens
            used = ask(anthropic_client, max_tokens=1, **options)
            assert counted == prompt_of(used)
        again = ask(anthropic_client, max_tokens=1, model="demo")
        assert prompt_of(again) < counted
        assert (again.usage.input_tokens, again.usage.cache_read_input_tokens) == (
            1,
            prompt_of(again) - 1,
        )


class TestStreams:
    @pytest.mark.parametrize(
        "options", [{}, {"stop_sequences": ["e"]}, {"max_tokens": 1}, {"tools": [TOOL]}]
    )
    def test_the_same_as_whole(self, anthropic_client: Anthropic, options: Any) -> None:
        whole = ask(anthropic_client, **options)
        with anthropic_client.messages.stream(**parameters(**options)) as stream:
            pieces = list(stream.text_stream)
            found = stream.get_final_message()
        assert [(b.type, b.text) for b in found.content] == [
            (b.type, b.text) for b in whole.content
        ]
        assert (found.stop_reason, found.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
        assert found.usage.output_tokens == whole.usage.output_tokens
        assert prompt_of(found) == prompt_of(whole)
        assert "".join(pieces) == text_of(whole)

    def test_events(self, server_url: str) -> None:
        body = {"model": "demo", "max_tokens": 6, "messages": QUESTION, "stream": True}
        with httpx.stream("POST", f"{server_url}/v1/messages", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert names == [each["type"] for each in data]
        assert names[:3] == ["message_start", "ping", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert data[0]["message"]["usage"]["input_tokens"] > 0
        assert (data[0]["message"]["stop_reason"], data[0]["message"]["content"]) == (None, [])
        assert data[-2]["usage"]["output_tokens"] == 6

    def test_an_error_within(self, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Blocks, "push", lambda *_: 1 / 0)
        body = {"model": "demo", "max_tokens": 6, "messages": QUESTION, "stream": True}
        text = httpx.post(f"{server_url}/v1/messages", json=body).text
        last = json.loads(text.strip().rpartition("data: ")[2])
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
        assert "ZeroDivision" not in text

    def test_silence_is_broken(self, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ktrt.serve.anthropic.messages._SILENCE", 0.0001)
        body = {"model": "demo", "max_tokens": 6, "messages": QUESTION, "stream": True}
        text = httpx.post(f"{server_url}/v1/messages", json=body).text
        assert text.count("event: ping") > 2
        assert "event: message_stop" in text


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "status", "words"),
        [
            ({"model": "x"}, 404, "there is no model 'x'"),
            ({"model": ""}, 404, "expected one of demo"),
            ({"messages": []}, 400, "messages: expected a list"),
            ({"messages": "a"}, 400, "messages"),
            ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0]: expected a role"),
            ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
            ({"messages": [{"role": "user", "content": ""}]}, 400, "text, not empty"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "text only"),
            ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "to answer"),
            ({"system": 7}, 400, "system: expected a text"),
            ({"max_tokens": 0}, 400, "max_tokens"),
            ({"max_tokens": None}, 400, "max_tokens"),
            ({"temperature": -1}, 400, "temperature"),
            ({"top_p": 2}, 400, "top_p"),
            ({"stop_sequences": [""]}, 400, "stop_sequences"),
            ({"tools": [{"type": "web_search_20250305", "name": "a"}]}, 400, "runs none itself"),
            ({"tools": [{"name": "a"}]}, 400, "input_schema"),
            ({"tool_choice": {"type": "any"}}, 400, "expected tools next to any"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, 400, "one of the"),
            ({"tools": [TOOL], "tool_choice": {"type": "x"}}, 400, "auto, any, tool or none"),
            ({"thinking": {"type": "x"}}, 400, "thinking.type"),
            ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "cannot switch thinking"),
            (
                {
                    "messages": [*QUESTION, {"role": "assistant", "content": "{"}],
                    "output_config": {"format": {"type": "json_schema", "schema": {}}},
                },
                400,
                "begin",
            ),
            ({"mcp_servers": [{}]}, 400, "mcp_servers is not supported"),
            ({"output_config": {"format": {"type": "x"}}}, 400, "json_schema"),
            ({"messages": [{"role": "user", "content": "a " * 5000}]}, 400, "tokens"),
        ],
    )
    def test_shape(self, server_url: str, options: dict[str, Any], status: int, words: str) -> None:
        body = {"model": "demo", "max_tokens": 2, "messages": QUESTION} | options
        for stream in (False, True):
            found = httpx.post(f"{server_url}/v1/messages", json={**body, "stream": stream})
            assert found.status_code == status, found.text
            error = found.json()
            assert error["type"] == "error"
            kind = {400: "invalid_request_error", 404: "not_found_error"}[status]
            assert error["error"]["type"] == kind
            assert words in error["error"]["message"]

    def test_the_client_raises_its_own(self, anthropic_client: Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError, match="there is no model"):
            ask(anthropic_client, model="x")
        with pytest.raises(anthropic.BadRequestError, match="text, not empty"):
            ask(anthropic_client, messages=[{"role": "user", "content": ""}])

    def test_what_clients_send_along(self, anthropic_client: Anthropic) -> None:
        found = ask(
            anthropic_client, max_tokens=2, metadata={"user_id": "a"}, service_tier="auto",
            thinking={"type": "disabled"}, extra_body={"new_field": 1, "context_management": None},
        )  # fmt: skip
        assert found.stop_reason == "max_tokens"


def converted(server: Server, **fields: Any) -> Conversation:
    given = {"model": "demo", "max_tokens": 8, "messages": QUESTION} | fields
    return conversation_of(server, MessagesRequest.model_validate(given))


@pytest.fixture
def server(serve_app: FastAPI) -> Server:
    found: Server = serve_app.state.server
    return found


class TestConversion:
    def test_calls_and_results(self, server: Server) -> None:
        call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}}
        results = [
            {
                "type": "tool_result",
                "tool_use_id": "t1",
                "content": [{"type": "text", "text": "5"}],
            },
            {"type": "text", "text": "Warm?"},
        ]
        found = converted(
            server,
            tools=[TOOL],
            messages=[
                *QUESTION,
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "text", "text": "Let me look."}, call]},
                {"role": "user", "content": results},
                {"role": "user", "content": "Now."},
            ],
        )  # fmt: skip
        function = {"name": "weather", "arguments": '{"city": "Köln"}'}
        assert list(found.messages) == [
            *QUESTION,
            {
                "role": "assistant", "content": "Let me look.", "reasoning_content": "Hm.",
                "tool_calls": [{"id": "t1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "t1", "name": "weather", "content": "5"},
            {"role": "user", "content": "Warm?\n\nNow."},
        ]  # fmt: skip
        assert found.tools[0]["function"]["parameters"] == TOOL["input_schema"]

    def test_a_result_that_is_an_error(self, server: Server) -> None:
        call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": "down"}
        messages = [*QUESTION, {"role": "assistant", "content": [call]},
                    {"role": "user", "content": [result]}]  # fmt: skip
        assert converted(server, messages=messages).messages[-1]["content"] == "Error: down"
        messages[-1]["content"][0]["tool_use_id"] = "t2"
        with pytest.raises(Exception, match="the id of a tool_use before it"):
            converted(server, messages=messages)

    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            (None, ("auto", None, True)),
            ({"type": "auto"}, ("auto", None, True)),
            ({"type": "any", "disable_parallel_tool_use": True}, ("required", None, False)),
            ({"type": "tool", "name": "weather"}, ("required", "weather", True)),
            ({"type": "none"}, ("none", None, True)),
        ],
    )
    def test_tool_choice(self, server: Server, choice: Any, expected: Any) -> None:
        found = converted(server, tools=[TOOL], tool_choice=choice)
        assert (found.tool_choice, found.function, found.parallel_tool_calls) == expected

    def test_thinking_and_format(self, server: Server) -> None:
        for kind, switch in (("enabled", True), ("disabled", False), ("adaptive", None)):
            assert converted(server, thinking={"type": kind}).thinking is switch
        form = {"type": "json_schema", "schema": {"type": "object"}}
        found = converted(server, output_config={"effort": "low", "format": form})
        assert found.response_format is not None
        assert found.response_format["json_schema"]["schema"] == {"type": "object"}

    def test_the_begin_of_an_answer(self) -> None:
        def begin(text: str) -> str:
            last = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            given = {"model": "demo", "max_tokens": 8, "messages": [*QUESTION, last]}
            return answer_begin(MessagesRequest.model_validate(given))

        assert begin("It is") == "It is"
        with pytest.raises(Exception, match="without white space"):
            begin("It is ")


class TestBlocks:
    EVENTS: tuple[Event, ...] = (
        Reasoning("I "), Reasoning("think"), Content("\n\n"), Content(" \nYes"), Content(". "),
        ToolCallStart(0, "call_1", "weather"), ToolArguments(0, '{"city": '),
        ToolArguments(0, '"Köln"}'), ToolCallStart(1, "functions.f:0", "f"), Content("\n"),
    )  # fmt: skip

    def test_whole(self) -> None:
        blocks = Blocks()
        list(blocks.push(self.EVENTS))
        list(blocks.end())
        thinking, text, first, second = blocks.content
        assert thinking == {"type": "thinking", "thinking": "I think", "signature": ""}
        assert text == {"type": "text", "text": "Yes. "}
        assert (first["id"], first["input"]) == ("call_1", {"city": "Köln"})
        assert (second["id"][:6], second["input"]) == ("toolu_", {})

    def test_streamed(self) -> None:
        """The client's accumulation of the events is the whole content."""
        blocks, found = Blocks(), []
        for event in self.EVENTS:
            found += list(blocks.push([event]))
        found += list(blocks.end())
        built: list[dict[str, Any]] = []
        for each in found:
            if each["type"] == "content_block_start":
                assert each["index"] == len(built)
                built.append({**each["content_block"], "json": ""})
            elif each["type"] == "content_block_delta":
                delta = each["delta"]
                name = {"thinking_delta": "thinking", "text_delta": "text"}.get(delta["type"])
                if name:
                    built[each["index"]][name] += delta[name]
                else:
                    built[each["index"]]["json"] += delta["partial_json"]
        for each in built:
            text = each.pop("json")
            if each["type"] == "tool_use":
                each["input"] = json.loads(text or "{}")
        assert built == blocks.content
        stops = [each["index"] for each in found if each["type"] == "content_block_stop"]
        assert stops == [0, 1, 2, 3]

    def test_arguments_that_end_early(self) -> None:
        blocks = Blocks()
        events: list[Event] = [ToolCallStart(0, "a", "f"), ToolArguments(0, '{"city": "K')]
        list(blocks.push(events))
        list(blocks.end())
        assert blocks.content[0]["input"] == {}


def reply_of(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Has the parser read another text than the demo writes: its models call no tools."""
    from ktrt.serve.openai.reply import Reply

    plain = Reply.push
    pieces = [text[place : place + 5] for place in range(0, len(text), 5)]

    def push(self: Reply, token: TokenResponse) -> Any:
        from dataclasses import replace

        at = token.generated_tokens - 1
        ends: Any = "stop" if at + 1 >= len(pieces) else None
        piece = pieces[at] if at < len(pieces) else ""
        return plain(self, replace(token, text=piece, finish_reason=ends))

    monkeypatch.setattr(Reply, "push", push)


class TestTools:
    def test_a_call(
        self, anthropic_client: Anthropic, monkeypatch: pytest.MonkeyPatch, server: Server
    ) -> None:
        """The demo's template writes calls as LLaMA-Factory's default does."""
        reply_of(monkeypatch, 'Action: weather\nAction Input: {"city": "Köln"}')
        whole = ask(anthropic_client, tools=[TOOL])
        assert whole.stop_reason == "tool_use"
        call = whole.content[-1]
        assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Köln"})
        with anthropic_client.messages.stream(**parameters(tools=[TOOL])) as stream:
            deltas = [each.partial_json for each in stream if each.type == "input_json"]
            found = stream.get_final_message()
        assert json.loads("".join(deltas)) == {"city": "Köln"}
        assert len(deltas) > 1
        streamed = found.content[-1]
        assert (streamed.name, streamed.input) == (call.name, call.input)
        assert found.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "5 °C"}
        again = [*QUESTION, {"role": "assistant", "content": whole.content},
                 {"role": "user", "content": [result]}]  # fmt: skip
        monkeypatch.undo()
        assert ask(anthropic_client, tools=[TOOL], messages=again).content

    def test_a_call_that_must_be(self, anthropic_client: Anthropic) -> None:
        city = {"type": "string", "enum": ["Bonn", "Köln"]}
        schema = {"type": "object", "properties": {"city": city}, "required": ["city"],
                  "additionalProperties": False}  # fmt: skip
        tool = {**TOOL, "input_schema": schema}
        # The demo's models write much white space, and would go on calling.
        choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
        options = {"tools": [tool], "tool_choice": choice, "max_tokens": 200}
        whole = ask(anthropic_client, **options)
        assert whole.stop_reason == "tool_use"
        (call,) = whole.content
        assert (call.type, call.name) == ("tool_use", "weather")
        assert call.input["city"] in ("Bonn", "Köln")
        with anthropic_client.messages.stream(**parameters(**options)) as stream:
            (streamed,) = stream.get_final_message().content
        assert streamed.input == call.input

    def test_a_format(self, anthropic_client: Anthropic) -> None:
        schema = {"type": "object", "properties": {"yes": {"type": "boolean"}},
                  "required": ["yes"], "additionalProperties": False}  # fmt: skip
        config = {"format": {"type": "json_schema", "schema": schema}}
        found = ask(anthropic_client, max_tokens=60, extra_body={"output_config": config})
        assert json.loads(text_of(found))["yes"] in (True, False)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "usual"),
        ({"tool_choice": {"type": "auto"}}, "usual"),
        ({"tool_choice": {"type": "any"}}, "grammars"),
        ({"output_config": {"format": {}}}, "grammars"),
    ],
)
def test_grammars_wait_apart_from_other_requests(
    fields: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six grammars that compile for 20 s held up every request that needed a thread."""
    monkeypatch.setattr(messages, "_prepare", lambda *_: threading.current_thread().name)
    body = MessagesRequest(model="demo", max_tokens=1, messages=[], **fields)
    with ThreadPoolExecutor(1, "usual") as usual, ThreadPoolExecutor(1, "grammars") as grammars:
        server: Any = SimpleNamespace(threads=usual, grammar_threads=grammars)
        found: Any = asyncio.run(messages._prepare_in_thread(server, body))
    assert found.startswith(name)
