"""Sessions with words, chat templates and end tokens of adapters or the configuration."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import VOCAB_SIZE, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import ktrt
from ktrt.errors import AdapterError, ConfigError, KtrtError
from ktrt.export.__main__ import main
from ktrt.prompt.tokenizer.words import add_configured, read_words

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["<svg>", "</svg>", "<turn>"]
TEMPLATE = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}<svg>"
ASK = [{"role": "user", "content": "hello <svg>"}]
OPTIONS: dict[str, Any] = {
    "infer_dtype": "float32", "kt_num_threads": 1, "do_sample": False, "max_new_tokens": 12,
    # A prompt that is held but for its last token has the bits of the whole one.
    "kt_fixed_kernels": True,
    "repetition_penalty": 1.3,
}  # fmt: skip


def resized(model: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(3)
    base.resize_token_embeddings(VOCAB_SIZE + 3, pad_to_multiple_of=64, mean_resizing=False)
    return base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with ``model``, a base without chat template, and ``adapter`` as
    LLaMA-Factory leaves it: trained with new tokens, resize_vocab and its default
    additional_target, tokenizer included."""
    folder = tmp_path_factory.mktemp("words")
    save_model(folder / "model", "qwen3_moe", 96)
    tokenizer = make_tokenizer(vocab_size=VOCAB_SIZE)
    tokenizer.save_pretrained(folder / "model")
    base = resized(folder / "model")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape)
                parameter.add_((0.5 if "lora_B" in name else 0.05) * noise)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    tokenizer.add_tokens(WORDS[:2])
    tokenizer.add_tokens(WORDS[2:], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<turn>"
    tokenizer.save_pretrained(folder / "adapter")
    return folder


def load(folder: Path, adapter: Path | None = None, **options: Any) -> Any:
    source = {"model_name_or_path": folder / "model", **OPTIONS}
    if adapter is not None:
        source["adapter_name_or_path"] = adapter
    return ktrt.load(source, **options)


def answer(session: Any) -> str:
    return "".join(session.stream(ASK))


def copy_adapter(folder: Path, target: Path) -> Path:
    shutil.copytree(folder / "adapter", target)
    return target


def test_all_that_the_adapter_brings_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), load(folder, folder / "adapter") as session:
        for line in (
            "adds words: 3 tokens (<svg>, </svg>, <turn>), ids 384 to 386",
            "chat template of adapter adapter is used; the base has none",
            "Answers end at '<turn>', the eos_token of adapter adapter; the base's is '</s>'",
            "The adapter's vocabulary has 448 rows, the base's 384",
        ):
            assert caplog.text.count(line) == 1, line
        theirs = AutoTokenizer.from_pretrained(folder / "adapter")
        prompt = theirs.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
        assert session.template.encode(ASK) == prompt
        assert prompt[0] == 386
        assert prompt[-1] == 384
        assert session.template.stop_ids == {386}
        peft = PeftModel.from_pretrained(resized(folder / "model"), folder / "adapter").eval()
        ids = torch.tensor([prompt])
        expected = peft.generate(
            input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=[386, 1],
            repetition_penalty=1.3, pad_token_id=0,
        )[0, len(prompt) :]  # fmt: skip
        text = theirs.decode(expected, skip_special_tokens=True)
        assert answer(session) == text.rstrip("�")  # half a character


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switched_off_the_base_answers(folder: Path, dtype: str) -> None:
    """In bfloat16 the engine computes the output layer, whose size changes."""
    with load(folder, folder / "adapter", infer_dtype=dtype) as session:
        tuned = answer(session)
        ids = torch.tensor([[5, 9, 300]])
        session.adapters.off()
        off, found = answer(session), session.model(ids).logits
        session.adapters.on()
        assert answer(session) == tuned != off
    with load(folder, template="default", infer_dtype=dtype) as base:
        assert torch.equal(base.model(ids).logits, found)
        assert found.shape[-1] == VOCAB_SIZE


def test_a_named_template_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        load(folder, folder / "adapter", template="default") as session,
    ):
        assert "chat template of adapter" not in caplog.text
        assert session.template.stop_ids == {1}
        assert 384 in session.template.encode(ASK)


def test_tokens_of_the_configuration_are_llama_factorys(folder: Path, tmp_path: Path) -> None:
    """Expects the same ids without the adapter's tokenizer files."""
    adapter = copy_adapter(folder, tmp_path / "adapter")
    for file in (*adapter.glob("tok*"), *adapter.glob("chat*"), *adapter.glob("special*")):
        file.unlink()
    options = {"template": "default", "resize_vocab": True}
    tokens = {"add_tokens": "<svg>,</svg>", "add_special_tokens": "<turn>"}
    with load(folder, adapter, **options, **tokens) as session:
        ids = session.tokenizer.convert_tokens_to_ids(WORDS)
        assert ids == [384, 385, 386]
        assert session.tokenizer.decode([384, 386], skip_special_tokens=True) == "<svg>"
        assert answer(session)
    with pytest.raises(ConfigError, match="387 tokens, .*the configuration.* 384 rows.*resize_voc"):
        load(folder, None, **options, **tokens)
    # The same tokens in another order have other ids than the adapter's files say.
    with pytest.raises(AdapterError, match="'<svg>' id 384, but .* has 385"):
        load(folder, folder / "adapter", add_tokens="</svg>,<svg>")


def test_tokens_that_exist_are_not_new(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    before = len(tokenizer)
    with caplog.at_level(logging.INFO, "ktrt"):
        add_configured(tokenizer, [], ["a", "b"])
        assert (len(tokenizer), caplog.messages) == (before, [])
        add_configured(tokenizer, [], ["a", "<new>"])
    assert caplog.messages == [f"add_special_tokens: 1 tokens (<new>), ids {before} to {before}"]


def test_another_vocabulary_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With fewer merges all shared ids are equal, but texts encode differently."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert read_words("own", folder / "adapter", tokenizer) is not None
    assert caplog.messages == []
    make_tokenizer(vocab_size=VOCAB_SIZE - 40).save_pretrained(tmp_path)
    assert read_words("own", tmp_path, tokenizer) is not None
    assert "another vocabulary than the base's (40 tokens differ, first" in caplog.text


def test_words_without_rows(folder: Path, tmp_path: Path) -> None:
    adapter = copy_adapter(folder, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(adapter)
    with pytest.raises(ConfigError, match="387 tokens, .* of adapter 'adapter'.*384 rows"):
        load(folder, adapter)


def test_loaded_later(folder: Path, tmp_path: Path) -> None:
    other = copy_adapter(folder, tmp_path / "other")
    config = json.loads((other / "tokenizer.json").read_text())
    for token in config["added_tokens"]:
        token["content"] = token["content"].replace("svg", "xml")
    (other / "tokenizer.json").write_text(json.dumps(config))
    with load(folder, template="default") as session:
        before = session.template.encode(ASK)
        session.adapters.load("words", folder / "adapter")
        assert session.template.encode(ASK) != before
        session.adapters.activate("words")
        assert answer(session)
        with pytest.raises(AdapterError, match="'<xml>'"):
            session.adapters.load("other", other)
        assert session.adapters.names == ("words",)
        session.adapters.off()
        session.adapters.unload("words")
        with pytest.raises(ConfigError, match="token id 384, the model has 384 embeddings"):
            answer(session)


def test_export_writes_them(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "chat.yaml"
    lines = {"model_name_or_path": folder / "model", "adapter_name_or_path": folder / "adapter"}
    config.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    out = tmp_path / "out"
    arguments = [str(config), "--out", str(out), "--dtype", "float32"]
    assert main([*arguments, "add_tokens=<svg>"]) == 0
    with ktrt.load({"model_name_or_path": out, **OPTIONS}) as merged:
        assert merged.model.config.vocab_size == VOCAB_SIZE + 64
        assert merged.tokenizer.chat_template == TEMPLATE
        found = answer(merged)
    with load(folder, folder / "adapter") as session:
        assert found == answer(session)
    other = tmp_path / "f"
    assert main([str(config), "--out", str(other), "--adapter-layout", "a"]) == 0
    with load(folder, other) as session:
        assert found == answer(session)
    assert main([str(config), "--out", str(tmp_path / "no"), "add_special_tokens=<new>"]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": {}, "added_tokens": [{"id": "384", "content": "a"}]}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", "{"),
        ("added_tokens.json", '{"<a>": null}'),
    ],
)
def test_damaged_files_of_an_adapter(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    adapter = copy_adapter(folder, tmp_path / "adapter")
    (adapter / name).write_text(content)
    with pytest.raises(KtrtError, match=name):
        load(folder, adapter)
