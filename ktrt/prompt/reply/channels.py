"""Headers of messages in OpenAI's harmony format: ``<|channel|>analysis<|message|>``, with a
recipient for calls, ``<|channel|>commentary to=functions.f <|constrain|>json<|message|>``."""

import re
from dataclasses import dataclass

_BEGINS = ("<|channel|>", "<|start|>", "<|message|>", "to=")
_END = "<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=(?:functions\.)?([^\s<>]+)")
# Longer headers are none.
_MOST = 400


@dataclass(frozen=True)
class Header:
    """``length`` of its text; "" without channel or recipient."""

    length: int
    channel: str = ""
    function: str = ""


def is_header(text: str) -> bool | None:
    """Returns whether a header begins here; None if the text is too short to tell."""
    if any(text.startswith(each) for each in _BEGINS):
        return True
    return None if any(each.startswith(text) for each in _BEGINS) else False


def find_header(text: str, *, ended: bool) -> Header | None:
    """Returns the header that the text begins with; None while it is incomplete."""
    at = text.find(_END, 0, _MOST)
    if at < 0:
        if not ended and len(text) < _MOST:
            return None
        if len(text) < _MOST:  # cut off, it holds no text
            return Header(len(text))
        mark = next((each for each in _BEGINS if text.startswith(each)), "")
        return Header(len(mark) if mark.startswith("<") else 0)
    head = text[:at]
    channel, function = _CHANNEL.search(head), _FUNCTION.search(head)
    return Header(
        at + len(_END),
        channel[1] if channel else "",
        function[1] if function else "",
    )
