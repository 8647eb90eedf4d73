"""Who may use the admin endpoints: the holder of a token, or, without one, a peer nearby.

Without a token the rule must keep out everybody whom somebody nearby can be made to speak for: a proxy that
forwards strangers' requests, and a browser that a foreign page drives.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from falcon import Request, Response

from tokenguard.api.wire import Resource, http_version_of, peer_of, plain, write
from tokenguard.model import Answer
from tokenguard.refusal import problem

_FORWARDED = ("forwarded", "via", "x-real-ip")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AdminResource(Resource):
    """A resource that only an admin may use.

    NOTE: what is guarded is the resource that answers, and not a path: there are many ways to write a path.
    """


class AdminRule:
    """Falcon middleware that guards every ``AdminResource``.

    Args:
        token: What ``Authorization: Bearer`` must carry; None means the rule about peers.
        allow: Where peers may be if there is no token.
    """

    def __init__(self, token: str | None, allow: Sequence[Network]) -> None:
        self._token = token
        self._allow = tuple(allow)

    async def process_resource_async(self, req: Request, resp: Response, resource: object, params: object) -> None:
        """Answer who may not, before the resource sees the request."""
        self.process_resource(req, resp, resource, params)

    def process_resource(self, req: Request, resp: Response, resource: object, params: object) -> None:
        """Answer who may not, before the resource sees the request."""
        if not isinstance(plain(resource), AdminResource):
            return
        refused = self._check_peer(req) if self._token is None else self._check_token(req, self._token)
        if refused is not None:
            write(resp, refused)
            resp.complete = True

    def _check_token(self, req: Request, token: str) -> Answer | None:
        scheme, _, given = (req.get_header("authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return None
        message = "this endpoint needs Authorization: Bearer with the token in TOKENGUARD_ADMIN_TOKEN"
        answer = problem(401, message, "invalid_request_error", "invalid_admin_token")
        answer.headers.append((b"www-authenticate", b"Bearer"))
        return answer

    def _check_peer(self, req: Request) -> Answer | None:
        why = self._objection(req)
        if why is None:
            return None
        message = f"this endpoint does not answer {why}; set TOKENGUARD_ADMIN_TOKEN to open it up"
        return problem(403, message, "invalid_request_error", "admin_not_allowed")

    def _objection(self, req: Request) -> str | None:
        names = [name.lower() for name in req.headers]
        if any(name in _FORWARDED or name.startswith("x-forwarded-") for name in names):
            return "forwarded requests"
        if http_version_of(req) == "1.0":
            return "HTTP/1.0, which is how a proxy that says nothing of itself forwards"
        if not self._is_near(peer_of(req)):
            return "peers outside TOKENGUARD_ADMIN_ALLOW"
        host = req.get_header("host") or ""
        if not _is_local_name(host):
            return "to a foreign Host"
        origin = req.get_header("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return "pages of another site"
        if (req.get_header("sec-fetch-site") or "none").lower() not in ("none", "same-origin"):
            return "pages of another site"  # a GET by an image or a link carries no Origin
        return None

    def _is_near(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._allow)


def _is_local_name(host: str) -> bool:
    """Return whether a Host cannot be a name that a stranger points at us: localhost, or an address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
