"""The calls of all loads, byte for byte, and what an answer to one has to be."""

import http.client
import json
import random
from typing import NamedTuple

PATH = "/v1/chat/completions"
DRAINED = "user-drained"
_PROMPT = "Summarise the following note in one sentence, and name whoever has to act on it. " * 5
_FIELDS = (
    "host: gateway.example",
    "user-agent: OpenAI/Python 2.52.0",
    "accept: application/json",
    "authorization: Bearer sk-the-callers-own",
    "content-type: application/json",
    "x-stainless-lang: python",
)


class Identity(NamedTuple):
    """Who calls."""

    user: str
    team: str
    role: str
    rolegroup: str


def identity(number):
    """Return one of the callers: a user of one of 20 teams, 5 roles and 2 rolegroups."""
    return Identity(f"user-{number:07}", f"team-{number % 20:02}", f"role-{number % 5}", f"group-{number % 2}")


def body(model, stream):
    """Return the body of a call, some 590 bytes."""
    messages = [
        {"role": "system", "content": "You are a careful assistant who answers briefly."},
        {"role": "user", "content": _PROMPT},
    ]
    members = {"model": model, "messages": messages, "temperature": 0.2, **({"stream": True} if stream else {})}
    return json.dumps(members, separators=(",", ":")).encode()


def request(who, content):
    """Return a whole request."""
    names = ("x-user-id", "x-team-id", "x-role", "x-llm-rolegroup")
    fields = [*_FIELDS, *(": ".join(field) for field in zip(names, who, strict=True))]
    head = [f"POST {PATH} HTTP/1.1", *fields, f"content-length: {len(content)}", "", ""]
    return "\r\n".join(head).encode() + content


def write_requests(place, users, content):
    """Write a request of each of some users into a file, in a random order; return the size of each."""
    if users:
        requests = [request(identity(number), content) for number in range(users)]
    else:
        requests = [request(identity(0)._replace(user=DRAINED), content)]
    random.Random(1).shuffle(requests)
    place.write_bytes(b"".join(requests))
    return len(requests[0])


def answer(port, who, content):
    """Call once; return the status and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        names = ("x-user-id", "x-team-id", "x-role", "x-llm-rolegroup")
        headers = dict(field.split(": ") for field in _FIELDS[1:]) | dict(zip(names, who, strict=True))
        connection.request("POST", PATH, content, headers)
        told = connection.getresponse()
        return told.status, told.read()
    finally:
        connection.close()
