"""Tests of tools, calls and results in messages."""

from typing import Any

import pytest

from ktrt.errors import ConfigError
from ktrt.prompt.fit import drop_turns
from ktrt.prompt.messages import check_messages, plain_messages, plain_tools

U, A = ({"role": role, "content": "x"} for role in ("user", "assistant"))


def called(*ids: str, arguments: object = '{"a": [1]}', **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": each, "type": "function", "function": {"name": "f", "arguments": arguments}}
            for each in ids
        ],
        **more,
    }


def result(given: str | None = "1", content: object = "21") -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": given} if given else {})


@pytest.mark.parametrize(
    "messages",
    [
        [U, called("1"), result()],
        [U, called("1"), result(), A, U],
        [U, called("1", "2"), result("2"), result("1", ""), called("3"), result("3")],
        [U, called("1"), result(), U],
        [U, called("1"), result(None)],
        [U, called("1"), result(content=[{"type": "text", "text": "21"}])],
        [U, A | {"tool_calls": None, "reasoning_content": "Hm"}, U],
        [U, A | {"tool_calls": []}, U],
        [{"role": "developer", "content": "x"}, U],
    ],
)
def test_good_messages(messages: list[dict[str, Any]]) -> None:
    check_messages(messages)


def test_one_form() -> None:
    system, user, calls, found = check_messages(
        [{"role": "developer", "content": "x"}, U, called("1"), result()]
    )
    assert system == {"role": "system", "content": "x"}
    assert user == U
    function = {"name": "f", "arguments": {"a": [1]}}
    assert calls == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    assert found == {"role": "tool", "tool_call_id": "1", "content": "21"}
    empty: tuple[Any, ...] = ("", None, "{}", {})
    for arguments in empty:
        (message,) = plain_messages([called("1", arguments=arguments)])
        assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([result()], r"messages\[0\]: expected a message of the user, found one of the tool"),
        ([U, called("1"), U], r"messages\[2\]: expected a message of the tool"),
        ([U, A, result()], r"messages\[2\]: expected a message of the user, found one of the tool"),
        ([U, called("1")], "messages: expected a last message of the user"),
        (
            [U, called("1"), result("2")],
            r"tool_call_id: expected .*\(1\), found '2'",
        ),
        ([U | {"tool_calls": []}], r"messages\[0\]: tool_calls: only a message of the assistant"),
        ([U | {"images": []}], r"messages\[0\]: expected a mapping of role and content"),
        ([U, A | {"content": None}], r"messages\[1\]: content: expected text, not empty"),
        ([U, called("1", arguments="{")], r"function.arguments: expected a JSON object as text"),
        ([U, called("1", arguments="[1]")], r"function.arguments: expected a JSON object as text"),
        ([U, called("1", arguments="[" * 10**5)], r"function.arguments: expected a JSON object"),
        ([U, called("1", arguments='{"a": NaN}')], r"function.arguments: expected JSON"),
        ([U, called("1", arguments='{"a": "\\ud800"}')], r"holds half a character"),
        ([U, A | {"tool_calls": [{}]}], r"tool_calls\[0\]: expected id, type and function"),
        ([U, A | {"tool_calls": "x"}], r"tool_calls: expected a list of calls, found 'x'"),
        ([U, called("1", reasoning_content=3)], r"reasoning_content: expected text, found 3"),
    ],
)
def test_bad_messages(messages: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_messages(messages)


def test_tools() -> None:
    function = {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    for tool in ({"type": "function", "function": function}, {"type": "function"} | function):
        assert plain_tools([tool]) == [{"name": "f", "parameters": {"type": "object"}}]
    assert plain_tools(None) is None
    assert plain_tools([]) is None
    deep: list[Any] = []
    for _ in range(10**4):
        deep = [deep]
    for bad, expected in (
        ("x", "tools: expected a list of functions, found 'x'"),
        ([3], r"tools\[0\]: expected a function with a name, found 3"),
        ([{"type": "web_search"}], r"tools\[0\]: expected type 'function', found 'web_search'"),
        ([{"name": ""}], r"tools\[0\]: name: expected text, not empty, found ''"),
        ([{"function": {"name": "f", "parameters": 1}}], r"tools\[0\].function: parameters: exp"),
        ([{"name": "f"}, {"name": "f"}], r"tools\[1\]: expected different names, found 'f' twice"),
        ([{"name": "f", "parameters": {"a": float("inf")}}], r"tools\[0\]: expected JSON"),
        ([{"name": "f", "parameters": {"a": deep}}], r"tools\[0\]: expected JSON"),
    ):
        with pytest.raises(ConfigError, match=expected):
            plain_tools(bad)  # type: ignore[arg-type]


def test_a_turn_is_dropped_with_its_calls() -> None:
    first = [U, called("1"), result(), A]
    messages = [{"role": "system", "content": "x"}, *first, U]
    kept, dropped = drop_turns(messages, lambda each: 10 * len(each), 40, 10)
    assert kept == [messages[0], U]
    assert dropped == 1
