"""Adds the words and chat templates of configuration and adapters to the base's tokenizer, as data:
no library can then read an adapter's folder differently from the base's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from ktrt.errors import AdapterError, ConfigError
from ktrt.prompt.tokenizer.files import TokenizerFiles
from ktrt.prompt.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ktrt.config import ModelArgs
    from ktrt.prompt.tokenizer.files import TokenText

logger = logging.getLogger(__name__)

_SHOWN = 4


def add_configured(
    tokenizer: Any, add_tokens: Sequence[str], add_special_tokens: Sequence[str]
) -> None:
    """Adds the tokens of the configuration as LLaMA-Factory does: in this order, each with the next
    free id; existing ones are skipped."""
    for key, texts, special in (
        ("add_tokens", add_tokens, False),
        ("add_special_tokens", add_special_tokens, True),
    ):
        before = vocabulary_size(tokenizer)
        if texts:
            tokenizer.add_tokens(list(texts), special_tokens=special)
        after = vocabulary_size(tokenizer)
        new = [text for text in texts if before <= tokenizer.convert_tokens_to_ids(text) < after]
        if new:
            logger.info("%s: %s", key, _span(new, before, after))


def vocabulary_size(tokenizer: Any) -> int:
    """Returns the highest token id plus 1."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


@dataclass(frozen=True)
class Words:
    """A tokenizer with the words of the configuration and of adapters, and the sources of words.
    ``changed``: an adapter's folder whose tokenizer or chat template differs from the base's."""

    tokenizer: Any
    brought_by: Sequence[str]
    changed: Path | None = None

    def check_rows(self, rows: int) -> None:
        """Raises ``ConfigError`` if added tokens exceed the ``rows`` of the embeddings; only warns
        if the base's own files do."""
        size = vocabulary_size(self.tokenizer) if self.brought_by else len(self.tokenizer)
        if size <= rows:
            return
        if self.brought_by:
            raise ConfigError(_too_few_rows(size, ", ".join(self.brought_by), rows))
        logger.warning(
            "The tokenizer has %d tokens, the model only %d rows of embeddings: a message with one "
            "of the others will be refused", size, rows,
        )  # fmt: skip


def load_words(args: ModelArgs, adapters: Mapping[str, Path], *, own_template: bool) -> Words:
    """Returns the base's tokenizer with all words. ``own_template``: takes the chat template of the
    first adapter that has one (False: the configuration names a template)."""
    brought_by, changed = [], None
    tokenizer = load_tokenizer(args)
    if args.add_tokens or args.add_special_tokens:
        add_configured(tokenizer, args.add_tokens, args.add_special_tokens)
        brought_by.append("the configuration")
    for name, folder in adapters.items():
        words = read_words(name, folder, tokenizer)
        if words is None:
            continue
        if words.tokens:
            words.add(tokenizer)
            brought_by.append(f"adapter {name!r}")
            changed = changed or folder
        if own_template and words.chat_template is not None:
            if words.use_template(tokenizer):
                changed = changed or folder
            own_template = False
    return Words(tokenizer, brought_by, changed)


@dataclass(frozen=True)
class AdapterWords:
    """The additions of an adapter's tokenizer files to the base's tokenizer."""

    name: str
    tokens: Mapping[int, TokenText]
    eos: str | None
    chat_template: str | dict[str, str] | None

    def add(self, tokenizer: Any) -> None:
        """Adds the tokens, with a log line. Raises ``AdapterError`` if one gets another id."""
        before = vocabulary_size(tokenizer)
        for number, token in self.tokens.items():
            added = AddedToken(
                token.content, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip,
                normalized=token.normalized, single_word=token.single_word,
            )  # fmt: skip
            tokenizer.add_tokens([added], special_tokens=token.special)
            found = tokenizer.convert_tokens_to_ids(token.content)
            if found != number:
                raise AdapterError(_other_id(f"adapter {self.name!r}", token, number, found))
        new = [token.content for number, token in self.tokens.items() if number >= before]
        if new:
            logger.info(
                "Adapter %s adds words: %s",
                self.name, _span(new, before, vocabulary_size(tokenizer)),
            )  # fmt: skip

    def check_rows(self, rows: int) -> None:
        """Raises ``AdapterError`` if the embeddings have too few ``rows`` for the tokens."""
        if self.tokens and max(self.tokens) >= rows:
            raise AdapterError(_too_few_rows(max(self.tokens) + 1, f"adapter {self.name!r}", rows))

    def use_template(self, tokenizer: Any) -> bool:
        """Takes over the chat template and the token that ends its answers, with log lines; returns
        whether one of them differs from the tokenizer's."""
        other = bool(self.chat_template != tokenizer.chat_template)
        if other:
            logger.info(
                "The chat template of adapter %s is used; the base has %s",
                self.name, "another" if tokenizer.chat_template else "none",
            )  # fmt: skip
            tokenizer.chat_template = self.chat_template
        if self.eos is None or self.eos == tokenizer.eos_token:
            return other
        logger.info(
            "Answers end at %r, the eos_token of adapter %s; the base's is %r",
            self.eos, self.name, tokenizer.eos_token,
        )  # fmt: skip
        tokenizer.eos_token = self.eos
        return True


def read_words(name: str, folder: Path, tokenizer: Any) -> AdapterWords | None:
    """Returns the adapter's additions; None if its folder has no tokenizer files.

    Raises ``AdapterError`` for damaged files and for a token with another id in ``tokenizer``.
    """
    files = TokenizerFiles(folder, AdapterError)
    if not files:
        return None
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: dict[int, TokenText] = {}
    added = files.added_tokens()
    known_ids = _ids_of(tokenizer, [token.content for token in added.values()])
    # A new token gets the next id.
    free = vocabulary_size(tokenizer) if None in known_ids else 0
    for (number, token), known in zip(added.items(), known_ids, strict=True):
        in_use = free if known is None else known
        if number != in_use:
            raise AdapterError(_other_id(f"{folder}: its tokenizer", token, number, in_use))
        free += known is None
        # Made special for training: such a token is not shown in answers.
        if known is None or (token.special and number not in special):
            found[number] = token
    _compare_vocabularies(name, files, tokenizer)
    return AdapterWords(name, found, files.roles().get("eos_token"), files.chat_template())


def _compare_vocabularies(name: str, files: TokenizerFiles, tokenizer: Any) -> None:
    """Warns if the ordinary tokens differ from the base's, which encode the texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = files.pipeline.model.get("vocab") if files.pipeline else None
    if backend is None or not isinstance(vocabulary, dict):
        return
    base: dict[str, int] = backend.get_vocab()
    # Some files list added tokens among the ordinary ones too.
    added = {token.content for token in files.added_tokens().values()}
    other = [text for text, number in vocabulary.items() if base.get(text) != number]
    other += [text for text in backend.get_vocab(False) if text not in vocabulary]
    if other := [text for text in other if text not in added]:
        logger.warning(
            "The tokenizer in the folder of adapter %s has another vocabulary than the base's (%d "
            "tokens differ, first %r): texts are encoded with the base's. Was the adapter trained "
            "on another base model?", name, len(other), other[0],
        )  # fmt: skip


def _ids_of(tokenizer: Any, texts: Sequence[str]) -> list[int | None]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # avoids a dictionary of the whole vocabulary
        return [backend.token_to_id(text) for text in texts]
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return [vocabulary.get(text) for text in texts]


def _other_id(where: str, token: TokenText, number: int, in_use: int) -> str:
    return (
        f"{where} gives {token.content!r} id {number}, but in the tokenizer in use it has {in_use}."
        " The adapter was trained with another base's tokenizer, or adapters with different words "
        "are loaded together."
    )


def _too_few_rows(size: int, source: str, rows: int) -> str:
    return (
        f"the tokenizer has {size} tokens, including the new ones of {source}, but the embeddings "
        f"have {rows} rows: the adapter does not hold the rows of its new words. It should have "
        "been trained with resize_vocab, and embed_tokens and lm_head saved (LLaMA-Factory: "
        "additional_target; PEFT: modules_to_save)."
    )


def _span(texts: Sequence[str], start: int, end: int) -> str:
    shown = ", ".join(texts[:_SHOWN]) + (", …" if len(texts) > _SHOWN else "")
    return f"{end - start} tokens ({shown}), ids {start} to {end - 1}"
