"""Where Redis is, as REDIS_URL says it."""

import ssl

import pytest

from tokenguard.backends.redis_url import read_redis_url

# fmt: off
GOOD = {
    # url                                           how it is shown
    "redis://localhost":                            "localhost:6379",
    "redis://10.0.0.1:7000/2":                      "10.0.0.1:7000 database 2",
    "redis://[::1]:7000":                           "[::1]:7000",
    "redis://:secret@redis":                        "redis:6379",
    "redis://guard:secret@redis:1/0":               "redis:1",
    "rediss://redis?ssl_ca_certs=/etc/ca.pem":      "redis:6379",
    "valkey://valkey":                              "valkey:6379",
    "valkeys://valkey":                             "valkey:6379",
    "unix:///run/redis.sock":                       "/run/redis.sock",
    "unix:///run/redis.sock?db=3":                  "/run/redis.sock database 3",
    "unix://:secret@/run/redis.sock":               "/run/redis.sock",
    "redis+sentinel://a,b:1,[::1]/main":            "group main of the Sentinels at a:26379,b:1,[::1]:26379",
    "redis+sentinel://:secret@a/main/4":            "group main of the Sentinels at a:26379 database 4",
    "rediss+sentinel://a/main?sentinel_password=secret": "group main of the Sentinels at a:26379",
    "redis+cluster://guard:secret@a:1,b":           "the cluster at a:1,b:6379",
}
# fmt: on


@pytest.mark.parametrize("url", GOOD)
def test_url_is_read_and_shown_without_credentials(url):
    """What is shown is where it is, and nothing of how to log in."""
    read = read_redis_url(url)

    assert str(read) == GOOD[url]
    assert "secret" not in repr(read)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://redis", "begins with none of these"),
        ("redis://:hun#ter2@redis", "%23"),
        ("redis://:hun?ter2@redis", "%3F"),
        ("redis://:hunter2@redis:port", "a port is no number"),
        ("redis://:hunter2@redis/one", "the database is no number"),
        ("redis://:hunter2@", "the host is missing"),
        ("redis+sentinel://:hunter2@redis", "the name of the group is missing"),
        ("redis+cluster://:hunter2@redis/1", "database 0 only"),
    ],
)
def test_error_says_what_is_wrong_and_shows_nothing_of_it(url, why):
    """A password may be anywhere in a URL that cannot be read."""
    with pytest.raises(ValueError, match="redis://") as caught:
        read_redis_url(url)

    assert why in str(caught.value)
    assert "hun" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "redis://",
        "redis://:6379",
        "redis://host:port",
        "redis://host:0",
        "redis://host:70000",
        "redis://host/one",
        "redis://host/-1",
        "redis://a,b",
        "redis://user@host",
        "redis://user:@host",
        "redis://host?db",
        "redis://host?socket_timeout=9",
        "redis://host?ssl_ca_certs=/ca.pem",
        "rediss://host?ssl_cert_reqs=maybe",
        "redis://host#fragment",
        "redis://hést",
        "redis://ho st",
        "unix://redis.sock",
        "unix://",
        "redis+sentinel://a",
        "redis+sentinel://a/",
        "redis+sentinel://a/main/x",
        "redis+cluster://a/1",
    ],
)
def test_url_that_cannot_be_is_refused(url):
    """The error says what is allowed."""
    with pytest.raises(ValueError, match="redis://"):
        read_redis_url(url)


def test_credentials_are_unquoted():
    """A password may hold what a URL may not."""
    read = read_redis_url("redis://gu%3Aard:p%40ss%2Fw%3Ard@host")

    assert read.connection == {"username": "gu:ard", "password": "p@ss/w:rd"}
    assert read.secrets == ["p@ss/w:rd"]


def test_tls_checks_certificates_unless_told_otherwise():
    """Who answers must be vouched for, by the system's authorities or by those named."""
    checked = read_redis_url("rediss://host?ssl_ca_certs=/ca.pem").connection
    unchecked = read_redis_url("rediss://host?ssl_cert_reqs=none").connection

    assert checked["ssl"] is checked["ssl_check_hostname"] is True
    assert (checked["ssl_cert_reqs"], checked["ssl_ca_certs"]) == (ssl.CERT_REQUIRED, "/ca.pem")
    assert (unchecked["ssl_cert_reqs"], unchecked["ssl_check_hostname"]) == (ssl.CERT_NONE, False)


def test_sentinel_has_credentials_of_its_own():
    """Sentinels do not take the servers' password."""
    read = read_redis_url("redis+sentinel://:one@a/main?sentinel_username=s&sentinel_password=two")

    assert read.connection == {"username": None, "password": "one"}
    assert read.sentinel == {"username": "s", "password": "two"}
    assert read.secrets == ["one", "two"]
