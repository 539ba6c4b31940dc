"""Texts and bytes of single tokens, for log probabilities."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ktrt.generate.response import TokenResponse

T = TypeVar("T")

# JSON has no infinity; the value is vLLM's.
_LEAST = -9999.0
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN = "\ufffd"


@cache
def _byte_level() -> Mapping[str, int]:
    """Returns GPT-2's characters of the 256 bytes: printable ones are themselves, the others follow
    from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in plain]
    found = {chr(each): each for each in plain}
    return found | {chr(0x100 + place): each for place, each in enumerate(others)}


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def of(self, token: int) -> tuple[str, bytes | None]:
        """Returns the text, U+FFFD in place of a part of a character, and the bytes; None: the
        tokenizer does not say which."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def _look_up(self, token: int) -> tuple[str, bytes | None]:
        decoded: str = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(raw, bytes):  # vocabularies of tiktoken
            return raw.decode("utf-8", "replace"), raw
        if _UNKNOWN not in decoded:
            # Decoders of SentencePiece drop the space in front of a text's first word.
            if isinstance(raw, str) and raw.startswith("\u2581") and not decoded.startswith(" "):
                decoded = f" {decoded}"
            return decoded, decoded.encode("utf-8", "replace")
        return decoded, _bytes_of(raw)


def _bytes_of(raw: object) -> bytes | None:
    """Returns the bytes of a token that is no whole character."""
    if not isinstance(raw, str):
        return None
    if match := _BYTE.fullmatch(raw):
        return bytes.fromhex(match[1])
    table = _byte_level()
    return bytes(table[each] for each in raw) if all(each in table for each in raw) else None


def finite(value: float) -> float:
    """Returns a log probability that JSON can hold."""
    return max(value, _LEAST)


def escaped(token: bytes) -> str:
    r"""Returns bytes as OpenAI writes tokens that are no text: ``\xe4\xbd``."""
    return "".join(f"\\x{each:02x}" for each in token)


class ShownTokens(Generic[T]):
    """Holds what belongs to tokens back until the answer shows a part of their text: a stop string
    may take it away."""

    def __init__(self) -> None:
        self._held: list[tuple[T, int]] = []

    def rest(self) -> list[T]:
        """Returns what is held, where the answer ends without a stop string."""
        found = [each for each, _ in self._held]
        self._held.clear()
        return found

    def push(self, token: TokenResponse, item: T, length: int) -> list[T]:
        """Appends the ``item`` of a token whose text has ``length`` characters; returns the items
        that are certain now."""
        self._held.append((item, length))
        if not token.text and token.finish_reason is None:
            return []
        found, at = [], 0
        for each, size in self._held:
            # A token without text in front of the stop string belongs to what follows it.
            if token.stop_string is None or at < len(token.text):
                found.append(each)
            at += size
        self._held.clear()
        return found


def chat_token(texts: TokenTexts, token: int, value: float) -> dict[str, Any]:
    """Returns a token with its log probability, as chat completions have it."""
    text, raw = texts.of(token)
    if _UNKNOWN in text and raw is not None:
        text = escaped(raw)
    return {
        "token": text,
        "logprob": finite(value),
        "bytes": None if raw is None else list(raw),
    }


def chat_entry(
    texts: TokenTexts, token: int, value: float, top: Iterable[tuple[int, float]]
) -> dict[str, Any]:
    """Returns a token's entry of ``logprobs.content``."""
    found = chat_token(texts, token, value)
    found["top_logprobs"] = [chat_token(texts, *each) for each in top]
    return found


def completion_token(texts: TokenTexts, token: int) -> str:
    """Returns a token's text, as completions have it."""
    text, raw = texts.of(token)
    return f"bytes:{escaped(raw)}" if _UNKNOWN in text and raw is not None else text
