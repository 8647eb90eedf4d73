"""Whatever a body is: it is a call that travels unchanged, or a clear refusal that charges nobody."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from tests.house import House, grant
from tests.strategies import properties
from tokenguard.estimate import Estimator
from tokenguard.exchange import Ask, Exchange, Terms
from tokenguard.model import Answer

CALLER = [(b"x-user-id", b"alice")]
FULL = 10**12

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=40) | values}),
    max_size=3,
)
NAMES = (
    "model",
    "messages",
    "stream",
    "stream_options",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "tools",
    "MODEL",
)
odd = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=5)
likely = st.fixed_dictionaries(
    {"model": st.text(min_size=1, max_size=10), "messages": messages},
    optional={
        "stream": st.booleans() | st.none(),
        "stream_options": st.none() | st.dictionaries(st.text(max_size=5), values, max_size=2),
        "n": st.integers(0, 130) | st.none(),
        "max_tokens": st.integers(-1, 2 * 10**9) | st.none(),
        "max_completion_tokens": st.integers(-1, 2 * 10**9) | st.none(),
        "temperature": values,
    },
)


def written(value):
    return json.dumps(value).encode()


def begun(body, headers=CALLER):
    """Begin a call with a body; assert that it is an Ask, or a refusal in the usual shape."""
    exchange = Exchange(Terms([], Estimator()), "req-1")
    asked = exchange.begin(headers, body)
    if isinstance(asked, Answer):
        assert 400 <= asked.status < 500
        assert set(json.loads(asked.body)["error"]) == {"message", "type", "param", "code"}
        assert not exchange.account.admitted
        return None
    assert isinstance(asked, Ask)
    assert 0 < asked.prompt < asked.total
    return exchange, asked


@given(likely | odd | st.builds(lambda a, b: {**a, **b}, likely, odd))
@properties
def test_any_object_is_a_call_or_a_refusal(members):
    """A body that is a call reaches the provider as it came, but for the usage that we ask for."""
    body = written(members)
    if (call := begun(body)) is None:
        return
    exchange, asked = call
    house = House({"user": grant(FULL)})
    request = exchange.reserved(house.limiter.reserve(*asked))
    sent = json.loads(request.body)
    if members.get("stream") and not (members.get("stream_options") or {}).get("include_usage"):
        assert sent.pop("stream_options") == {**(members.get("stream_options") or {}), "include_usage": True}
        assert written(sent) == written(
            {name: value for name, value in members.items() if name != "stream_options"}
        )
    else:
        assert request.body == body
    house.carry_out(exchange.abort().settlement)
    assert exchange.account.charged == asked.total


@given(likely, st.data())
@properties
def test_any_damage_is_a_call_or_a_refusal(members, data):
    """A body of which bytes were lost, changed or doubled never does worse than to be refused."""
    body = bytearray(written(members))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        match data.draw(st.sampled_from(["cut", "change", "double", "insert"])):
            case "cut":
                del body[at:]
            case "change" if at < len(body):
                body[at] = data.draw(st.integers(0, 255))
            case "double":
                body[at:at] = body[: data.draw(st.integers(0, len(body)))]
            case _:
                body[at:at] = data.draw(st.binary(max_size=6))
    begun(bytes(body))


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")))
@example(b'{"model":"\\ud800","messages":[]}')
@properties
def test_any_bytes_are_a_call_or_a_refusal(body):
    """Bytes that mean nothing at all are refused."""
    begun(body)


names = st.sampled_from(
    [b"x-user-id", b"x-team-id", b"x-role", b"x-llm-rolegroup", b"content-encoding", b"x-other"]
)


@given(st.lists(st.tuples(names, st.binary(max_size=12) | st.sampled_from([b"alice", b" bob ", b"a" * 257]))))
@properties
def test_any_header_fields_are_a_call_or_a_refusal(fields):
    """Whatever the identity is said to be, it is somebody or it is refused; who is named once is who pays."""
    call = begun(b'{"model":"m","messages":[]}', fields)
    if call is not None:
        given_names = [name for name, _ in fields if name.startswith(b"x-") and name != b"x-other"]
        assert len(given_names) == len(set(given_names))
        assert call[1].identity.user == dict(fields)[b"x-user-id"].strip(b" \t").decode()
