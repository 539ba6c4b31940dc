"""Refuses JSON that is no text of Unicode, holds no JSON numbers, or is nested without end.

Python's parser takes NaN, lone surrogates and 10^400, which fail only later: in a tokenizer, in an
encoder of the response. A body without any sign of them, found by a search of its bytes, is parsed
once, by the endpoint.
"""

from __future__ import annotations

import json
import re
from math import isfinite
from typing import TYPE_CHECKING, NoReturn

from ktrt.prompt.messages import is_unicode
from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

# A schema's depth in a tool's parameters is about 20.
_DEPTH = 64
# float64 ends at 308 digits, Python's reader of integers at 4300.
_DIGITS = 300
_NODES = (dict, list)
# A prompt's token ids are values; a message is an object.
_VALUES, _LISTS = 1_000_000, 50_000
# Matches from every quote, to the end of the body if it must: the search stays linear.
_TEXTS = re.compile(rb'"(?:[^"\\]|\\.)*+\\?(?:"|\Z)', re.DOTALL)
_SUSPICIOUS = re.compile(rb"\\u[dD][89a-fA-F]|NaN|Infinity|[0-9][eE]\+?[0-9]{3}|[0-9]{300}")


def check_json(body: bytes, content_type: str, max_messages: int) -> None:
    """``ApiError`` 400 names the fault of a JSON body. Malformed JSON is left to the endpoint."""
    if "json" not in content_type.lower():
        return
    # Every message has this key. Within a text the quotes would have backslashes.
    if (found := body.count(b'"role"')) > max_messages:
        raise ApiError(
            400, f"messages: expected {max_messages} or fewer (KTRT_MAX_MESSAGES), found {found}",
            param="messages",
        )  # fmt: skip
    _check_size(body)
    try:
        if not body.isascii():
            body.decode()
        nested = body.count(b"{") + body.count(b"[") > _DEPTH
        if nested or _SUSPICIOUS.search(body):
            _check(_parse(body))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError:
        return


def _check_size(body: bytes) -> None:
    """Many small values stop the event loop for seconds where a long text takes milliseconds: 8 MB
    of ``[1],`` took 20 s on a busy machine."""
    values, nodes = _count(body)
    texts = (body.count(b'"') - body.count(b'\\"')) // 2
    if (values > _VALUES or nodes > _LISTS) and texts <= _VALUES:
        values, nodes = _count(_TEXTS.sub(b"", body))
    if values > _VALUES or nodes > _LISTS:
        raise ApiError(
            400, f"the body holds {values} values in {nodes} lists and objects; the most are "
            f"{_VALUES} in {_LISTS}",
        )  # fmt: skip


def _count(body: bytes) -> tuple[int, int]:
    nodes = body.count(b"[") + body.count(b"{")
    return body.count(b",") + nodes, nodes


def _parse(body: bytes) -> object:
    return json.loads(body, parse_constant=_constant, parse_float=_number, parse_int=_integer)


def _check(value: object) -> None:
    level = [value]
    for _ in range(_DEPTH):
        for each in _texts(level):
            if not each.isascii() and not is_unicode(each):
                raise ApiError(400, "the body holds half a character (an escape \\ud800 … \\udfff)")
        level = [each for node in level for each in _inside(node) if isinstance(each, _NODES)]
        if not level:
            return
    raise _too_deep()


def _inside(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _texts(nodes: list[object]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, dict):
            yield from node
        yield from (each for each in _inside(node) if isinstance(each, str))
        if isinstance(node, str):
            yield node


def _constant(word: str) -> NoReturn:
    raise ApiError(400, f"the body holds {word}, which is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ApiError(400, f"the body holds {text[:40]}, which is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ApiError(400, f"the body holds {text[:40]}…, which is too large a number")
    return int(text)


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {_DEPTH} levels deep")
