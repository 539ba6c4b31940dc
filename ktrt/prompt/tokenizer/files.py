"""Reads and types a folder's tokenizer files before a library sees them."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ktrt.utils.json_files import JsonObject, read_json_as, typed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ktrt.errors import KtrtError

CONFIG_NAME = "tokenizer_config.json"
JSON_NAME = "tokenizer.json"
SPECIAL_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_FILES = (TEMPLATE_NAME, "chat_template.json")
TEMPLATES_FOLDER = "additional_chat_templates"
# All tokenizer files that are data, not code.
_DATA = (
    CONFIG_NAME, JSON_NAME, SPECIAL_NAME, "added_tokens.json", "vocab.json", "merges.txt",
    "*.model", "*.tiktoken", *TEMPLATE_FILES, f"{TEMPLATES_FOLDER}/*.jinja",
)  # fmt: skip
# The tokens with a role, as tokenizer_config.json and special_tokens_map.json name them; ktrt uses
# the first two.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# A line of a tiktoken vocabulary, which the library tokenizers does not read.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_ADVICE = "Download the file again, or copy it from the model that it belongs to."


class TokenText(JsonObject):
    """A token as tokenizer_config.json describes it."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    single_word: bool = False


class NumberedToken(TokenText):
    """A token as tokenizer.json lists it."""

    id: int


class _TokenizerConfig(JsonObject):
    tokenizer_class: str | None = None
    auto_map: dict[str, Any] | list[str | None] | None = None
    added_tokens_decoder: dict[str, TokenText] | None = None
    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None
    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None
    unk_token: str | TokenText | None = None
    pad_token: str | TokenText | None = None


class _SpecialTokens(JsonObject):
    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None
    unk_token: str | TokenText | None = None
    pad_token: str | TokenText | None = None


class _Pipeline(JsonObject):
    """tokenizer.json; an absent or null stage does nothing."""

    model: dict[str, Any]
    added_tokens: list[NumberedToken] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


class TokenizerFiles:
    """The tokenizer files of a folder. The first access to a damaged file raises ``error`` with
    file and key."""

    def __init__(self, folder: Path, error: type[KtrtError]) -> None:
        self.folder, self._error = folder, error

    def __bool__(self) -> bool:
        """Returns whether there is any tokenizer file."""
        names = (CONFIG_NAME, JSON_NAME, SPECIAL_NAME, TEMPLATE_NAME, "added_tokens.json")
        return any((self.folder / name).exists() for name in names)

    def paths(self) -> list[Path]:
        """Returns all data files of the tokenizer, relative to the folder."""
        found = [path for pattern in _DATA for path in sorted(self.folder.glob(pattern))]
        return [path.relative_to(self.folder) for path in found if path.is_file()]

    def check(self) -> None:
        """Reads and types every JSON file except tokenizer.json, which is large."""
        _ = self.config, self.special, self._added

    @cached_property
    def config(self) -> _TokenizerConfig:
        """tokenizer_config.json; empty without the file."""
        return self._read(CONFIG_NAME, _TokenizerConfig) or _TokenizerConfig()

    @cached_property
    def special(self) -> _SpecialTokens:
        """special_tokens_map.json; empty without the file."""
        return self._read(SPECIAL_NAME, _SpecialTokens) or _SpecialTokens()

    @cached_property
    def pipeline(self) -> _Pipeline | None:
        """tokenizer.json; None without the file."""
        found: _Pipeline | None = self._read(JSON_NAME, _Pipeline)
        return found

    @property
    def has_pipeline(self) -> bool:
        """Returns whether there is a tokenizer.json."""
        return (self.folder / JSON_NAME).exists()

    @cached_property
    def _added(self) -> dict[str, int]:
        return self._read("added_tokens.json", dict[str, int]) or {}

    @property
    def class_name(self) -> str | None:
        """The class that tokenizer_config.json names."""
        return self.config.tokenizer_class

    @property
    def remote_class(self) -> str | None:
        """``module.Class`` of the tokenizer in the folder's own Python code; None without one."""
        auto_map = self.config.auto_map
        found: Any = auto_map
        if isinstance(auto_map, dict):
            found = auto_map.get("AutoTokenizer")
        where = f"{self.folder / CONFIG_NAME}: auto_map.AutoTokenizer"
        shape: Any = str | list[str | None] | None
        found = typed(found, shape, where, self._error, _ADVICE)
        names = [found] if isinstance(found, str) else [name for name in found or () if name]
        # "repository--module.Class" names the origin of a copy; the copy runs.
        return names[-1].split("--")[-1] if names else None

    @property
    def foreign_vocabulary(self) -> tuple[Path, str] | None:
        """(file, package) of a vocabulary that only this package reads, if there is no
        tokenizer.json. The file's content decides: both kinds are called tokenizer.model."""
        if self.has_pipeline:
            return None
        files = [*self.folder.glob("*.tiktoken"), *self.folder.glob("*.model")]
        for file in sorted(each for each in files if each.is_file()):
            with file.open("rb") as opened:
                start = opened.read(512)
            return file, "tiktoken" if _TIKTOKEN.match(start) else "sentencepiece"
        return None

    def added_tokens(self) -> dict[int, TokenText]:
        """Returns the tokens added to the vocabulary, by id."""
        found: dict[int, TokenText] = {}
        for text, number in self._added.items():
            found[number] = TokenText(content=text)
        for key, token in (self.config.added_tokens_decoder or {}).items():
            where = f"{self.folder / CONFIG_NAME}: added_tokens_decoder: the key {key!r}"
            if not key.isdecimal():
                raise self._error(f"{where} is no token id. {_ADVICE}")
            found[int(key)] = token
        for each in (self.pipeline.added_tokens if self.pipeline else None) or ():
            found[each.id] = each
        return dict(sorted(found.items()))

    def roles(self) -> dict[str, str]:
        """Returns the texts of bos_token, eos_token …, if named."""
        found = {}
        for role in ROLES:
            for source in (self.special, self.config):
                value: str | TokenText | None = getattr(source, role)
                if value is not None:
                    found[role] = value if isinstance(value, str) else value.content
        return found

    def chat_template(self) -> str | dict[str, str] | None:
        """Returns the chat template, or several by name. Template files win over
        tokenizer_config.json, as in transformers; processors write chat_template.json."""
        templates = dict(self._template_files())
        if set(templates) == {"default"}:
            return templates["default"]
        if templates:
            return templates
        given = self.config.chat_template
        if isinstance(given, list):
            where = f"{self.folder / CONFIG_NAME}: chat_template"
            pairs = typed(given, list[_NamedTemplate], where, self._error, _ADVICE)
            return {each.name: each.template for each in pairs}
        if given is not None:
            return given
        processor = self._read("chat_template.json", _ProcessorTemplate)
        return processor.chat_template if processor else None

    def _template_files(self) -> Iterator[tuple[str, str]]:
        files = [("default", self.folder / TEMPLATE_NAME)]
        further = self.folder / TEMPLATES_FOLDER
        files += [(path.stem, path) for path in sorted(further.glob("*.jinja"))]
        for name, file in files:
            if file.exists():
                try:
                    yield name, file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as cause:
                    raise self._error(f"{file} cannot be read as text ({cause}).") from cause

    def _read(self, name: str, shape: Any) -> Any:
        file = self.folder / name
        # A broken link is a damaged file, not a missing one.
        if not file.exists() and not file.is_symlink():
            return None
        return read_json_as(file, shape, self._error, _ADVICE)


class _NamedTemplate(JsonObject):
    name: str
    template: str


class _ProcessorTemplate(JsonObject):
    chat_template: str | dict[str, str]
