"""Holds answers to a grammar: JSON of a schema, calls of tools.

xgrammar compiles structural tags (plain data) for a vocabulary and tells which tokens may come
next. It comes with ``pip install 'ktrt[serve]'`` and is imported when it is needed.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from queue import Empty, LifoQueue
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import ConfigError, KtrtError
from ktrt.generate.grammar_worker import GrammarWorker

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

# Schemas of more would take minutes or gigabytes: xgrammar unrolls them. OpenAI's own limits are
# 5 levels, 5,000 properties and 1,000 enum values.
_MOST_BYTES = 256 * 1024
_MOST_DEPTH = 64
_MOST_COUNT = 5000
_MOST_PATTERN = 1000
# Repetitions within repetitions: {0,1000} of {0,1000} took 0.4 s a token, a third level 7 s.
_MOST_REPEATED, _MOST_IN_ALL = 20_000, 100_000
_REPEATED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|\{[0-9]*,?([0-9]*)\}|[()]", re.DOTALL)
# CPU seconds that a token may take; 0.001 are usual. The thread is everybody's.
_SLOWEST = 0.5
_COUNTS = (
    "minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties",
)  # fmt: skip
_SECONDS = 20.0
# One that takes too long must not keep others from being compiled.
_COMPILERS = 2
# The time and line of C++ before xgrammar's messages.
_WHERE = re.compile(r"\[[\d:]+\] \S+\.cc:\d+: ")
# The special token around texts in xgrammar's style of Gemma's calls, which no structure names.
_GEMMA_STYLE, _GEMMA_QUOTE = '"style": "gemma"', '<|"|>'
_ENTRIES = 64
_CACHE_BYTES = 512 * 1024 * 1024


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest.

    ``vocab_size`` is the number of logits: models pad it. Compiling takes place in up to
    ``_COMPILERS`` processes, at most ``seconds`` and bounded in memory; a grammar that takes more
    is refused. Any thread may use it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, *, seconds: float = _SECONDS) -> None:
        self._tokenizer, self._vocab_size, self._seconds = tokenizer, vocab_size, seconds
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._info: Any = None
        # Processes that are free, the latest first; None: it is started when it is needed.
        self._compilers: LifoQueue[GrammarWorker | None] = LifoQueue()
        for _ in range(_COMPILERS):
            self._compilers.put(None)
        self._special = _special_tokens(tokenizer)

    def compile(self, structure: Mapping[str, Any]) -> Grammar:
        """Returns the grammar of a structural tag's format.

        ``ConfigError``: xgrammar refuses it, it is too large or takes too long, or xgrammar is not
        installed. ``KtrtError``: another one takes too long.
        """
        xgrammar = _import()
        _check(structure)
        text = json.dumps({"type": "structural_tag", "format": structure}, ensure_ascii=False)
        # A special token in a string would be a part of it that nobody sees, or another model's
        # end of the answer: only those that the structure names may come.
        named = text + _GEMMA_QUOTE if _GEMMA_STYLE in text else text
        unwanted = [each for each, name in self._special.items() if name not in named]
        with self._lock:
            compiled = self._kept.get(text)
            if compiled is not None:
                self._kept.move_to_end(text)
                return Grammar(xgrammar, compiled, self._vocab_size, unwanted)
        compiled = self._compile(xgrammar, text)
        with self._lock:
            self._kept[text] = compiled
            while len(self._kept) > _ENTRIES or (
                len(self._kept) > 1 and self._bytes() > _CACHE_BYTES
            ):
                self._kept.popitem(last=False)
        return Grammar(xgrammar, compiled, self._vocab_size, unwanted)

    def _bytes(self) -> int:
        return sum(each.memory_size_bytes for each in self._kept.values())

    def _compile(self, xgrammar: Any, text: str) -> Any:
        with self._lock:
            if self._info is None:
                self._info = xgrammar.TokenizerInfo.from_huggingface(
                    self._tokenizer, vocab_size=self._vocab_size
                )
        try:
            compiler = self._compilers.get(timeout=self._seconds)
        except Empty:
            raise KtrtError(
                "grammars of other requests are still being compiled; try again"
            ) from None
        try:
            if compiler is None or not compiler.alive:
                compiler = GrammarWorker(self._info.serialize_json())
            found = compiler.compile(text, self._seconds)
        except ConfigError as error:
            reason = _WHERE.sub("", " ".join(str(error).split()))
            raise ConfigError(f"the schema cannot be enforced: {reason:.300}") from error
        finally:
            self._compilers.put(compiler)
        return xgrammar.CompiledGrammar.deserialize_json(found, self._info)


class Grammar:
    """A compiled grammar; each answer needs its own constraint. ``unwanted``: ids that it never
    allows, unless they end the answer."""

    def __init__(
        self, xgrammar: Any, compiled: Any, vocab_size: int, unwanted: Collection[int]
    ) -> None:
        self._xgrammar, self._compiled, self._vocab_size = xgrammar, compiled, vocab_size
        self._unwanted = unwanted

    def constraint(self, stop_ids: Collection[int]) -> GrammarConstraint:
        """Returns a constraint for one answer. ``stop_ids`` end the answer: they are allowed only
        once it is complete."""
        matcher = self._xgrammar.GrammarMatcher(
            self._compiled,
            override_stop_tokens=[each for each in stop_ids if each < self._vocab_size],
        )
        unwanted = [each for each in self._unwanted if each not in stop_ids]
        return GrammarConstraint(self._xgrammar, matcher, self._vocab_size, unwanted)


class GrammarConstraint:
    """Holds one answer to a grammar; a ``Constraint`` of ``ktrt.generate.sampling``."""

    def __init__(
        self, xgrammar: Any, matcher: Any, vocab_size: int, unwanted: Sequence[int]
    ) -> None:
        self._apply, self._matcher = xgrammar.apply_token_bitmask_inplace, matcher
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._vocab_size = vocab_size
        self._unwanted = self._bitmask.new_tensor([*unwanted], dtype=torch.long)

    def mask(self, logits: torch.Tensor) -> None:
        """Sets the logits [vocab_size] of tokens that cannot come next to -inf, in place."""
        if self._matcher.is_terminated():
            return
        before = time.thread_time()
        size = min(len(logits), self._vocab_size)
        # Words that an adapter adds are beyond the base's vocabulary.
        logits[size:] = float("-inf")
        if self._matcher.fill_next_token_bitmask(self._bitmask):
            self._apply(logits.unsqueeze(0), self._bitmask, vocab_size=size)
        logits[self._unwanted[self._unwanted < size]] = float("-inf")
        _check_time(before)

    def accept(self, token: int) -> None:
        """Notes the chosen token."""
        before = time.thread_time()
        if not self._matcher.is_terminated() and not self._matcher.accept_token(token):
            raise KtrtError(f"the grammar does not allow token {token}")
        _check_time(before)


def _check_time(before: float) -> None:
    seconds = time.thread_time() - before
    if seconds > _SLOWEST:
        raise ConfigError(
            f"the schema takes {seconds:.1f} s a token, at most {_SLOWEST} are allowed: its "
            "patterns can be read in too many ways; make them simpler"
        )


def _import() -> Any:
    # With torch before 2.10 its tvm_ffi compiles a C++ extension at the first import, which takes
    # seconds and a compiler, to hand tensors over faster; a mask is one tensor a token.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    try:
        import xgrammar
    except ImportError as error:
        raise ConfigError(
            "response_format and tool_choice need xgrammar: pip install 'ktrt[serve]'"
        ) from error
    return xgrammar


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {number: each.content for number, each in added.items() if each.special}
    return found | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _check(structure: Mapping[str, Any]) -> None:
    """Refuses what would take too much time or memory."""
    try:
        size = len(json.dumps(structure, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is no JSON: {error}") from error
    if size > _MOST_BYTES:
        raise ConfigError(f"the schema has {size} bytes; at most {_MOST_BYTES} can be enforced")
    patterns: list[str] = []
    for depth, key, value in _walk(structure):
        if depth > _MOST_DEPTH:
            raise ConfigError(f"the schema has more than {_MOST_DEPTH} levels")
        if key in _COUNTS and isinstance(value, int | float) and value > _MOST_COUNT:
            raise ConfigError(f"the schema: {key}: expected at most {_MOST_COUNT}, found {value}")
        if key == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise ConfigError(
                f"the schema: $ref: expected a place in the schema itself, such as '#/$defs/x', "
                f"found {value!r:.80}"
            )
        patterns += _patterns(key, value)
    _check_patterns(patterns)


def _patterns(key: str, value: object) -> list[str]:
    """Returns the regular expressions of a schema's keyword."""
    if key == "patternProperties" and isinstance(value, Mapping):
        return [*value]
    return [value] if key == "pattern" and isinstance(value, str) else []


def _check_patterns(patterns: Sequence[str]) -> None:
    repeated = 0
    for pattern in patterns:
        if len(pattern) > _MOST_PATTERN:
            raise ConfigError(
                f"the schema: pattern: expected at most {_MOST_PATTERN} characters, found "
                f"{len(pattern)}"
            )
        count = _repetitions(pattern)
        repeated += count
        if count > _MOST_REPEATED or repeated > _MOST_IN_ALL:
            raise ConfigError(
                "the schema: pattern: expected repetitions within each other of "
                f"{_MOST_REPEATED} at most, {_MOST_IN_ALL} in all patterns, found {count} in "
                f"{pattern!r:.80}, {repeated} so far"
            )


def _repetitions(pattern: str) -> int:
    """Returns the largest product of counted repetitions within each other."""
    # The largest product in each open group, and in the group that was closed last.
    groups, latest = [1], 1
    for found in _REPEATED.finditer(pattern):
        if found[0] == "(":
            groups.append(1)
        elif found[0] == ")" and len(groups) > 1:
            latest = groups.pop()
        elif found[0].startswith("{"):
            count = int(found[1] or found[0].strip("{,}") or 1) if len(found[0]) < 12 else 10**9
            closed = pattern[found.start() - 1 : found.start()] == ")"
            latest = (latest if closed else 1) * max(count, 1)
        groups[-1] = max(groups[-1], latest)
        latest = latest if found[0] == ")" else 1
    return max(groups)


def _walk(value: object) -> Iterator[tuple[int, str, object]]:
    """Yields all values below, with their depth and key, without recursion."""
    left: list[tuple[int, object]] = [(0, value)]
    while left:
        depth, each = left.pop()
        if isinstance(each, Mapping):
            for key, inner in each.items():
                yield depth, str(key), inner
                left.append((depth + 1, inner))
        elif isinstance(each, list | tuple):
            left += [(depth + 1, inner) for inner in each]
