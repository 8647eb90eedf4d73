"""The environment is read strictly: what cannot be stops the start, and says what is allowed."""

import ipaddress
import re
from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.house import grant
from tokenguard.backends.redis_url import read_redis_url
from tokenguard.config import SETTINGS, Config, read_config
from tokenguard.errors import InvalidSetting

ROOT = Path(__file__).parents[2]


def refused(**environ):
    """Return the error that reading an environment ends in."""
    with pytest.raises(InvalidSetting) as caught:
        read_config(environ)
    return caught.value


# --- what is read -------------------------------------------------------------------------------------------


def test_empty_environment_gives_the_defaults():
    """Without any setting the limits are those of the specification, and there is no key."""
    config = read_config({})

    assert config == Config(
        openai_base_url="https://api.openai.com/v1",
        defaults={
            "global": grant(10_000, 50),
            "team": grant(5_000, 25),
            "user": grant(1_000, 5),
        },
        admin_allow=(ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
        redis=None,
        realm="default",
        redis_timeout_s=1.0,
        redis_down="closed",
        nodes=None,
        workers=1,
        buckets=500_000,
        max_body_bytes=20 * 2**20,
        connect_timeout_s=5.0,
        read_timeout_s=600.0,
        total_timeout_s=3600.0,
        max_connections=256,
        queue_timeout_s=5.0,
        caller_timeout_s=60.0,
        shutdown_timeout_s=30,
        ask_for_usage=True,
        log_calls=False,
        log_json=False,
        fast_lane=True,
        provider_limits=True,
        sync_interval_s=300.0,
        openai_api_key=None,
        openai_organization=None,
        openai_project=None,
        admin_token=None,
    )


def test_every_setting_is_read():
    """Each name of the specification and of ours changes what it says."""
    config = read_config(
        {
            "OPENAI_API_KEY": "sk-1",
            "OPENAI_BASE_URL": "http://localhost:8080/v1?api-version=2",
            "OPENAI_ORG_ID": "org-1",
            "OPENAI_PROJECT_ID": "proj-1",
            "OPENAI_ADMIN_KEY": "sk-admin-1",
            "TOKENGUARD_PROVIDER_LIMITS": "off",
            "TOKENGUARD_SYNC_INTERVAL_S": "60",
            "CAP_GLOBAL": "1",
            "RATE_GLOBAL": "0",
            "CAP_TEAM": "1000000000",
            "RATE_TEAM": "16.6667",
            "CAP_ROLEGROUP": "7",
            "RATE_ROLEGROUP": "1e-3",
            "CAP_ROLE": "8",
            "RATE_ROLE": "2",
            "CAP_USER": "9",
            "RATE_USER": "0.5",
            "TOKENGUARD_ADMIN_TOKEN": "let me in",
            "TOKENGUARD_ADMIN_ALLOW": "10.0.0.0/8, fd00::/8,192.168.1.1",
            "REDIS_URL": "redis://:hunter2@redis:6379/1",
            "TOKENGUARD_REALM": "North_1.a-b",
            "TOKENGUARD_REDIS_TIMEOUT_S": "0.25",
            "TOKENGUARD_REDIS_DOWN": "share",
            "TOKENGUARD_NODES": "3",
            "TOKENGUARD_WORKERS": "4",
            "TOKENGUARD_BUCKETS": "10000000",
            "TOKENGUARD_TABLE": "/dev/shm/table",
            "TOKENGUARD_MAX_BODY_BYTES": "1",
            "TOKENGUARD_CONNECT_TIMEOUT_S": "0.5",
            "TOKENGUARD_READ_TIMEOUT_S": "86400",
            "TOKENGUARD_TOTAL_TIMEOUT_S": "7200",
            "TOKENGUARD_MAX_CONNECTIONS": "65535",
            "TOKENGUARD_QUEUE_TIMEOUT_S": "0.25",
            "TOKENGUARD_CALLER_TIMEOUT_S": "7",
            "TOKENGUARD_SHUTDOWN_TIMEOUT_S": "0",
            "TOKENGUARD_ASK_FOR_USAGE": "off",
            "TOKENGUARD_LOG_CALLS": "on",
            "TOKENGUARD_LOG_FORMAT": "json",
            "TOKENGUARD_FASTLANE": "off",
        }
    )

    assert config == Config(
        openai_api_key="sk-1",
        openai_base_url="http://localhost:8080/v1?api-version=2",
        openai_organization="org-1",
        openai_project="proj-1",
        defaults={
            "global": grant(1),
            "team": grant(10**9, Fraction(166667, 10000)),
            "rolegroup": grant(7, Fraction(1, 1000)),
            "role": grant(8, 2),
            "user": grant(9, Fraction(1, 2)),
        },
        admin_token="let me in",
        admin_allow=tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8", "192.168.1.1"))),
        redis=read_redis_url("redis://:hunter2@redis:6379/1"),
        realm="North_1.a-b",
        redis_timeout_s=0.25,
        redis_down="share",
        nodes=3,
        workers=4,
        buckets=10_000_000,
        table=Path("/dev/shm/table"),
        max_body_bytes=1,
        connect_timeout_s=0.5,
        read_timeout_s=86_400.0,
        total_timeout_s=7200.0,
        max_connections=65_535,
        queue_timeout_s=0.25,
        caller_timeout_s=7.0,
        shutdown_timeout_s=0,
        ask_for_usage=False,
        log_calls=True,
        log_json=True,
        fast_lane=False,
        provider_limits=False,
        sync_interval_s=60.0,
        openai_admin_key="sk-admin-1",
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", ["", " ", "\t\n"])
def test_empty_value_is_as_good_as_none(name, value):
    """A name that is set to nothing, as .env.example sets it, means its default."""
    assert read_config({name: value}) == read_config({})


def test_space_around_a_value_does_not_matter():
    """A value is read without the white space around it."""
    assert read_config({"CAP_USER": " 7 "}).defaults["user"] == grant(7, 5)


@pytest.mark.parametrize("kind", ["GLOBAL", "TEAM", "USER"])
def test_default_can_be_lifted(kind):
    """CAP_…=unlimited means that ids of that kind have no default, whatever their rate is."""
    config = read_config({f"CAP_{kind}": "unlimited"})

    assert kind.lower() not in config.defaults
    assert len(config.defaults) == 2


def test_levels_without_a_default_are_unlimited():
    """Roles and rolegroups have no default unless they are given one, nor if it is lifted."""
    config = read_config({"CAP_ROLE": "unlimited", "CAP_ROLEGROUP": "unlimited"})

    assert set(config.defaults) == {"global", "team", "user"}


def test_names_of_others_are_left_alone():
    """Settings that do not begin like ours are nobody's typo."""
    assert read_config({"PATH": "/bin", "OPENAI_API_KEYS": "x", "CAP": "x", "tokenguard_x": "y"}) == read_config(
        {}
    )


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("TOKENGUARD_ADMIN_TOKN", "TOKENGUARD_ADMIN_TOKEN"),
        ("TOKENGUARD_ADMINTOKEN", "TOKENGUARD_ADMIN_TOKEN"),
        ("TOKENGUARD_BUCKET", "TOKENGUARD_BUCKETS"),
        ("TOKENGUARD_MAX_BODY", "TOKENGUARD_MAX_BODY_BYTES"),
        ("TOKENGUARD_READ_TIMEOUT", "TOKENGUARD_READ_TIMEOUT_S"),
    ],
)
def test_typo_stops_the_start_with_a_hint(typo, meant):
    """A name that begins like ours and is not one of ours is an error that says which was meant."""
    error = refused(**{typo: "1"})

    assert error.field == typo
    assert f"{typo} is not a setting: did you mean {meant}?" in str(error)


def test_unknown_name_lists_the_known_ones():
    """A name that resembles none of ours is answered with all of ours."""
    message = str(refused(TOKENGUARD_XXXXXXXXXXXXXXXXXXXXXXXXXXXXXX="secret value"))

    assert "TOKENGUARD_XXXXXXXXXXXXXXXXXXXXXXXXXXXXXX is not a setting: known are" in message
    assert all(name in message for name in SETTINGS if name.startswith("TOKENGUARD_"))
    assert "secret value" not in message


@pytest.mark.parametrize("value", ["", "1"])
def test_typo_is_an_error_even_if_it_is_empty(value):
    """A misspelt name does not go unnoticed for want of a value."""
    assert refused(TOKENGUARD_BUKETS=value).field == "TOKENGUARD_BUKETS"


CAPACITY = "a whole number from 1 to 1000000000000, or unlimited"
RATE = "a number from 0 to 10^12"
URL = "a URL with http:// or https:// and a host, without a user or password"
NETWORKS = "networks such as 127.0.0.0/8,::1/128"
SECONDS = "seconds, from 0.001 to 86400"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *[("CAP_USER", value, CAPACITY) for value in ("0", "-1", "1.5", "1e3", "1_000", "1000000000001", "²")],
        ("CAP_GLOBAL", "Endless", CAPACITY),
        ("CAP_ROLE", "many", CAPACITY),
        *[("RATE_USER", value, RATE) for value in ("-1", "nan", "inf", "1e13", "fast", "unlimited", "5/s")],
        ("RATE_GLOBAL", "-0.001", RATE),
        *[("OPENAI_BASE_URL", url, URL) for url in ("api.openai.com", "ftp://a/v1", "https://", "http:///v1")],
        *[("OPENAI_BASE_URL", url, URL) for url in ("http://a/v1#x", "http://[::1", "http://a b/", "/v1")],
        *[("OPENAI_BASE_URL", url, URL) for url in ("http://a:port/v1", "http://a:99999/v1", "http://a:-1/v1")],
        ("OPENAI_ORG_ID", "org\n1", "printable ASCII"),
        ("OPENAI_ORG_ID", "örg", "printable ASCII"),
        ("OPENAI_PROJECT_ID", "\x7f", "printable ASCII"),
        *[("TOKENGUARD_ADMIN_ALLOW", value, NETWORKS) for value in ("10.0.0.1/8", "all", "::/129", "::1,")],
        ("TOKENGUARD_WORKERS", "0", "a whole number from 1 to 128"),
        ("TOKENGUARD_WORKERS", "129", "a whole number from 1 to 128"),
        ("TOKENGUARD_STATE", "folder/", "the path of a file"),
        ("TOKENGUARD_TABLE", "a\nb", "the path of a file"),
        ("TOKENGUARD_BUCKETS", "0", "a whole number from 1 to 10000000"),
        ("TOKENGUARD_BUCKETS", "10000001", "a whole number from 1 to 10000000"),
        ("TOKENGUARD_BUCKETS", "-5", "a whole number from 1 to 10000000"),
        ("TOKENGUARD_MAX_BODY_BYTES", "20MB", "a whole number from 1 to 1073741824"),
        ("TOKENGUARD_MAX_CONNECTIONS", "65536", "a whole number from 1 to 65535"),
        ("TOKENGUARD_SHUTDOWN_TIMEOUT_S", "1.5", "a whole number from 0 to 86400"),
        *[("TOKENGUARD_CONNECT_TIMEOUT_S", value, SECONDS) for value in ("0", "-1", "nan", "inf", "5s", "86401")],
        ("TOKENGUARD_READ_TIMEOUT_S", "0.0001", SECONDS),
        *[("TOKENGUARD_ASK_FOR_USAGE", value, "on or off") for value in ("true", "1", "ON", "yes")],
    ],
)
def test_value_that_cannot_be_stops_the_start(name, value, allowed):
    """The error names the setting, what is allowed, and the value."""
    error = refused(**{name: value})

    assert error.field == name
    assert str(error) == f"{name} must be {allowed}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("TOKENGUARD_BUCKETS", "a whole number from 1 to 10000000"), ("CAP_USER", CAPACITY), ("RATE_USER", RATE)],
)
def test_number_of_thousands_of_digits_is_refused_like_any_other(name, allowed):
    """A number too long to be read is one that is out of bounds."""
    assert str(refused(**{name: "9" * 5000})).startswith(f"{name} must be {allowed}")


@pytest.mark.parametrize("kind", ["ROLE", "ROLEGROUP"])
def test_capacity_without_a_rate_is_refused(kind):
    """A level that has no default rate needs one with its capacity."""
    error = refused(**{f"CAP_{kind}": "100"})

    assert error.field == f"RATE_{kind}"
    assert str(error) == f"RATE_{kind} must be set where CAP_{kind} is, got nothing"


@pytest.mark.parametrize("kind", ["ROLE", "ROLEGROUP"])
def test_rate_without_a_capacity_is_refused(kind):
    """A rate alone limits nothing: whoever sets it has forgotten the capacity."""
    error = refused(**{f"RATE_{kind}": "100"})

    assert f"CAP_{kind}" in str(error)
    assert f"RATE_{kind}" in str(error)


def test_capacity_and_rate_that_no_integers_keep_are_refused():
    """A rate that is lost beside its capacity is an error that names both."""
    error = refused(CAP_USER="1000000000000", RATE_USER="1e-9")

    assert "CAP_USER and RATE_USER do not go together" in str(error)


def test_share_needs_the_number_of_nodes():
    """What each node's share is cannot be guessed."""
    error = refused(REDIS_URL="redis://redis", TOKENGUARD_REDIS_DOWN="share")

    assert error.field == "TOKENGUARD_NODES"
    assert "TOKENGUARD_REDIS_DOWN" in str(error)


@pytest.mark.parametrize("realm", ["a b", "a{b}", "a:b", "é", "a" * 65])
def test_realm_that_would_not_be_one_hash_tag_is_refused(realm):
    """It stands in braces in every key."""
    assert refused(REDIS_URL="redis://redis", TOKENGUARD_REALM=realm).field == "TOKENGUARD_REALM"


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENGUARD_REDIS_DOWN", "closed"), ("TOKENGUARD_NODES", "2"), ("TOKENGUARD_REALM", "a")]
)
def test_setting_of_redis_without_redis_is_refused(name, value):
    """Whoever sets one believes that budgets are shared."""
    error = refused(**{name: value})

    assert error.field == name
    assert "REDIS_URL is not" in str(error)


# --- secrets ------------------------------------------------------------------------------------------------

SECRET = "hunter2"


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "TOKENGUARD_ADMIN_TOKEN", "REDIS_URL"])
@pytest.mark.parametrize("value", [f"{SECRET}é", f"{SECRET}\n{SECRET}", f"{SECRET}\x00"])
def test_secret_that_cannot_be_is_not_shown(name, value):
    """An error about a secret names the setting, and shows no part of the value."""
    error = refused(**{name: value})

    assert error.field == name
    assert SECRET not in str(error)


def test_redis_url_is_not_shown():
    """The URL of Redis may hold a password, also one that cannot be read."""
    assert SECRET not in str(refused(REDIS_URL=f"redis://:{SECRET}@redis:port"))


def test_secrets_are_not_in_the_repr():
    """A configuration can be logged."""
    config = read_config(
        {
            "OPENAI_API_KEY": SECRET,
            "TOKENGUARD_ADMIN_TOKEN": SECRET,
            "REDIS_URL": f"redis+sentinel://:{SECRET}@redis/group?sentinel_password={SECRET}",
        }
    )

    assert config.openai_api_key == config.admin_token == SECRET
    assert config.redis.secrets == [SECRET, SECRET]
    assert SECRET not in repr(config)
    assert SECRET not in str(config)


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://user:{SECRET}@proxy.example/v1",
        f"https://user:{SECRET}@proxy.example:port/v1",
        f"https://user:p@{SECRET}@proxy.example:port/v1",
        f"https://user:p/{SECRET}@proxy.example/v1",
        f"//user:{SECRET}@proxy.example/v1",
    ],
)
def test_password_of_a_bad_url_is_not_shown(url):
    """An error about the provider's URL does not tell a password in it, nor a part of one."""
    assert SECRET not in str(refused(OPENAI_BASE_URL=url))


def test_secret_settings_are_marked():
    """Everything that authenticates somebody is a secret."""
    assert {name for name, setting in SETTINGS.items() if setting.secret} >= {
        name for name in SETTINGS if re.search("KEY|TOKEN$|REDIS_URL", name)
    }


# --- what is written about it -------------------------------------------------------------------------------


def names_in(text):
    """Return the settings that a text names."""
    return set(re.findall(r"\b(?:OPENAI|REDIS|CAP|RATE|TOKENGUARD)_[A-Z_]+\b", text))


def test_every_setting_stands_in_the_docs():
    """The table of settings and the code know the same names."""
    assert names_in((ROOT / "docs/settings.md").read_text()) - {"CAP_", "TOKENGUARD_"} == set(SETTINGS)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.default])
def test_every_default_stands_in_the_docs(name):
    """The table of settings and the code know the same defaults."""
    assert f"| `{name}` | `{SETTINGS[name].default}` |" in (ROOT / "docs/settings.md").read_text()


def test_example_can_be_used_as_it_is():
    """.env.example, copied to .env, is the defaults."""
    assert read_config(dotenv_values(ROOT / ".env.example")) == read_config({})


def test_example_names_only_settings_that_there_are():
    """Every line of .env.example, commented out or not, is a setting; uncommented it is still a valid file."""
    text = (ROOT / ".env.example").read_text()
    uncommented = dotenv_values(stream=StringIO(re.sub(r"(?m)^# (?=[A-Z_]+=)", "", text)))

    assert set(uncommented) <= set(SETTINGS)
    assert read_config(uncommented) == read_config({})


def test_state_and_table_are_two_files():
    """One file for both could be neither."""
    with pytest.raises(InvalidSetting, match="must be two files, got /x for both") as raised:
        read_config({"TOKENGUARD_STATE": "/x", "TOKENGUARD_TABLE": "/x"})
    assert raised.value.field == "TOKENGUARD_STATE"


def test_state_is_redis_own_where_there_is_one():
    """What is in Redis, Redis keeps: a file beside it would be a second truth."""
    with pytest.raises(InvalidSetting, match="what is in Redis, Redis keeps"):
        read_config({"TOKENGUARD_STATE": "/x", "REDIS_URL": "redis://localhost"})
    assert read_config({"TOKENGUARD_STATE": "/x"}).state == Path("/x")
