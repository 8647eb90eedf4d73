"""Asks the provider for its limits: the admin API, or one call as small as can be.

Source: https://platform.openai.com/docs/api-reference/project-rate-limits
"""

from __future__ import annotations

import json
import time
from typing import NamedTuple
from urllib.parse import quote

import httpx

from tokenguard.errors import InvalidRequest, ProviderError
from tokenguard.model import Headers
from tokenguard.providers.limits import AdminLimit, error_text, read_page
from tokenguard.providers.openai import CHAT_PATH

PAGE = 100
MAX_PAGES = 100
MAX_BYTES = 2**24
"""An answer is given up that is longer."""


class ProviderAccount(NamedTuple):
    """Whose limits they are.

    Attributes:
        base_url: Where the provider's API begins.
        credentials: Header fields that authenticate calls.
        admin_key: Opens the admin API; None if there is none.
        project: The project whose limits the admin API tells.
    """

    base_url: str
    credentials: Headers
    admin_key: str | None = None
    project: str | None = None

    def __repr__(self) -> str:
        return f"<ProviderAccount at {self.base_url}>"


class ProviderSource:
    """Asks, and waits for the answer.

    Args:
        account: Whose limits.
        timeout_s: For an answer, all of it, and for a connection before that.
    """

    def __init__(self, account: ProviderAccount, timeout_s: float) -> None:
        self._account = account
        self._timeout_s = timeout_s

    @property
    def has_admin(self) -> bool:
        """Whether there is a key for the admin API."""
        return self._account.admin_key is not None

    def read(self) -> list[AdminLimit]:
        """Return all limits that the admin API tells.

        Raises:
            ProviderError: It does not, or not all of them.
        """
        path = f"/organization/projects/{quote(self._account.project or '', safe='')}/rate_limits"
        limits: list[AdminLimit] = []
        after: str | None = None
        with self._client({"authorization": f"Bearer {self._account.admin_key}"}) as client:
            for _ in range(MAX_PAGES):
                params = {"limit": str(PAGE)} | ({} if after is None else {"after": after})
                _, body = self._ask(client, "GET", path, params=params)
                try:
                    page, after = read_page(body)
                except ValueError as error:
                    raise ProviderError(f"the provider's answer to GET {path} cannot be read: {error}") from None
                limits += page
                if after is None:
                    return limits
        raise ProviderError(f"the provider's answer to GET {path} has more than {MAX_PAGES} pages")

    def probe(self, model: str) -> Headers:
        """Make a call as small as can be; return the fields of its answer.

        Raises:
            InvalidRequest: There is no key to call with.
            ProviderError: It was not answered, or refused.
        """
        if not self._account.credentials:
            raise InvalidRequest("probe", "probe needs OPENAI_API_KEY, which is not set")
        message = {"role": "user", "content": "."}
        body = json.dumps({"model": model, "messages": [message], "max_completion_tokens": 1})
        fields = {name.decode(): value.decode() for name, value in self._account.credentials}
        with self._client({**fields, "content-type": "application/json"}) as client:
            answer, _ = self._ask(client, "POST", CHAT_PATH, content=body)
        return [(name.lower(), value) for name, value in answer.headers.raw]

    def _client(self, fields: dict[str, str]) -> httpx.Client:
        return httpx.Client(headers=fields, timeout=self._timeout_s, follow_redirects=False)

    def _ask(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        content: str = "",
    ) -> tuple[httpx.Response, bytes]:
        url = httpx.URL(self._account.base_url)
        url = url.copy_with(path=url.path.rstrip("/") + path)
        try:
            with client.stream(method, url.copy_merge_params(params or {}), content=content or None) as answer:
                body = self._body(answer)
        except httpx.TimeoutException:
            raise ProviderError(f"the provider did not answer {method} {path} in {self._timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # the latter of a page that begins nowhere
            why = str(error) or type(error).__name__
            raise ProviderError(f"the provider cannot be asked to {method} {path}: {self.plain(why)}") from None
        if not 200 <= answer.status_code < 300:
            said = error_text(self.plain(body.decode(errors="replace")).encode())
            raise ProviderError(f"the provider answered {answer.status_code} to {method} {path}: {said}")
        return answer, body

    def _body(self, answer: httpx.Response) -> bytes:
        """Return the body of an answer, which is given up if it takes too long or does not end."""
        until_s, body = time.monotonic() + self._timeout_s, b""
        for piece in answer.iter_bytes():
            body += piece
            if time.monotonic() > until_s:
                raise httpx.ReadTimeout("the answer goes on")
            if len(body) > MAX_BYTES:
                raise httpx.RemoteProtocolError(f"the answer has more than {MAX_BYTES} bytes")
        return body

    def plain(self, text: str) -> str:
        """Return a text without any secret of ours that it may repeat."""
        secrets = [self._account.admin_key]
        secrets += [value.decode() for name, value in self._account.credentials if name == b"authorization"]
        for secret in secrets:
            if secret:
                text = text.replace(secret.removeprefix("Bearer "), "…")
        return text
