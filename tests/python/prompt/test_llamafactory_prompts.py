"""Compares the named templates with LLaMA-Factory's: equal ids for each of its names."""

import json
from functools import cache
from typing import Any

import pytest
from helpers.llamafactory_prompts import EXPECTED, byte_tokenizer, cases, digest, tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ktrt.config import TemplateArgs
from ktrt.errors import ConfigError
from ktrt.prompt.template.load import load_template
from ktrt.prompt.template.table import TEMPLATES

DATA = json.loads(EXPECTED.read_text(encoding="utf-8"))
PROMPTS: dict[str, dict[str, Any]] = DATA["templates"]


@cache
def shared_tokenizer(kind: str) -> Any:
    return tokenizers(DATA["special"], [])[kind]()


def test_every_name_is_known() -> None:
    assert len(PROMPTS) == 121
    assert {*TEMPLATES} == {*PROMPTS}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_llama_factorys(name: str) -> None:
    theirs, spec = PROMPTS[name], TEMPLATES[name]
    marks = theirs["thought"] or ("<think>\n", "\n</think>\n\n")
    needs_bos = "{bos}" in spec.prefix + spec.system + spec.user + spec.assistant
    for kind, make in tokenizers(DATA["special"], theirs["stop words"]).items():
        tokenizer = make() if kind == "loose" else shared_tokenizer(kind)
        if kind == "no bos" and needs_bos:
            with pytest.raises(ConfigError, match="no token bos;"):
                load_template(TemplateArgs(name), tokenizer)
            continue
        chosen = {
            thinking: load_template(TemplateArgs(name, enable_thinking=thinking), tokenizer)
            for thinking in (None, True, False)
        }
        wanted = theirs.get(kind, theirs["plain"]).split()
        every = list(cases(*marks))
        wanted = [each for each in wanted for _ in range(len(every) // len(wanted))]
        for at, ((turns, thinking), expected) in enumerate(zip(every, wanted, strict=True)):
            ids = chosen[thinking].encode(turns)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if at == 0 and kind == "plain":
                assert text == theirs["text"]
            assert digest(ids) == expected, (kind, turns, thinking, text)
        stops = {*tokenizer.convert_tokens_to_ids(theirs["stops"]), tokenizer.eos_token_id}
        assert chosen[None].stop_ids == stops
        assert (chosen[None].thinking is None) == (theirs["thought"] is None)


class TestStopWordsAreSpecialTokens:
    """As in training: LLaMA-Factory declares them before it encodes."""

    SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    TURNS = ({"role": "user", "content": "Hello"},)

    def test_the_line_break_after_phis_end_is_kept(self) -> None:
        tokenizer = byte_tokenizer([*self.SPECIAL], loose=True)
        ids = load_template(TemplateArgs("phi"), tokenizer).encode(self.TURNS)
        assert tokenizer.decode(ids) == "<|user|>Hello<|end|>\n<|assistant|>"
        as_it_is = tokenizer.encode("<|end|>\n", add_special_tokens=False)
        assert len(as_it_is) == 1, "the tokenizer itself has changed"

    def test_one_that_is_eos_already_stays_as_it_is(self) -> None:
        tokenizer = byte_tokenizer([*self.SPECIAL], loose=True)
        tokenizer.eos_token = "<|end|>"
        ids = load_template(TemplateArgs("phi"), tokenizer).encode(self.TURNS)
        assert tokenizer.decode(ids) == "<|user|>Hello<|end|><|assistant|>"

    def test_one_that_the_model_lacks_is_refused(self) -> None:
        tokenizer = byte_tokenizer([*self.SPECIAL[:3]])
        with pytest.raises(ConfigError, match=r"'phi' does not fit this model.*no token <\|end\|>"):
            load_template(TemplateArgs("phi"), tokenizer)

    def test_one_that_only_looks_like_a_token_is_refused(self) -> None:
        """``###`` encodes to SentencePiece's ``▁###``, another token."""
        words = Tokenizer(models.WordLevel({"▁###": 0, "<unk>": 1}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        assert len(tokenizer.encode("###", add_special_tokens=False)) == 1
        with pytest.raises(ConfigError, match="'yi_vl' does not fit this model.*no token ###"):
            load_template(TemplateArgs("yi_vl"), tokenizer)

    def test_one_that_some_of_the_models_lack_is_not(self) -> None:
        glm = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
        without = load_template(TemplateArgs("glm4_5v"), byte_tokenizer(glm))
        tokenizer = byte_tokenizer([*glm, "</answer>"])
        with_it = load_template(TemplateArgs("glm4_5v"), tokenizer)
        assert with_it.stop_ids - without.stop_ids == {tokenizer.convert_tokens_to_ids("</answer>")}
        assert with_it.encode(self.TURNS) == without.encode(self.TURNS)

    def test_they_stand_in_for_a_missing_eos(self) -> None:
        for name, word in (("phi", "<|end|>"), ("default", "<|endoftext|>")):
            tokenizer = byte_tokenizer([*self.SPECIAL, "<|endoftext|>"])
            tokenizer.eos_token = None
            chosen = load_template(TemplateArgs(name), tokenizer)
            assert chosen.stop_ids == {tokenizer.convert_tokens_to_ids(word)}


def test_bos_is_left_out_where_models_of_the_template_have_none() -> None:
    marks = ["<|im_start|>", "<|im_end|>"]
    turns = [{"role": "user", "content": "Hello"}]
    with_bos, without = (
        load_template(TemplateArgs("intern_s1"), byte_tokenizer(marks, bos=bos)).encode(turns)
        for bos in ("<s>", None)
    )
    assert with_bos[1:] == without
