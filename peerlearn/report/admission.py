"""Whom the board answers: a browser that opened it by its token, asked by nobody else's page.

A loopback port is open to every account of the machine, and to every page that a browser shows. So a request is refused

- whose Host is no name of this machine: a foreign name may be made to lead here (DNS rebinding);
- that another page makes, by Origin and Sec-Fetch-Site; but a link to the board may be followed;
- without the token, which the address that is printed has. It becomes a cookie, which no script and no other site gets.
"""

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import replace
from email.message import Message
from urllib.parse import urlsplit

from peerlearn.report.answers import HTML, Answer, whole

TOKEN = "token"
# Their port may be any: that of the near end of a tunnel is another.
_NAMES = ("127.0.0.1", "localhost", "::1")
# The page goes on by itself: where the link came from another page, the cookie is not sent before.
_WELCOME = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>peerlearn board</title>'
    '<meta http-equiv="refresh" content="0; url=/"></head><body><a href="/">To the runs</a></body></html>'
)
_LOCKED = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>peerlearn board</title></head><body>'
    "<p>This page is opened by the address that <code>peerlearn board</code> has printed: the one with a token.</p>"
    '<p>If you have opened that address in this browser: <a href="/">to the runs</a>.</p></body></html>'
)
# Without `sandbox`, a browser would not go on from the page.
_LINK_ONLY = "default-src 'none'; base-uri 'none'; form-action 'none'"


class Door:
    """Decides about requests.

    Attributes:
        token: token that opens the board; None = whoever can reach the port may read.
    """

    def __init__(self, *, takes_token: bool = True) -> None:
        self.token = secrets.token_urlsafe(32) if takes_token else None
        # Cookies do not tell ports apart, so that those of two boards need two names.
        self._cookie = f"peerlearn-{secrets.token_hex(4)}"

    def refusal(self, path: str, query: Mapping[str, str], headers: Message) -> Answer | None:
        """What is answered instead of the content; None where the content may be read.

        Args:
            path: path of the request.
            query: fields of its query.
            headers: headers of the request.
        """
        hosts = headers.get_all("Host", [])
        if len(hosts) != 1 or _name(hosts[0]) not in _NAMES:
            return whole("403: this name is not one of the board's: use 127.0.0.1\n", status=403)
        if _is_foreign(headers, hosts[0]):
            return whole("403: another page has asked for this\n", status=403)
        if self.token is None:
            return None
        if path == "/" and _equal(query.get(TOKEN, ""), self.token):
            cookie = f"{self._cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            return replace(whole(_WELCOME, HTML, policy=_LINK_ONLY), etag="", cookie=cookie)
        if any(_equal(value, self.token) for value in self._cookies(headers)):
            return None
        return whole(_LOCKED, HTML, status=403, policy=_LINK_ONLY)

    def _cookies(self, headers: Message) -> list[str]:
        pairs = (each.partition("=") for each in ";".join(headers.get_all("Cookie", [])).split(";"))
        return [value.strip() for name, _, value in pairs if name.strip() == self._cookie]


def _name(host: str) -> str:
    """The name in a Host header; "" if it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    return parts.hostname or "" if parts.netloc == host and "@" not in host else ""


def _is_foreign(headers: Message, host: str) -> bool:
    """Whether a page of another origin makes the request, other than by a link that the user follows to it."""
    if any(origin != f"http://{host}" for origin in headers.get_all("Origin", [])):
        return True
    # Browsers of some years ago do not send these; cookies keep other sites' pages out of those too.
    if headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin"):
        return False
    kind = headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")
    return kind != ("navigate", "document")


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
