"""Tests of ktrt.prompt.messages: what is refused, and what content becomes."""

from typing import Any

import pytest

from ktrt.errors import ConfigError
from ktrt.prompt.messages import check_messages, plain_messages

U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
NOT_TEXT: Any = {"role": "user", "content": 3}
NO_ROLE: Any = {"content": "x"}


@pytest.mark.parametrize("messages", [[U], [S, U], [U, A, U], [S, U, A, U]])
def test_good_messages(messages: list[dict[str, str]]) -> None:
    check_messages(messages)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages: expected a last message of the user"),
        ([S], "messages: expected a last message of the user"),
        ([U, A], "messages: expected a last message of the user"),
        ([A], r"messages\[0\]: expected a message of the user, found one of the assistant"),
        ([U, U], r"messages\[1\]: expected a message of the assistant"),
        ([U, S], r"messages\[1\]: expected a message of the assistant, found one of the system"),
        ([{"role": "narrator", "content": "x"}], r"messages\[0\]: role: .* found 'narrator'"),
        ([{"role": "user", "content": " \n"}], r"messages\[0\]: content: expected text, not empty"),
        (
            [{"role": "user", "content": "a\udc80"}],
            r"messages\[0\]: content: 'a\\udc80' holds half a character",
        ),
        ([NOT_TEXT], r"messages\[0\]: content: expected text, not empty, found 3"),
        ([NO_ROLE], r"messages\[0\]: expected a mapping of role and content"),
        (None, "messages: expected a list of messages, found None"),
        ("hello", "messages: expected a list of messages, found 'hello'"),
        (U, "messages: expected a list of messages, found {'role'"),
    ],
)
def test_bad_messages(messages: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_messages(messages)


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_text_parts_are_joined() -> None:
    messages = [{"role": "system", "content": (text("Be"), text(" brief."))}, *user(text("你好"))]
    assert check_messages(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
    ]
    assert check_messages([U]) == [U]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            [text("x"), {"type": "image_url", "image_url": {"url": "a.png"}}],
            r"messages\[0\]: content\[1\]: expected type 'text', found 'image_url'",
        ),
        ([{"type": "text"}], r"content\[0\]: expected type and text, found {'type': 'text'}"),
        ([{"type": "text", "text": 3}], r"content\[0\]: expected type and text"),
        ([text("x") | {"cache": "no"}], r"content\[0\]: expected type and text"),
        (["x"], r"content\[0\]: expected a part with a type, found 'x'"),
        ([{"type": 3}], r"content\[0\]: expected a part with a type"),
        ([], r"messages\[0\]: content: expected text, not empty, found ''"),
        ([text(" ")], r"messages\[0\]: content: expected text, not empty"),
        ([text("\ud800")], r"messages\[0\]: content: .* holds half a character"),
    ],
)
def test_bad_parts(parts: list[Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_messages(user(*parts))


def test_plain_messages_may_end_with_an_answer() -> None:
    assert plain_messages([*user(text("x")), A]) == [U, A]
    with pytest.raises(ConfigError, match=r"messages\[1\]: role"):
        plain_messages([U, {"role": "narrator", "content": "x"}])
