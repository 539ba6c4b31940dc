"""Tests of prompt.tokenizer.load: tokenizers as data, tokenizers as code, and damaged files."""

import base64
import contextlib
import importlib.util
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import save_model
from tokenizers import Tokenizer, pre_tokenizers
from transformers.models.gpt2 import tokenization_gpt2

import ktrt
from ktrt.checkpoint.generation_config import check_generation_config
from ktrt.config import ModelArgs, TemplateArgs
from ktrt.errors import CheckpointError, KtrtError
from ktrt.prompt.template.load import load_template
from ktrt.prompt.tokenizer.load import load_tokenizer

TEXT = "hello 你好, it's 2026!"
SPECIAL = ["[BOS]", "[EOS]", "[UNK]", "[PAD]", "<|im_user|>", "<|im_end|>"]
# Like Moonlight's and Kimi's: byte pairs of a file by rank, then the special tokens of
# tokenizer_config.json, and the import that transformers 5 has removed. Needs no tiktoken.
REMOTE = """
import base64
import contextlib
from pathlib import Path

from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
from transformers.tokenization_utils import PreTrainedTokenizer

(Path(__file__).parent / "RAN").touch()
Path({marker!r}).touch()


class RemoteTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "tiktoken.model"}}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, added_tokens_decoder, **kwargs):
        letters = bytes_to_unicode()
        self.letters = {{letter: byte for byte, letter in letters.items()}}
        self.encoder = {{}}
        for line in Path(vocab_file).read_bytes().splitlines():
            token, rank = line.split()
            text = "".join(letters[byte] for byte in base64.b64decode(token))
            self.encoder[text] = int(rank)
        self.encoder |= {{t.content: i for i, t in added_tokens_decoder.items()}}
        self.decoder = {{i: text for text, i in self.encoder.items()}}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.encoder)

    def get_vocab(self):
        return self.encoder

    def _tokenize(self, text, **kwargs):
        letters = bytes_to_unicode()
        return [letters[byte] for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.encoder[token]

    def _convert_id_to_token(self, index):
        return self.decoder[index]

    def convert_tokens_to_string(self, tokens):
        return bytes(self.letters[c] for c in "".join(tokens)).decode("utf-8", "replace")
"""


def save_remote(folder: Path, model_type: str, marker: Path) -> None:
    """Writes a folder whose tokenizer is a tiktoken vocabulary of single bytes and Python code."""
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (folder / "tiktoken.model").write_text("".join(lines))
    added = {str(256 + i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)}
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    config = {
        "tokenizer_class": "RemoteTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_remote.RemoteTokenizer", None]},
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[4:],
        "chat_template": "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}",
        **dict(zip(roles, SPECIAL, strict=False)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenization_remote.py").write_text(REMOTE.format(marker=str(marker)))


def open_it(folder: Path, *, trust: bool = False) -> Any:
    return load_tokenizer(ModelArgs(folder, trust_remote_code=trust))


class TestRemoteCode:
    @pytest.mark.parametrize("model_type", ["kimi_k2", "kimi_k25", "kimi_linear", "deepseek_v3"])
    def test_runs_where_the_tokenizer_exists_only_as_code(
        self, tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / f"model_{model_type}"
        save_remote(folder, model_type, tmp_path / "ran")
        had_it = hasattr(tokenization_gpt2, "bytes_to_unicode")
        with caplog.at_level(logging.INFO):
            tokenizer = open_it(folder, trust=True)
        assert (tmp_path / "ran").exists()
        lines = [r.message for r in caplog.records if "exists only as Python code" in r.message]
        assert len(lines) == 1
        assert "tokenization_remote.RemoteTokenizer" in lines[0]
        assert tokenizer.encode(TEXT, add_special_tokens=False) == list(TEXT.encode())
        template = load_template(TemplateArgs("auto"), tokenizer)
        assert template.encode([{"role": "user", "content": "hi"}]) == [260, *b"hi", 261]
        assert template.stop_ids == {257}
        assert hasattr(tokenization_gpt2, "bytes_to_unicode") == had_it

    def test_never_without_trust(self, tmp_path: Path) -> None:
        save_remote(tmp_path / "model", "kimi_k2", tmp_path / "ran")
        with pytest.raises(CheckpointError, match="only as Python code.*trust_remote_code: true"):
            open_it(tmp_path / "model")
        assert not (tmp_path / "ran").exists()

    def test_a_pattern_that_is_not_known_to_be_right_is_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_remote(tmp_path / "model", "kimi_k25", tmp_path / "ran")
        whole = make_tokenizer()
        monkeypatch.setattr(
            "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: whole
        )  # transformers' reading of it needs tiktoken
        assert open_it(tmp_path / "model") is whole
        warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert "as Llama 3 does" in warnings[0]
        assert "trust_remote_code: true" in warnings[0]
        caplog.clear()
        save_remote(tmp_path / "model", "llama4", tmp_path / "ran")
        assert open_it(tmp_path / "model") is whole
        assert not caplog.records

    def test_data_come_first_even_with_trust(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The model type is known to transformers, every auto_map names code, the tokenizer is
        data."""
        folder = tmp_path / "model"
        save_model(folder, "deepseek_v2", 96)
        make_tokenizer(vocab_size=384).save_pretrained(folder)
        marker = tmp_path / "ran"
        code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Any: pass\n"
        maps = {
            "config.json": {
                "AutoConfig": "code.Any", "AutoModelForCausalLM": "code.Any",
                "AutoTokenizer": ["code.Any", None],
            },
            "tokenizer_config.json": {"AutoTokenizer": [None, "code.Any"]},
        }  # fmt: skip
        for name, auto_map in maps.items():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(config | {"auto_map": auto_map}))
        (folder / "code.py").write_text(code)
        options: dict[str, Any] = {"template": "deepseek", "kt_num_threads": 1}
        source = {"model_name_or_path": folder, "trust_remote_code": True, **options}
        with ktrt.load(source, max_new_tokens=1) as session:
            assert "".join(session.stream([{"role": "user", "content": "a"}])) is not None
        assert not marker.exists()

    def test_a_class_that_only_code_has_next_to_tokenizer_json(self, tmp_path: Path) -> None:
        save_remote(tmp_path, "kimi_k2", tmp_path / "ran")
        (tmp_path / "tiktoken.model").unlink()
        make_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        for key in ("added_tokens_decoder", "unk_token", "pad_token"):
            del config[key]
        config |= {"bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for trust in (False, True):
            tokenizer = open_it(tmp_path, trust=trust)
            assert tokenizer.encode(TEXT) == make_tokenizer().encode(TEXT)
        assert not (tmp_path / "ran").exists()


class TestMissingPackages:
    @pytest.mark.parametrize(
        ("content", "package"),
        [
            (b"aGVsbG8= 0\nd29ybGQ= 1\n", "tiktoken"),
            (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"),
        ],
        ids=["tiktoken", "sentencepiece"],
    )
    def test_names_the_package_by_the_files_content(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, package: str
    ) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
        (tmp_path / "tokenizer.model").write_bytes(content)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == package else find(name)
        )
        with pytest.raises(CheckpointError, match=f"tokenizer.model.*pip install {package}$"):
            open_it(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "holds no tokenizer"), (["tekken.json"], "Mistral's own form")],
    ids=["none", "tekken"],
)
def test_no_tokenizer_that_can_be_read(tmp_path: Path, names: list[str], words: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2"}')
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        open_it(tmp_path)


def test_ids_that_a_class_of_the_library_gets_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MiniMax-Text-01: GPT2Tokenizer takes the vocabulary from tokenizer.json, not the pattern."""
    backend = make_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("l", "isolated"), backend.pre_tokenizer]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = "hello"
    assert make_tokenizer().encode(text) != backend.encode(text).ids
    with caplog.at_level(logging.WARNING):
        ids = open_it(tmp_path).encode(text, add_special_tokens=False)
    assert ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert "GPT2Tokenizer splits text differently from what tokenizer.json describes" in caplog.text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"model_type": "deep', "is no valid JSON"),
        (b"", "is no valid JSON"),
        (b"null", "found None, expected an object"),
        ("{}".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_damaged_config_is_not_blamed_on_the_tokenizer(
    tmp_path: Path, data: bytes, words: str
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"/config.json:? {words}"):
        open_it(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_named(tmp_path: Path, name: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    with pytest.raises(CheckpointError, match=f"/{name} starts with a byte order mark"):
        open_it(tmp_path)


def damaged(content: Any, random: random.Random) -> Any:
    """Replaces or drops one value somewhere."""
    content = json.loads(json.dumps(content))
    at = content
    while True:
        key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], dict | list) and at[key] and random.random() < 0.7:
            at = at[key]
            continue
        if random.random() < 0.25:
            del at[key]
        else:
            at[key] = random.choice([None, "", "x", -1, 3.5, True, [], {}, [1, None], {"a": "b"}])
        return content


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_damaged_files_are_one_clear_error_or_harmless(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer(chat_template="{{ messages[0].content }}")
    tokenizer.save_pretrained(tmp_path)
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2"}')
    whole = (tmp_path / name).read_bytes()
    seeded = random.Random(7)
    refused = 0
    for trial in range(60):
        data = json.dumps(damaged(json.loads(whole), seeded)).encode()
        if trial % 4 == 3:
            cut = bytearray(whole)
            cut[seeded.randrange(len(cut))] ^= 1 << seeded.randrange(8)
            data = bytes(cut if trial % 8 == 3 else cut[: seeded.randrange(len(cut))])
        (tmp_path / name).write_bytes(data)
        try:
            loaded = open_it(tmp_path)
            load_template(TemplateArgs("auto"), loaded).encode([{"role": "user", "content": "a"}])
        except KtrtError:
            refused += 1
    assert refused > 15


def test_damaged_generation_config(tmp_path: Path) -> None:
    whole = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    check_generation_config(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(whole))
    check_generation_config(tmp_path)
    seeded = random.Random(3)
    for _ in range(60):
        file.write_text(json.dumps(damaged(whole, seeded)))
        with contextlib.suppress(CheckpointError):
            check_generation_config(tmp_path)
    file.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id: found '</s>'"):
        check_generation_config(tmp_path)
