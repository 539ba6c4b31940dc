"""Prometheus texts of several replicas → one, with a label for the replica."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(\{(.*)\})?( .*)")
_HEADER = re.compile(r"# (?:HELP|TYPE) ([a-zA-Z_:][\w:]*)")


def joined_metrics(
    responses: Sequence[Sequence[Mapping[str, Any]]], name: bytes
) -> list[dict[str, Any]]:
    """Returns the ASGI messages of one response for the responses of all replicas, whose header
    ``name`` holds the replica's name."""
    texts = {}
    for messages in responses:
        replica = dict(messages[0]["headers"])[name].decode()
        texts[replica] = b"".join(each.get("body", b"") for each in messages[1:]).decode()
    body = join_texts(texts).encode()
    dropped = (b"content-length", name)
    headers = [each for each in responses[0][0]["headers"] if each[0] not in dropped]
    headers.append((b"content-length", str(len(body)).encode()))
    return [
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


def join_texts(texts: Mapping[str, str]) -> str:
    """Returns one text of the metrics in ``texts``, by replica: each family once, with the samples
    of all."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if found := _HEADER.match(line):
                family = found[1]
                known = headers.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif sample := _SAMPLE.fullmatch(line):
                labels = f'replica="{replica}"' + (f",{sample[3]}" if sample[3] else "")
                samples.setdefault(family, []).append(f"{sample[1]}{{{labels}}}{sample[4]}")
    families = [[*headers.get(family, []), *samples.get(family, [])] for family in headers]
    return "".join(f"{line}\n" for family in families for line in family)
