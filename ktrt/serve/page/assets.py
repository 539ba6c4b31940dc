"""The page's files, held in memory and served with their hashes."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response

from ktrt.serve.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Answers may contain anything: scripts and styles come from this server's files only, nothing is
# loaded from elsewhere, and no text becomes markup except through the sanitiser.
_POLICY = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types dompurify",
    ]
)  # fmt: skip
_HEADERS = {
    # The names of the files stay when their contents change: browsers ask, and mostly get a 304.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class _Asset:
    content: bytes
    media_type: str
    etag: str


@functools.cache
def _assets() -> Mapping[str, _Asset]:
    """Returns all files by path. A request looks its path up here, never in the file system."""
    found = {}
    for path in sorted(each for each in _FOLDER.rglob("*") if each.is_file()):
        content = path.read_bytes()
        media_type = _TYPES.get(path.suffix, "text/plain; charset=utf-8")
        etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        found[path.relative_to(_FOLDER).as_posix()] = _Asset(content, media_type, etag)
    return found


def asset_response(request: Request, path: str) -> Response:
    """Returns a file, or 304 to a client that has it. ``ApiError``: there is none."""
    asset = _assets().get(path)
    if asset is None:
        raise ApiError(404, f"the page has no file {path[:80]!r}")
    headers = {**_HEADERS, "ETag": asset.etag}
    known = {each.strip().removeprefix("W/") for each in _if_none_match(request).split(",")}
    if asset.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)


def _if_none_match(request: Request) -> str:
    value: str = request.headers.get("if-none-match", "")
    return value
