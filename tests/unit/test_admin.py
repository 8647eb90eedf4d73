"""Who may use the admin endpoints, over ASGI without a socket."""

import ipaddress

import pytest
from falcon import asgi, testing

from tokenguard.api.admin import AdminResource, AdminRule
from tokenguard.api.wire import Resource, add_error_handlers, over_asgi
from tokenguard.asgi import create_app
from tokenguard.config import read_config

LOOPBACK = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))
NEAR = "127.0.0.1"
FAR = "203.0.113.7"
BUDGET = "/config/budget"


class Open(Resource):
    """A resource for everybody."""

    def on_get(self, req, resp, **_):
        resp.media = {"path": req.path}

    on_post = on_delete = on_get


class Guarded(Open, AdminResource):
    """A resource for admins."""


def app_of(token=None, allow=LOOPBACK):
    """Return an app with a guarded and an open resource."""
    app = asgi.App(middleware=[AdminRule(token, allow)])
    add_error_handlers(app)
    app.add_route(BUDGET, over_asgi(Guarded()))
    app.add_route(BUDGET + "/{scope}/{scope_id:path}", over_asgi(Guarded()))
    app.add_route("/", over_asgi(Open()))
    app.add_route("/v1/models/{model:path}", over_asgi(Open()))
    return app


def ask(app, path=BUDGET, *, peer=NEAR, method="GET", host="localhost:8000", client=(), **headers):
    """Return the answer to a request of a peer; headers with _ for -."""

    async def served(scope, receive, send):
        if scope["type"] == "http":
            scope["client"] = (peer, 4711) if client == () else client
        await app(scope, receive, send)

    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return testing.simulate_request(served, method, path, headers=fields, host=host)


def assert_refused(answer, status, why=""):
    assert answer.status_code == status
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert why in error["message"]


# --- without a token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_loopback_may(peer, method):
    """A peer on this machine, by IPv4, IPv6 or the one mapped into the other, may do everything."""
    assert ask(app_of(), peer=peer, method=method).status_code == 200


@pytest.mark.parametrize(
    "peer", ["203.0.113.7", "10.0.0.1", "128.0.0.1", "0.0.0.0", "::", "::2", "fe80::1", "::ffff:10.0.0.1"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"])
def test_other_peers_may_not(peer, method):
    """A peer from elsewhere gets 403 whatever the method is, and is told about the token."""
    answer = ask(app_of(), peer=peer, method=method)

    assert answer.status_code == 403
    if method != "HEAD":
        assert_refused(answer, 403, "TOKENGUARD_ADMIN_TOKEN")


@pytest.mark.parametrize(
    ("network", "peer", "status"),
    [
        ("172.17.0.0/16", "172.17.0.1", 200),
        ("172.17.0.0/16", "::ffff:172.17.0.1", 200),
        ("172.17.0.0/16", "172.18.0.1", 403),
        ("172.17.0.0/16", "127.0.0.1", 403),
        ("fd00::/8", "fd00::1", 200),
        ("fd00::/8", "10.0.0.1", 403),
        ("fe80::/10", "fe80::1%eth0", 200),
        ("0.0.0.0/0", "203.0.113.7", 200),
        ("0.0.0.0/0", "::1", 403),
    ],
)
def test_allowed_networks_decide(network, peer, status):
    """Peers within the networks that are allowed may, and only they."""
    app = app_of(allow=[ipaddress.ip_network(network)])

    assert ask(app, peer=peer).status_code == status


@pytest.mark.parametrize(
    "client", [None, ("", 0), ("unix", 0), ("localhost", 1), ("127.0.0.1.nip.io", 1), [None, 1]]
)
def test_peer_without_an_address_may_not(client):
    """A peer that the server cannot name by its address is not near."""
    assert ask(app_of(), client=client).status_code == 403


@pytest.mark.parametrize(
    "header",
    [
        "forwarded",
        "x_forwarded_for",
        "x_forwarded_host",
        "x_forwarded_proto",
        "x_forwarded_server",
        "X_Forwarded_For",
    ],
)
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_forwarded_request_may_not(header, value):
    """Whom a proxy nearby speaks for is not known: forwarded requests are refused."""
    assert_refused(ask(app_of(), **{header: value}), 403, "forwarded")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "[::1]",
        "[::1]:8000",
        "10.1.2.3",
    ],
)
def test_host_that_names_this_machine_may(host):
    """Localhost and addresses cannot be names that a stranger points here."""
    assert ask(app_of(), host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "example.com:8000",
        "localhost.example.com",
        "127.0.0.1.example.com",
        "127.0.0.1.nip.io",
        "tokenguard",
        "xlocalhost",
        "[::1",
        ":8000",
        "1",
    ],
)
def test_foreign_host_may_not(host):
    """A name that somebody else can point at us may be a rebound page's: it is refused."""
    assert_refused(ask(app_of(), host=host), 403, "Host")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost.evil.example:8000",
        "http://localhost:9000",
        "http://localhost",
        "http://127.0.0.1:8000",
        "null",
        "",
        "file://",
        "http://[::1",
        "localhost:8000",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_page_of_another_site_may_not(origin, method):
    """A browser that a foreign page drives is refused, even if what it says of itself cannot be read."""
    assert_refused(ask(app_of(), origin=origin, method=method), 403, "another site")


@pytest.mark.parametrize("origin", ["http://localhost:8000", "http://LOCALHOST:8000"])
def test_page_of_our_own_may(origin):
    """A page that came from here may."""
    assert ask(app_of(), origin=origin, method="POST").status_code == 200


def test_token_is_not_asked_for_where_none_is_set():
    """Authorization opens nothing, and closes nothing, without a token."""
    assert ask(app_of(), authorization="Bearer x").status_code == 200
    assert ask(app_of(), authorization="Bearer None", peer=FAR).status_code == 403


# --- with a token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", ["Bearer s3cret", "bearer s3cret", "BEARER   s3cret "])
@pytest.mark.parametrize("peer", [NEAR, FAR])
def test_right_token_opens_from_everywhere(authorization, peer):
    """With the token a peer may from wherever it calls, through proxies and under any Host."""
    answer = ask(
        app_of("s3cret"),
        peer=peer,
        authorization=authorization,
        host="tokenguard.example",
        x_forwarded_for="10.0.0.1",
        origin="https://console.example",
    )

    assert answer.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer wrong",
        "Bearer",
        "Bearer ",
        "",
        "s3cret",
        "Basic s3cret",
        "Bearer s3cre",
        "Bearer s3crets",
        "Bearer S3CRET",
    ],
)
@pytest.mark.parametrize("peer", [NEAR, FAR])
def test_wrong_token_is_a_401_from_everywhere(authorization, peer):
    """Once a token is set, nothing else opens, not even from this machine; the answer does not tell it."""
    answer = ask(app_of("s3cret"), peer=peer, authorization=authorization)

    assert_refused(answer, 401, "TOKENGUARD_ADMIN_TOKEN")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "s3cret" not in answer.text


def test_missing_token_is_a_401():
    """Without Authorization there is nothing to check."""
    assert_refused(ask(app_of("s3cret")), 401)


def test_token_that_is_no_ascii_is_wrong_and_no_failure():
    """Bytes of any kind in Authorization are a wrong token."""
    assert ask(app_of("s3cret"), authorization="Bearer s\xe9cret").status_code == 401


# --- what is guarded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/models/gpt-4o", "/v1/models/config/budget"])
@pytest.mark.parametrize("token", [None, "s3cret"])
def test_other_endpoints_are_open(path, token):
    """The rule is about admin endpoints alone."""
    answer = ask(
        app_of(token), path, peer=FAR, host="example.com", origin="https://evil.example", forwarded="for=1.2.3.4"
    )

    assert answer.status_code == 200


TRICKS = [
    "/config/budget",
    "/config/budget/",
    "//config/budget",
    "///config//budget",
    "/config/../config/budget",
    "/v1/../config/budget",
    "/./config/budget",
    "/%63onfig/budget",
    "/config%2Fbudget",
    "/CONFIG/BUDGET",
    "/config/budget;x",
    "/config/budget/user/alice",
    "//config/budget/user/alice",
    "/config/budget/user/a/../../b",
    "//config/budget/user//",
]


class Silent:
    """An upstream that is never asked."""

    async def open(self, request):
        raise AssertionError(f"asked for {request.path}")

    async def close(self):
        pass


@pytest.mark.parametrize("path", TRICKS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("environ", [{}, {"TOKENGUARD_ADMIN_TOKEN": "s3cret"}])
def test_no_way_to_write_a_path_leads_around_the_rule(path, method, environ):
    """However the path of a budget is written, a stranger who gets to it is refused; else it is no path at all."""
    answer = ask(create_app(read_config(environ), Silent()), path, peer=FAR, method=method)

    assert answer.status_code in (401, 403, 404)
    assert (answer.status_code == 404) == ("Invalid URL" in answer.json["error"]["message"])


def test_budgets_of_the_real_app_open_to_whom_they_should():
    """The app wires the rule as it is configured: by peer without a token, by token with one."""
    by_peer = create_app(read_config({}), Silent())
    by_token = create_app(read_config({"TOKENGUARD_ADMIN_TOKEN": "s3cret"}), Silent())

    assert ask(by_peer).json["data"] == []
    assert ask(by_peer, peer=FAR).status_code == 403
    assert ask(by_token).status_code == 401
    assert ask(by_token, peer=FAR, authorization="Bearer s3cret").json["data"] == []
