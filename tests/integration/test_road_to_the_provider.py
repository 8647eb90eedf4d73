"""Which way leads to the provider: our own, or httpx's where the environment names a proxy of HTTP."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from tests.provider import Provider, ask, polite, request
from tokenguard.config import read_config
from tokenguard.upstream._pool import PooledUpstream
from tokenguard.upstream.httpx_hop import HttpxUpstream
from tokenguard.wiring import upstream_of

pytestmark = pytest.mark.usefixtures("runner")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """The environment as if it named none."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def upstream_to(url):
    return upstream_of(read_config({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": url}))


PROXY = "http://127.0.0.1:9"
WAYS = [
    ("https://api.example/v1", {}, PooledUpstream),
    ("https://api.example/v1", {"HTTPS_PROXY": PROXY}, HttpxUpstream),
    ("https://api.example/v1", {"https_proxy": PROXY}, HttpxUpstream),
    ("https://api.example/v1", {"ALL_PROXY": PROXY}, HttpxUpstream),
    ("https://api.example/v1", {"HTTPS_PROXY": ""}, PooledUpstream),
    ("https://api.example/v1", {"http_proxy": PROXY}, PooledUpstream),
    ("http://api.example/v1", {"http_proxy": PROXY}, HttpxUpstream),
    ("http://api.example/v1", {"HTTPS_PROXY": PROXY}, PooledUpstream),
    ("https://api.example/v1", {"HTTPS_PROXY": PROXY, "NO_PROXY": "api.example"}, PooledUpstream),
    ("https://api.example/v1", {"HTTPS_PROXY": PROXY, "no_proxy": "localhost, .example"}, PooledUpstream),
    ("https://api.example:444/v1", {"HTTPS_PROXY": PROXY, "NO_PROXY": "api.example:444"}, PooledUpstream),
    ("https://api.example/v1", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, PooledUpstream),
    ("https://api.example/v1", {"HTTPS_PROXY": PROXY, "NO_PROXY": "other.example"}, HttpxUpstream),
]


@pytest.mark.parametrize(("url", "environment", "way"), WAYS)
async def test_environment_names_the_way(monkeypatch, url, environment, way):
    """A proxy for the provider's scheme is used, unless its host is excepted; else we go straight there."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    upstream = upstream_to(url)
    assert type(upstream) is way
    assert upstream.describe() == url
    await upstream.close()


class Proxy:
    """A proxy of HTTP: passes on what names a whole address, and opens tunnels.

    Attributes:
        asked: The first line of each request that came to it.
    """

    def __init__(self):
        self.asked = []

    async def __call__(self, line):
        head = await line.head()
        first, _, rest = head.partition(b"\r\n")
        self.asked.append(first)
        method, target, _ = first.split()
        if method == b"CONNECT":
            host, port = target.rsplit(b":", 1)
            reader, writer = await asyncio.open_connection(host.decode(), int(port))
            await line.say(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            host, path = target.removeprefix(b"http://").split(b"/", 1)
            reader, writer = await asyncio.open_connection(*host.decode().split(":"))
            writer.write(method + b" /" + path + b" HTTP/1.1\r\n" + rest)
        back = asyncio.create_task(passed_on(reader, line._writer))
        try:
            await passed_on(line._reader, writer)
        finally:
            back.cancel()
            writer.close()


async def passed_on(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def through_a_proxy(monkeypatch, scheme, script=polite, tls=None):
    proxy = Proxy()
    async with Provider(proxy) as road, Provider(script, tls) as provider:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{road.port}")
        upstream = upstream_to(f"{scheme}://localhost:{provider.port}/v1?api-version=1")
        try:
            yield proxy, provider, upstream
        finally:
            await upstream.close()


async def test_proxy_passes_a_call_on(monkeypatch):
    """It is asked for the whole address, and the provider gets what it would get straight from us."""
    async with through_a_proxy(monkeypatch, "http") as (proxy, provider, upstream):
        assert await ask(upstream, request(body=b"hello")) == (200, b"ok")
        url = f"http://localhost:{provider.port}/v1/chat/completions?api-version=1"
        assert proxy.asked == [f"POST {url} HTTP/1.1".encode()]
        ((head, body),) = provider.lines[0].requests
        assert (head.split(b" ")[1], body) == (b"/v1/chat/completions?api-version=1", b"hello")
        assert b"\r\nhost: localhost:%d\r\n" % provider.port in head.lower()


async def test_proxy_opens_a_tunnel(monkeypatch, tmp_path, authority, tls):
    """Over TLS it sees nothing but whom we call."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with through_a_proxy(monkeypatch, "https", tls=tls) as (proxy, provider, upstream):
        assert await ask(upstream) == (200, b"ok")
        assert proxy.asked == [b"CONNECT localhost:%d HTTP/1.1" % provider.port]
