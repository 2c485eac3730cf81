"""Answers of the board to a request: a page, plain text or CSV, whole or piece by piece."""

import gzip
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

HTML, PLAIN, CSV = "text/html", "text/plain", "text/csv"
# Of what is not a page a browser runs and loads nothing.
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; sandbox"
# Zipping is to cost less than sending does.
_ZIP_LEVEL = 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to a request.

    Attributes:
        kind: media type of the content, which is UTF-8.
        pieces: content.
        size: number of bytes of the content; None = unknown before it is sent.
        status: status of HTTP.
        etag: name that another content would not have; "" = none.
        zipped: the content, compressed by gzip, if that is worth it.
        policy: Content-Security-Policy of the content.
        cookie: cookie that the browser is to keep; "" = none.
    """

    kind: str
    pieces: Iterable[bytes]
    size: int | None
    status: int = 200
    etag: str = ""
    zipped: bytes | None = None
    policy: str = NOTHING
    cookie: str = ""


def whole(text: str, kind: str = PLAIN, *, status: int = 200, policy: str = NOTHING) -> Answer:
    """An answer whose content is there."""
    content = text.encode(errors="backslashreplace")
    return Answer(
        kind=kind,
        pieces=(content,),
        size=len(content),
        status=status,
        etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"' if status == 200 else "",
        zipped=gzip.compress(content, _ZIP_LEVEL, mtime=0) if len(content) > 2**14 else None,
        policy=policy,
    )


def streamed(pieces: Iterable[bytes], kind: str) -> Answer:
    """An answer whose content is made while it is sent."""
    return Answer(kind=kind, pieces=pieces, size=None)
