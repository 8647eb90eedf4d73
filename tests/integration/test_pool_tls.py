"""The pool over TLS: whom it trusts, what it says when it does not, and how such connections end."""

import asyncio
import socket
import ssl
from datetime import datetime

import pytest

from tests.provider import (
    CHUNKED,
    OK,
    Provider,
    ask,
    calling,
    polite,
    request,
    saying,
    seen,
    server_context,
    state,
)
from tokenguard.config import read_config
from tokenguard.errors import UpstreamError, UpstreamTimeout
from tokenguard.wiring import provider as hop_of

pytestmark = pytest.mark.usefixtures("runner")

UNREACHED = r"^the provider could not be reached \("


@pytest.fixture(scope="module")
def ca_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


def unreached(match):
    return pytest.raises(UpstreamError, match=UNREACHED + match, check=lambda error: not error.sent)


async def test_provider_proves_who_it_is(tls, ca_file):
    """Its name is told it before, HTTP/1.1 is agreed upon, and its connections are kept."""
    asked, agreed = [], []
    tls.sni_callback = lambda _, name, __: asked.append(name)
    tls.set_alpn_protocols(["h2", "http/1.1"])

    async def script(line):
        agreed.append(line._writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await polite(line)

    async with (
        Provider(script, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        for _ in range(3):
            assert await ask(upstream, request(body=bytes(100_000))) == (200, b"ok")
            assert state(upstream) == (1, 0, 0, 0)
        assert (asked, agreed, len(provider.lines)) == (["localhost"], ["http/1.1"], 1)


async def test_provider_may_be_an_address(tls, ca_file):
    """Then its certificate has to be for that."""
    async with (
        Provider(polite, tls) as provider,
        calling(f"https://127.0.0.1:{provider.port}", ca_file=ca_file) as upstream,
    ):
        assert await ask(upstream) == (200, b"ok")


async def test_certificate_for_another_name(authority, ca_file):
    """It is said which name it does not stand for."""
    tls = server_context(authority, "elsewhere.example")
    async with (
        Provider(polite, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        with unreached("SSLCertVerificationError: Hostname mismatch, .*'localhost'"):
            await ask(upstream)
        assert not any(line.requests for line in provider.lines)


async def test_certificate_that_nobody_vouches_for(tls):
    """Without a file of ours, those of certifi count."""
    async with Provider(polite, tls) as provider, calling(f"https://localhost:{provider.port}") as upstream:
        with unreached("SSLCertVerificationError: unable to get local issuer certificate"):
            await ask(upstream)


async def test_certificate_that_has_expired(authority, ca_file):
    """It is said that it has."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    past = datetime(2020, 1, 1)
    authority.issue_cert("localhost", not_before=past, not_after=past).configure_cert(tls)
    async with (
        Provider(polite, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        with unreached("SSLCertVerificationError: certificate has expired"):
            await ask(upstream)


@pytest.mark.parametrize(
    ("written", "said"), [(None, "No such file or directory"), ("nonsense", "NO_CERTIFICATE_OR_CRL_FOUND")]
)
async def test_file_of_certificates_that_cannot_be_read(tmp_path, written, said):
    """The file is named, for whoever set it."""
    path = tmp_path / "ca.pem"
    if written is not None:
        path.write_text(written)
    async with calling("https://localhost:1", ca_file=str(path)) as upstream:
        with unreached(rf".*no certificates in {path}: .*{said}"):
            await ask(upstream)


async def test_environment_names_who_is_trusted(tls, ca_file, monkeypatch):
    """SSL_CERT_FILE is what other tools go by."""
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    hop = hop_of(read_config({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "https://localhost"}))
    assert hop.ca_file == ca_file


async def test_provider_without_tls(ca_file):
    """It is said what it is not."""

    async def script(line):
        await line.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with (
        Provider(script) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        with unreached("SSLError: .*"):
            await ask(upstream)


async def test_provider_that_hangs_up_in_the_handshake(ca_file):
    """No connection has come about, and nothing was sent."""

    async def script(line):
        await line._reader.read(10)

    async with (
        Provider(script) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        with unreached(""):
            await ask(upstream)


async def test_handshake_that_does_not_end(ca_file):
    """The time for a connection is the handshake's too."""
    async with Provider(lambda line: line.gone()) as provider:
        url = f"https://localhost:{provider.port}"
        async with calling(url, ca_file=ca_file, connect_timeout_s=0.2) as upstream:
            with pytest.raises(UpstreamTimeout, match="could not be reached in time"):
                await ask(upstream)


@pytest.mark.parametrize("wait_s", [0, 0.005, 0.02])
async def test_handshake_may_be_given_up(ca_file, tls, wait_s):
    """A pool that is closed meanwhile has nothing left of it."""
    async with (
        Provider(polite, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        call = asyncio.create_task(ask(upstream))
        await asyncio.sleep(wait_s)
        await upstream.close()
        await asyncio.gather(call, return_exceptions=True)


async def test_provider_that_speaks_before_it_is_asked(tls, ca_file):
    """A connection that is of no use from its beginning counts for nothing."""

    async def script(line):
        await line.say(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")

    async with (
        Provider(script, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        for _ in range(10):
            await asyncio.gather(ask(upstream), return_exceptions=True)


async def test_answer_without_length_that_is_cut_is_no_whole_one(tls, ca_file):
    """Its end is told by TLS, and not by whoever cuts the line (asyncio's own loop cannot tell)."""
    if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
        return

    async def script(line):
        await line.request()
        await line.say(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await asyncio.sleep(0.05)
        with line.raw() as raw:
            raw.shutdown(socket.SHUT_RDWR)

    async with (
        Provider(script, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        with pytest.raises(UpstreamError, match="broke off"):
            await ask(upstream)


async def test_answer_without_length_ends_with_its_connection(tls, ca_file):
    """Where TLS says that it is over, it is whole."""
    async with (
        Provider(saying(b"HTTP/1.1 200 OK\r\n\r\nhello"), tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        assert await ask(upstream) == (200, b"hello")


async def test_kept_connection_that_is_closed_is_not_used(tls, ca_file):
    """Whatever waits in its socket when nobody has asked is no answer."""

    async def script(line):
        await line.request()
        await line.say(OK)
        await asyncio.sleep(0.02)

    async with (
        Provider(script, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        for _ in range(2):
            assert await ask(upstream) == (200, b"ok")
            await seen(lambda: state(upstream) == (0, 0, 0, 0))


async def test_reader_that_does_not_read_holds_the_provider_up(tls, ca_file):
    """Of 40 MB no more is taken than fits the sockets; what is left comes once it is read."""
    size, piece = 40_000_000, bytes(500_000)
    sent = 0

    async def script(line):
        nonlocal sent
        await line.request()
        await line.say(CHUNKED)
        while sent < size:
            await line.say(b"%x\r\n%b\r\n" % (len(piece), piece))
            sent += len(piece)
        await line.say(b"0\r\n\r\n")
        await line.gone()

    async with (
        Provider(script, tls) as provider,
        calling(f"https://localhost:{provider.port}", ca_file=ca_file) as upstream,
    ):
        response = await upstream.open(request())
        await asyncio.sleep(0.5)
        assert sent < 16_000_000
        assert sum([len(got) async for got in response.chunks()]) == size
        await response.close()
