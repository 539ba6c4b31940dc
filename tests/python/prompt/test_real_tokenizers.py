"""Templates with tokenizers of published models, token by token. The literal ids come from the
models' own tokenizers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import real_tokenizers
from helpers.llamafactory_prompts import EXPECTED_REAL, cases, digest
from transformers import AutoTokenizer

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.prompt.template.load import load_template
from ktrt.prompt.template.table import TEMPLATES

DEMO = Path(__file__).parents[3] / "examples" / "demo" / "model"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "你好"}
REPLY = {"role": "assistant", "content": "Hello"}
AGAIN = {"role": "user", "content": "Hello"}


def load(make: Callable[[], Any]) -> Any:
    tokenizer = make()
    if tokenizer is None:
        pytest.skip("KTRT_TEST_TOKENIZERS names no folder with it (helpers/real_tokenizers.py)")
    return tokenizer


def prompt(name: str, make: Callable[[], Any], *turns: dict[str, str], **options: Any) -> list[int]:
    return load_template(TemplateArgs(name, **options), load(make)).encode(turns)


class TestDeepSeek:
    BOS, EOS, USER, ASSISTANT, NI_HAO, HELLO = 0, 1, 128803, 128804, 30594, 19923

    @pytest.mark.parametrize("name", ["deepseek3", "deepseekr1"])
    def test_turns(self, name: str) -> None:
        found = prompt(name, real_tokenizers.deepseek, USER, REPLY, AGAIN)
        assert found == [
            self.BOS, self.USER, self.NI_HAO, self.ASSISTANT, self.HELLO, self.EOS,
            self.USER, self.HELLO, self.ASSISTANT,
        ]  # fmt: skip

    def test_marks_of_thoughts_are_tokens_and_stay_visible(self) -> None:
        tokenizer = load(real_tokenizers.deepseek)
        chosen = load_template(TemplateArgs("deepseekr1", enable_thinking=False), tokenizer)
        ids = chosen.encode([USER])[4:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n\n</think>\n\n"
        assert ids[0] == 128821
        assert chosen.stop_ids == {self.EOS}

    def test_a_template_of_another_model_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"no token <\|im_start\|>, <\|im_end\|>"):
            prompt("qwen", real_tokenizers.deepseek, USER)


class TestQwen:
    START, END, LINE, SYSTEM, USER, ASSISTANT = 151644, 151645, 198, 8948, 872, 77091
    NI_HAO, HELLO = 108386, 9707

    def test_turns(self) -> None:
        turn = [self.START, self.USER, self.LINE]
        reply = [self.END, self.LINE, self.START, self.ASSISTANT, self.LINE]
        assert prompt("qwen3", real_tokenizers.qwen, USER, REPLY, AGAIN) == [
            *turn, self.NI_HAO, *reply, self.HELLO, self.END, self.LINE, *turn, self.HELLO, *reply
        ]  # fmt: skip

    def test_the_default_system_prompt(self) -> None:
        found = prompt("qwen", real_tokenizers.qwen, USER)
        system = [2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264, 10950,
                  17847, 13]  # fmt: skip
        head = [self.START, self.SYSTEM, self.LINE, *system, self.END, self.LINE, self.START]
        assert found[: len(head)] == head

    def test_stops(self) -> None:
        chosen = load_template(TemplateArgs("qwen3"), load(real_tokenizers.qwen))
        assert chosen.stop_ids == {self.END}


class TestMixtral:
    INST, END = [733, 16289, 28793], [28792, 28748, 16289, 28793]

    def test_turns(self) -> None:
        """Slots are encoded one by one, so each begins with the tokenizer's space."""
        found = prompt("mistral", real_tokenizers.mixtral, AGAIN, REPLY, AGAIN)
        question = [*self.INST, 22557, *self.END]
        assert found == [1, *question, 28705, 22557, 2, *question]

    def test_system(self) -> None:
        found = prompt("mistral", real_tokenizers.mixtral, SYSTEM, AGAIN)
        whole = load(real_tokenizers.mixtral).encode(
            "[INST] Be brief.\n\nHello[/INST]", add_special_tokens=False
        )
        assert found == [1, *whole]


@pytest.mark.parametrize("folder", real_tokenizers.PUBLISHED)
def test_prompts_are_llama_factorys(folder: str) -> None:
    tokenizer = load(partial(real_tokenizers.published, folder))
    expected = json.loads(EXPECTED_REAL.read_text(encoding="utf-8"))[folder]
    assert [*expected] == real_tokenizers.PUBLISHED[folder].split()
    for name, digests in expected.items():
        thought = TEMPLATES[name].thought
        marks = (thought.begin, thought.end) if thought else ("<think>\n", "\n</think>\n\n")
        for (turns, thinking), wanted in zip(cases(*marks), digests.split(), strict=True):
            args = TemplateArgs(name, enable_thinking=thinking)
            ids = load_template(args, tokenizer).encode(turns)
            assert digest(ids) == wanted, (name, turns, thinking)


@pytest.mark.parametrize("turns", [[USER], [SYSTEM, USER], [SYSTEM, USER, REPLY, AGAIN]])
def test_the_demos_own_chat_template_is_deepseeks(turns: list[dict[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    own, named = (
        load_template(TemplateArgs(name), tokenizer).encode(turns) for name in ("auto", "deepseek")
    )
    assert own == named
    assert named[0] == tokenizer.bos_token_id
