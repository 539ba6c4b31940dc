"""``ktrt chat --url`` with the real server over the demo model."""

from __future__ import annotations

import io
import json
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from helpers.chat_process import ChatProcess

from ktrt.chat.__main__ import main
from ktrt.chat.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.session import Session

QUESTION = "What is LoRA?"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "API_KEY"):
        monkeypatch.delenv(name, raising=False)


def run(url: str, stdin: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a piped chat in this process; returns exit code, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    terminal = Terminal(io.BytesIO(stdin.encode()), stdout, stderr)
    code = main(["--url", url, "-q", *arguments], terminal=terminal)
    return code, stdout.getvalue(), stderr.getvalue()


def local(session: Session, adapter: str | None) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    return session.submit(messages, adapter=adapter, temperature=0).result().text


def test_answers_are_the_session_s(server_url: str, serve_session: Session) -> None:
    lines = f"{QUESTION}\n/adapter adapter_b\n/retry\n/adapter\n"
    code, out, err = run(server_url, lines, "temperature=0")
    assert (code, err) == (0, "")
    assert f"Assistant: {local(serve_session, None)}\n" in out
    assert f"Assistant: {local(serve_session, 'adapter_b')}\n" in out
    assert "  adapter_a\n* adapter_b, weight 1\n" in out


def test_weights_and_comparison(server_url: str, serve_session: Session) -> None:
    script = f"/adapter adapter_a=0.5 adapter_b=0.25\n{QUESTION}\n/compare {QUESTION}\n"
    code, out, err = run(server_url, script, "--json", "temperature=0")
    assert (code, "error" in err) == (0, False)
    mixed, base, again = (json.loads(line) for line in out.splitlines())
    messages = [{"role": "user", "content": QUESTION}]
    weights = {"adapter_a": 0.5, "adapter_b": 0.25}
    expected = serve_session.submit(messages, adapter=weights, temperature=0).result()
    assert mixed["text"] == expected.text
    assert mixed["prompt_tokens"] == expected.prompt_tokens
    assert mixed["generated_tokens"] == expected.generated_tokens
    assert base["text"] == local(serve_session, None)
    assert again["answered_by"] == "adapter_a + adapter_b"


def test_logprobs(server_url: str) -> None:
    options = ("logprobs=true", "top_logprobs=2", "max_new_tokens=5", "temperature=0")
    found = json.loads(run(server_url, "", "--json", "-p", QUESTION, *options)[1])
    assert found["finish_reason"] == "length"
    assert found["generated_tokens"] == len(found["logprobs"]) == 5
    assert "".join(each["token"] for each in found["logprobs"]).strip() == found["text"].strip()
    assert all(len(each["top"]) == 2 for each in found["logprobs"])


def test_the_server_s_refusals(server_url: str) -> None:
    code, _, err = run(server_url, "", "-p", "x" * 40_000)
    assert code == 2
    assert err.count("\n") == 1
    assert "400" in err


def test_ctrl_c_ends_the_answer_on_the_server(server_url: str, tmp_path: Path) -> None:
    with ChatProcess("--url", server_url, state=tmp_path, fake=False, seconds=60) as chat:
        chat.prompt()
        for setting in ("temperature 2", "top_p 1", "top_k 0", "max_new_tokens 1800"):
            chat.say(f"/set {setting}")
            chat.prompt()
        chat.say("说点什么")
        chat.child.expect(r"Assistant: [^\r\x1b]{3}")
        chat.interrupt()
        assert "stopped by you" in chat.prompt()
        end = time.monotonic() + 5
        while _running(server_url) and time.monotonic() < end:
            time.sleep(0.05)
        assert _running(server_url) == 0
        chat.child.sendeof()
        assert chat.leaves() == 0


def _running(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(
        float(each.split()[-1]) for each in lines if each.startswith("vllm:num_requests_running{")
    )
