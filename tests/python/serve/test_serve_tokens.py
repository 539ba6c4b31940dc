"""vLLM's tokenize, detokenize and tokenizer_info."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    import openai

    from ktrt.session import Session

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was ist das?"}]


class Client:
    def __init__(self, url: str, session: Session) -> None:
        self.url, self.session = url, session

    def tokenize(self, **body: Any) -> dict[str, Any]:
        found = httpx.post(f"{self.url}/tokenize", json=body)
        assert found.status_code == 200, found.text
        answer: dict[str, Any] = found.json()
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == self.session.context_limit
        return answer

    def refusal(self, path: str, **body: Any) -> tuple[int, str]:
        found = httpx.post(f"{self.url}/{path}", json=body)
        return found.status_code, found.json()["error"]["message"]

    def detokenize(self, tokens: list[int]) -> str:
        found = httpx.post(f"{self.url}/detokenize", json={"tokens": tokens})
        assert found.status_code == 200, found.text
        text: str = found.json()["prompt"]
        return text


@pytest.fixture
def client(server_url: str, serve_session: Session) -> Client:
    return Client(server_url, serve_session)


def test_a_prompt(client: Client) -> None:
    """A prompt gets one BOS, also where its text begins with it, as a completion does."""
    bos, text = client.session.tokenizer.bos_token_id, "Hello, 世界 🙂"
    plain = client.tokenize(prompt=text, add_special_tokens=False)["tokens"]
    assert client.detokenize(plain) == text
    assert client.tokenize(prompt=text)["tokens"] == [bos, *plain]
    word = client.session.tokenizer.bos_token
    assert client.tokenize(prompt=word + text)["tokens"] == [bos, *plain]
    assert client.tokenize(prompt=word + text, add_special_tokens=False)["tokens"] == [bos, *plain]
    assert client.tokenize(prompt="", add_special_tokens=False)["tokens"] == []


def test_a_conversation(client: Client) -> None:
    """The template writes the BOS."""
    found = client.tokenize(messages=MESSAGES, model="adapter_a")["tokens"]
    assert found == client.session.render(MESSAGES)
    assert found.count(client.session.tokenizer.bos_token_id) == 1
    assert client.tokenize(messages=MESSAGES, add_special_tokens=True)["tokens"] == found


def test_counts_are_those_of_answers(client: Client, openai_client: openai.OpenAI) -> None:
    chat = openai_client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=1,
        temperature=0,
    )
    assert chat.usage
    assert chat.usage.prompt_tokens == client.tokenize(messages=MESSAGES)["count"]
    text = openai_client.completions.create(model="demo", prompt="Was ist das?", max_tokens=1)
    assert text.usage
    assert text.usage.prompt_tokens == client.tokenize(prompt="Was ist das?")["count"]


def test_spellings(client: Client) -> None:
    assert client.tokenize(prompt="a b")["token_strs"] is None
    found = client.tokenize(prompt="a b", return_token_strs=True)
    assert found["token_strs"] == client.session.tokenizer.convert_ids_to_tokens(found["tokens"])


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "either prompt or messages"),
        ({"prompt": "a", "messages": MESSAGES}, 400, "either prompt or messages"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "a", "model": "x"}, 404, "there is no model 'x'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "x", "content": "a"}]}, 400, "role"),
        ({"messages": MESSAGES, "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ({"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ({"messages": MESSAGES, "chat_template": "{{x}}"}, 400, "setting of the server"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
        ({"messages": MESSAGES, "tools": 7}, 400, "tools"),
    ],
)
def test_refusals(client: Client, body: dict[str, Any], status: int, words: str) -> None:
    found = client.refusal("tokenize", **body)
    assert found[0] == status
    assert words in found[1]


@pytest.mark.parametrize(
    "tokens", [[-1], [10**9], [2**63], [2**80], ["a"], [1.5], [True], None, "abc", [None], [[1]]]
)
def test_what_are_no_tokens(client: Client, tokens: Any) -> None:
    status, message = client.refusal("detokenize", tokens=tokens)
    assert status == 400
    assert "tokens" in message


def test_half_a_character(client: Client) -> None:
    tokens = client.tokenize(prompt="🙂", add_special_tokens=False)["tokens"]
    if len(tokens) > 1:
        assert "\ufffd" in client.detokenize(tokens[:1])
    assert client.detokenize([]) == ""


def test_info(client: Client) -> None:
    found = httpx.get(f"{client.url}/tokenizer_info").json()
    tokenizer = client.session.tokenizer
    assert found["tokenizer_class"] == type(tokenizer).__name__
    assert (found["bos_token_id"], found["eos_token"]) == (
        tokenizer.bos_token_id, tokenizer.eos_token,
    )  # fmt: skip
    assert found["template"] == "deepseek"
    assert found["max_model_len"] == client.session.context_limit
    assert found["vocab_size"] >= len(tokenizer)
    assert found["special_tokens"][tokenizer.eos_token] == tokenizer.eos_token_id
