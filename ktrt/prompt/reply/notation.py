"""Arguments of calls in notations that are no JSON: Python's and Gemma's."""

import re
from typing import Literal

from ktrt.prompt.reply.json_text import dumped, parsed

Notation = Literal["python", "gemma"]

_OPEN, _CLOSE = "([{", ")]}"
# The token around Gemma's texts.
GEMMA_QUOTE = '<|"|>'
_QUOTES = {"python": ('"', "'"), "gemma": (GEMMA_QUOTE, '"')}
# A scan outside of a text stops at these, and within one at its end; an escape is skipped.
_STOPS = re.compile(r'[()\[\]{},"\'<]')
_ENDS = {each: re.compile(rf"\\.|{each}", re.DOTALL) for each in ('"', "'")}
_ENDS[GEMMA_QUOTE] = re.compile(re.escape(GEMMA_QUOTE))
_ARGUMENT = {
    "python": re.compile(r"\s*([^\W\d]\w*)\s*=(.*)", re.DOTALL),
    "gemma": re.compile(r'\s*(?:<\|"\|>)?([^\s:"<{}\[\]]+)(?:<\|"\|>)?\s*:(.*)', re.DOTALL),
}
_QUOTED = r'"(?:[^"\\]|\\.)*+"'
# Texts, words and, of everything else, one character.
_PARTS = {
    "python": re.compile(rf"({_QUOTED}|'(?:[^'\\]|\\.)*+')|([^\s()\[\]{{}}:,\"']+)|(.)", re.DOTALL),
    "gemma": re.compile(rf'(<\|"\|>.*?<\|"\|>|{_QUOTED})|([^\s\[\]{{}}:,"<]+)|(.)', re.DOTALL),
}
_WORDS = {"True": "true", "False": "false", "None": "null"}
_COLON = re.compile(r"\s*:")
_TUPLES = {"(": "[", ")": "]"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}


class ArgumentScanner:
    """Finds the end of one argument of a call, whose text grows."""

    def __init__(self, notation: Notation) -> None:
        self._quotes = _QUOTES[notation]
        self._at = self._depth = 0
        self._quote = ""

    def find_end(self, text: str, *, ended: bool) -> int | None:
        """Returns where the comma or bracket is that ends the argument; None: not in ``text``,
        which begins as it did in the call before."""
        while True:
            if self._quote:
                if not self._leave_text(text):
                    return None
                continue
            found = _STOPS.search(text, self._at)
            if found is None:
                self._at = len(text)
                return None
            self._at, mark = found.start(), found[0]
            quote = next((each for each in self._quotes if text.startswith(each, self._at)), "")
            if quote:
                self._quote = quote
                self._at += len(quote)
                continue
            rest = text[self._at : self._at + len(GEMMA_QUOTE)]
            if not ended and any(each.startswith(rest) for each in self._quotes):
                return None
            if self._depth == 0 and (mark == "," or mark in _CLOSE):
                return self._at
            self._depth += (mark in _OPEN) - (mark in _CLOSE)
            self._at += 1

    def _leave_text(self, text: str) -> bool:
        found = _ENDS[self._quote].search(text, self._at)
        while found and found[0] != self._quote:
            self._at = found.end()
            found = _ENDS[self._quote].search(text, self._at)
        if found is None:
            return False
        self._at, self._quote = found.end(), ""
        return True


def read_argument(text: str, notation: Notation) -> tuple[str, str] | None:
    """Returns an argument's name and its value as JSON text; None if it is none."""
    found = _ARGUMENT[notation].fullmatch(text)
    if found is None:
        return None
    try:
        return found[1], dumped(parsed(_as_json(found[2], notation)))
    except ValueError:
        return None


def _as_json(text: str, notation: Notation) -> str:
    parts: list[str] = []
    for found in _PARTS[notation].finditer(text):
        quoted, word, other = found.groups()
        if quoted:
            parts.append(dumped(_unquoted(quoted)))
        elif word:
            is_key = _COLON.match(text, found.end())
            parts.append(dumped(word) if is_key else _value(word, notation))
        elif not other.isspace():
            if other in _CLOSE and parts and parts[-1] == ",":
                parts.pop()
            parts.append(_TUPLES.get(other, other))
    return "".join(parts)


def _unquoted(text: str) -> str:
    if text.startswith(GEMMA_QUOTE):
        return text[len(GEMMA_QUOTE) : -len(GEMMA_QUOTE)]
    return _ESCAPE.sub(_character, text[1:-1])


def _character(escape: re.Match[str]) -> str:
    code = escape[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    # Python keeps the backslash of what is no escape.
    return _ESCAPED.get(code, code if code in "\"'\\/" else escape[0])


def _value(word: str, notation: Notation) -> str:
    """Returns a word as JSON text: a number, true, false or null, or a text without quotes, which
    only Gemma's notation may have."""
    word = _WORDS.get(word, word)
    try:
        parsed(word)
    except ValueError:
        if notation == "python":
            raise
        return dumped(word)
    return word
