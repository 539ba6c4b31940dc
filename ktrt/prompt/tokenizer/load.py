"""Loads the tokenizer of a model folder: from data files if they suffice, from the folder's code if
nothing else exists and the user trusts it."""

from __future__ import annotations

import importlib.util
import json
import logging
from codecs import BOM_UTF8
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ktrt.errors import CheckpointError
from ktrt.folders import tokenizer_advice
from ktrt.prompt.tokenizer.files import JSON_NAME, TokenizerFiles
from ktrt.utils.json_files import read_json_as
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ktrt.config import ModelArgs

logger = logging.getLogger(__name__)

# Words, numbers, spaces, contractions and scripts that tokenizers split differently.
_PROBE = (
    "Hello, world! It's 12345 + 678\n\n\tfoo_bar  = x;  你好，世界 привет naïve 🙂 I'LL they've"
    " DON'T\r\n   end  "
)
# transformers splits the text of every tiktoken vocabulary as Llama 3 does.
_LLAMA_3 = ("llama", "llama4", "llama4_text", "mllama")


def load_tokenizer(args: ModelArgs) -> Any:
    """Returns the tokenizer of the model folder, with its chat template.

    Python code of the folder runs only with ``trust_remote_code``, and only if the tokenizer exists
    in no other form: there is no tokenizer.json, and transformers cannot read the vocabulary or
    splits text differently. Raises ``CheckpointError`` for damaged files or a missing package.
    """
    folder = args.model_name_or_path
    files = TokenizerFiles(folder, CheckpointError)
    files.check()
    template = files.chat_template()
    try:
        tokenizer = _open(files, args.trust_remote_code)
        _try_out(tokenizer)
    except CheckpointError:
        raise
    except BaseException as error:
        # On a damaged file the libraries raise any kind of exception; a panic of Rust code is not
        # even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _ = files.pipeline  # gives the better message if this file is damaged
        _check_model_config(folder)
        raise CheckpointError(_why_not(files, args.trust_remote_code, error)) from error
    if template is not None and not getattr(tokenizer, "chat_template", None):
        logger.info("%s: uses the chat template of chat_template.json", folder)
        tokenizer.chat_template = template
    return tokenizer


def _open(files: TokenizerFiles, trust: bool) -> Any:
    foreign = files.foreign_vocabulary
    splits_alike = _model_type(files.folder) in _LLAMA_3
    if foreign and foreign[1] == "tiktoken" and not splits_alike:
        if trust and files.remote_class:
            return _run_remote(files)
        tokenizer = _open_data(files)
        _warn_of_pattern(foreign[0], files.remote_class)
        return tokenizer
    try:
        return _open_data(files)
    except Exception as error:  # see load_tokenizer
        if not trust or not files.remote_class or files.has_pipeline:
            raise
        logger.debug("%s: not readable as data: %s", files.folder, error)
    return _run_remote(files)


def _open_data(files: TokenizerFiles) -> Any:
    """Loads with transformers' own classes."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = files.folder
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:  # a class that only remote code has
        if not files.has_pipeline or files.remote_class is None:
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder, **options)
    if type(tokenizer) is PreTrainedTokenizerFast or _splits_as_described(tokenizer, files):
        return tokenizer
    logger.warning(
        "%s: transformers' %s splits text differently from what %s describes, which gives other "
        "token ids; uses the ids of %s",
        folder, type(tokenizer).__name__, JSON_NAME, JSON_NAME,
    )  # fmt: skip
    return PreTrainedTokenizerFast.from_pretrained(folder, **options)


def _splits_as_described(tokenizer: Any, files: TokenizerFiles) -> bool:
    """Returns whether the tokenizer normalises and splits text as tokenizer.json says. Some
    classes of transformers take only vocabulary and merges from it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or files.pipeline is None:
        return True
    model = {"type": "BPE", "vocab": {}, "merges": []}
    stages = {name: getattr(files.pipeline, name) for name in ("normalizer", "pre_tokenizer")}
    described = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, **stages}))
    return _split_probe(backend) == _split_probe(described)


def _split_probe(backend: Any) -> list[str]:
    """Returns the probe normalised and split by a tokenizer."""
    text, split = _PROBE, backend.pre_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [text] if split is None else [word for word, _ in split.pre_tokenize_str(text)]


def _encode(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(_PROBE, add_special_tokens=False)
    return ids


def _try_out(tokenizer: Any) -> None:
    """Uses the tokenizer once, since damaged files may load and fail later."""
    ids = _encode(tokenizer)
    tokenizer.decode(ids, skip_special_tokens=False)
    _ = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    if not ids or not all(isinstance(each, int) for each in ids):
        raise ValueError(f"it encodes a text of {len(_PROBE)} characters as {ids}")


def _run_remote(files: TokenizerFiles) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name, folder = str(files.remote_class), files.folder
    logger.info(
        "trust_remote_code: the tokenizer of %s exists only as Python code (%s); runs it",
        folder, name,
    )  # fmt: skip
    with _old_imports():
        remote: Any = get_class_from_dynamic_module(name, folder, local_files_only=True)
        return remote.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _old_imports() -> Iterator[None]:
    """Restores a name that published tokenizers import and transformers 5 has moved:
    bytes_to_unicode (Moonlight, Kimi)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.gpt2 import tokenization_gpt2 as module

    name = "bytes_to_unicode"
    with Patches() as patches:
        if not hasattr(module, name):
            patches.set(module, name, bytes_to_unicode)
        yield


def _warn_of_pattern(file: Path, remote_class: str | None) -> None:
    code = f"the folder's own code ({remote_class}) splits text as the model was trained"
    advice = f"{code}: set `trust_remote_code: true`" if remote_class else "expect poor answers"
    logger.warning(
        "%s: transformers splits text as Llama 3 does, which may not fit this vocabulary: token "
        "ids may differ from the training's; %s", file, advice,
    )  # fmt: skip


def _why_not(files: TokenizerFiles, trust: bool, error: BaseException) -> str:
    folder, foreign = files.folder, files.foreign_vocabulary
    missing = error.name if isinstance(error, ImportError) else None
    if foreign and importlib.util.find_spec(foreign[1]) is None:
        missing = foreign[1]
    install = f"Install the package that reads it: pip install {missing}" if missing else ""
    if files.remote_class and not files.has_pipeline and not trust:
        return (
            f"{folder}: its tokenizer exists only as Python code ({files.remote_class}). If you "
            f"trust that code, set `trust_remote_code: true`. {install}".rstrip()
        )
    if missing and foreign:
        return f"{foreign[0]} is a {foreign[1]} vocabulary. {install}"
    if missing:
        return f"{folder}: its tokenizer needs the package {missing}: pip install {missing}"
    if advice := tokenizer_advice(folder):
        return f"cannot load a tokenizer: {advice}"
    if marked := _with_byte_order_mark(folder):
        return (
            f"{marked} starts with a byte order mark, which transformers does not read: save it as "
            "UTF-8 without one."
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{folder}: cannot load its tokenizer ({type(error).__name__}: {reason[:300]}). Are "
        "tokenizer.json and tokenizer_config.json complete, and of this model?"
    )


def _with_byte_order_mark(folder: Path) -> Path | None:
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError), file.open("rb") as stream:
            if stream.read(len(BOM_UTF8)) == BOM_UTF8:
                return file
    return None


def _check_model_config(folder: Path) -> None:
    """Raises ``CheckpointError`` if config.json, which transformers reads first, is damaged."""
    file = folder / "config.json"
    if file.exists():
        read_json_as(file, dict[str, Any], CheckpointError, "It describes every model folder.")


def _model_type(folder: Path) -> str | None:
    """Returns ``model_type`` of config.json, unchecked; None without one."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))["model_type"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
