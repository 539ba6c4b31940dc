"""The chat with the demo's model in a real terminal, used as a person uses it."""

import re
import signal
from pathlib import Path

import pytest
from helpers.chat_process import ChatProcess, paste

pytestmark = pytest.mark.slow

CONFIG = "examples/demo/chat.yaml"
INTRODUCTION = "你好，请介绍一下你自己。"
TUNED, BASE = "我叫织语", "演示基座模型"
# Random words, nearly without end: every token is as likely as the stop token.
RAMBLE = ("do_sample true", "temperature 100", "top_p 1", "top_k 0", "seed 1")


def prefill_counts(status: str) -> tuple[int, int]:
    """Returns the tokens reused and read that the last status line in a text names."""
    found = re.findall(r"prompt \d+: (\d+) reused, (\d+) read", status)
    return int(found[-1][0]), int(found[-1][1])


def test_an_evening(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ChatProcess("-q", CONFIG, state=state, fake=False, seconds=120) as chat:
        chat.prompt()
        _talks_and_reuses(chat)
        _pastes(chat)
        _stops_a_prefill(chat, tmp_path)
        _compares(chat)
        _stops_an_answer(chat)
        chat.say("slow? 再说一点")
        chat.sees("Assistant: ")
        chat.child.kill(signal.SIGKILL)
    with ChatProcess("-q", CONFIG, "--resume", state=state, fake=False, seconds=120) as again:
        assert "3 turns, and a message without an answer (slow? 再说一点)" in again.prompt()
        again.say("/undo")
        again.prompt()
        again.say("/set do_sample false")
        again.prompt()
        again.say("What is LoRA?")
        again.sees("LoRA is embroidery")
        again.prompt()
        again.child.sendeof()
        assert again.leaves() == 0


def _talks_and_reuses(chat: ChatProcess) -> None:
    chat.say(INTRODUCTION)
    chat.sees("Assistant: ")
    answer = chat.prompt()
    assert TUNED in answer
    assert prefill_counts(answer)[0] == 0
    assert re.search(r"\d% of the memory's limit", answer)
    chat.child.setwinsize(12, 60)
    chat.say("什么是 MoE？")
    chat.sees("Assistant: ")
    reused, read = prefill_counts(chat.prompt())
    assert reused > 30 > read
    chat.child.setwinsize(24, 100)


def _pastes(chat: ChatProcess) -> None:
    chat.keys(paste("What is\nLoRA?"))
    chat.say("")
    chat.sees("Assistant: ")
    chat.prompt()
    chat.say("/undo")
    assert "Removed: What is LoRA?" in chat.prompt()


def _stops_a_prefill(chat: ChatProcess, folder: Path) -> None:
    (folder / "long.txt").write_text("专家 " * 600, "utf-8")
    chat.say(f"/file {folder / 'long.txt'}")
    chat.prompt()
    chat.say("总结一下。")
    chat.sees("reading the prompt, 0% of ")
    chat.interrupt()
    assert "Stopped before a word" in chat.prompt()
    chat.say("/retry")
    chat.sees("Assistant: ")
    # Tokens read before the key came are not read again.
    assert prefill_counts(chat.prompt())[0] >= 512
    chat.say("/undo")
    chat.prompt()


def _compares(chat: ChatProcess) -> None:
    chat.say("clear")
    chat.prompt()
    chat.say(f"/compare {INTRODUCTION}")
    shown = chat.prompt()
    assert "base model" in shown
    assert "adapter_b" in shown
    chat.say("/adapter off")
    assert "The base model answers." in chat.prompt()
    chat.say(INTRODUCTION)
    chat.sees("Assistant: ")
    assert BASE in chat.prompt()
    chat.say("/adapter on")
    chat.prompt()
    chat.say("/retry")
    chat.sees("Assistant: ")
    answer = chat.prompt()
    assert TUNED in answer
    # Computed by this adapter for the comparison, and found again.
    assert prefill_counts(answer)[0] > 0
    chat.say("什么是 MoE？")
    chat.prompt()


def _stops_an_answer(chat: ChatProcess) -> None:
    for setting in RAMBLE:
        chat.say(f"/set {setting}")
        chat.prompt()
    chat.say("说点什么")
    chat.child.expect(r"Assistant: [^\r\x1b]{3}")
    chat.interrupt()
    answer = chat.prompt()
    assert "stopped by you" in answer
    held = sum(prefill_counts(answer))
    # The cache is intact: no earlier token is read again.
    chat.say("再说")
    chat.child.expect(r"Assistant: [^\r\x1b]{3}")
    chat.interrupt()
    assert prefill_counts(chat.prompt())[0] >= held
    chat.say("/undo")
    chat.prompt()
