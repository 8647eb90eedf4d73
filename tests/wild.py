"""Requests, answers and streams that are nearly as they should be, and JSON written as wildly as JSON allows.

All of it comes of a ``Random``, so that a seed tells everything.
"""

from __future__ import annotations

import json

NAN = float("nan")
TEXTS = ("", "a", "word " * 9, 'say "hi"\n\tback\\slash /', "Grüße", "日本語", "😀", "\x7f", "\u2028", "\x0b\x01")
ODD_TEXTS = ("\ud83d", "\udc00x", "image_url", "input_audio", "file", "[DONE]")
NUMBERS = (0, 1, 2, 7, 128, 129, 10**9, 10**9 + 1, 10**12, 10**12 + 1, 10**13, 2**63, 2**64, 10**40, -1, -0.0)
ODD_NUMBERS = (1.0, 5.0, 0.5, 1e22, 1e-7, 1e300, NAN, float("inf"), 10**299, 10**300, 10**4400)
NAMES = (
    "role",
    "type",
    "content",
    "text",
    "name",
    "usage",
    "model",
    "delta",
    "a",
    "é",
    "",
    "k" * 17,
    "tool_calls",
)


class Pairs(list):
    """An object that may have a member twice."""


class Writer:
    """Writes JSON as wildly as JSON allows: any white space, any escape; notes where the outer members stand."""

    def __init__(self, random, spaces=" \t\r\n", wildness=0.3):
        self.random = random
        self.spaces = spaces
        self.wildness = wildness
        self.spans = {}

    def space(self):
        if not self.spaces or self.random.random() < 0.5:
            return ""
        return "".join(self.random.choices(self.spaces, k=self.random.choice([1, 3])))

    def string(self, text):
        if not self.wildness and text.isprintable():
            return json.dumps(text, ensure_ascii=False)
        return '"' + "".join(self.character(character) for character in text) + '"'

    def character(self, character):
        if self.random.random() < self.wildness or "\ud800" <= character <= "\udfff":
            units = character.encode("utf-16-be", "surrogatepass")
            digits = self.random.choice(["04x", "04X"])
            return "".join(f"\\u{int.from_bytes(units[i : i + 2]):{digits}}" for i in range(0, len(units), 2))
        if character == "/" and self.random.random() < 0.5:
            return "\\/"
        return json.dumps(character, ensure_ascii=False)[1:-1]

    def value(self, value):
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, dict):
            value = Pairs(value.items())
        if isinstance(value, Pairs):
            members = (f"{self.spaced(self.string(n))}:{self.spaced(self.value(v))}" for n, v in value)
            return "{" + ",".join(members) + (self.space() + "}")
        if isinstance(value, list):
            return "[" + ",".join(self.spaced(self.value(item)) for item in value) + (self.space() + "]")
        return "1" + "0" * 4400 if value == 10**4400 else json.dumps(value)

    def spaced(self, text):
        return self.space() + text + self.space()

    def document(self, members):
        text = self.space() + "{" + self.space()
        for number, (name, value) in enumerate(members.items()):
            text += (",", "")[number == 0] + self.spaced(self.string(name)) + ":" + self.space()
            start = len(text)
            text += self.value(value)
            self.spans[name] = (start, len(text))
            text += self.space()
        return text + "}" + self.space()


class Wild:
    """Makes what comes over the wire.

    Args:
        random: What all of it comes of.
        oddity: How often, from 0 to 1, something is in a place where it does not belong.
    """

    def __init__(self, random, oddity):
        self.random = random
        self.oddity = oddity

    def odd(self):
        return self.random.random() < self.oddity

    def one(self, *what):
        return self.random.choice(what)

    def text(self):
        return self.one(*TEXTS, *ODD_TEXTS) if self.odd() else self.one(*TEXTS)

    def number(self):
        return self.one(*NUMBERS, *ODD_NUMBERS) if self.odd() else self.one(*NUMBERS)

    def value(self, depth=3):
        match self.random.randrange(8 if depth else 6):
            case 0 | 1 | 2:
                return self.text()
            case 3:
                return self.number()
            case 4 | 5:
                return self.one(None, True, False, [], {})
            case 6:
                return [self.value(depth - 1) for _ in range(self.random.randrange(3))]
        return self.object([(self.one(*NAMES), self.value(depth - 1)) for _ in range(self.random.randrange(4))])

    def object(self, members):
        """Return an object of these members; now and then some are missing, doubled, or something else."""
        members = [(name, self.value() if self.odd() else value) for name, value in members if not self.odd()]
        if self.random.random() < 0.3:
            self.random.shuffle(members)
        if self.odd():
            members.append((self.one(*NAMES), self.value()))
        if self.odd():
            members = [(self.one(name, name.upper(), name.title()), value) for name, value in members]
        return Pairs(members) if self.odd() else Pairs(dict(members).items())

    def some(self, **optional):
        return [(name, value) for name, value in optional.items() if self.random.random() < 0.4]

    def part(self):
        kind = (
            self.one("image_url", "input_audio", "file", "x")
            if self.odd()
            else self.one("text", "text", "function")
        )
        return self.object([("type", kind), *self.some(detail="low"), (kind, self.one(self.text(), self.value()))])

    def message(self):
        content = self.one(self.text(), self.text(), self.text(), None, [self.part()], [self.part(), self.part()])
        return self.object([("role", self.one("user", "system")), ("content", content), *self.some(name="bob")])

    def tools(self):
        shape = self.object([("type", "object"), ("properties", self.value()), ("required", ["a"])])
        return self.one([], None, self.value(), [self.object([("type", "function"), ("function", shape)])])

    def chat(self):
        options = self.object([*self.some(include_usage=self.one(True, False, None)), *self.some(x=self.value())])
        return self.object(
            [
                ("model", self.one("gpt-4o", "m", "o1-mini-2024", "a" * self.one(256, 257), "é", "a b", " a", "")
                 if self.odd() else "gpt-4o"),
                ("messages", [self.message() for _ in range(self.random.randrange(4))]),
                *self.some(
                    stream=self.one(True, False, None),
                    stream_options=self.one(options, None),
                    n=self.one(1, 2, 128, None),
                    max_tokens=self.one(1, 256, 10**9, None),
                    max_completion_tokens=self.one(1, 9999, None),
                    temperature=self.one(0, 0.7, 1),
                    metadata=self.value(),
                    tools=self.tools(),
                    functions=self.tools(),
                    response_format=self.tools(),
                ),
            ]
        )  # fmt: skip

    def usage(self):
        if self.random.random() < 0.3:
            return None
        counts = {name: self.one(0, 9, 12, 10**12) for name in ("prompt_tokens", "completion_tokens")}
        if self.odd():
            counts = dict.fromkeys(counts, self.number())
        more = self.some(total_tokens=self.one(21, 0, None), details={"total_tokens": 5, "x": []})
        return self.object([*counts.items(), *more])

    def answer(self):
        choice = self.object([("message", self.message()), ("finish_reason", "stop"), ("index", 0)])
        return self.object([("id", "c1"), ("choices", [choice]), *self.some(usage=self.usage(), model="m")])

    def chunk(self):
        delta = self.object([*self.some(role="assistant", content=self.text(), tool_calls=[self.part()])])
        choice = self.object([("index", 0), ("delta", delta), *self.some(finish_reason=self.one(None, "stop"))])
        choices = self.one([], [choice], [choice], [choice], [choice, choice])
        return self.object([("choices", choices), *self.some(id="c1", usage=self.usage())])

    def written(self, value):
        """Return a value as JSON, compact or wild."""
        writer = self.one(Writer(self.random, "", 0), Writer(self.random), Writer(self.random, " ", 0.02))
        text = writer.value(value)
        return (writer.space() + text + writer.space()).encode("utf-8", "surrogatepass")

    def damaged(self, data):
        """Return data of which a few bytes were lost, changed, doubled or put in."""
        data = bytearray(data)
        for _ in range(self.random.choice([0, 0, 1, 1, 3]) if self.odd() else 0):
            at = self.random.randrange(len(data) + 1)
            match self.random.randrange(5):
                case 0:
                    del data[at:]
                case 1 if at < len(data):
                    data[at] = self.random.randrange(256)
                case 2:
                    data[at:at] = data[max(0, at - self.random.randrange(20)) : at]
                case 3:
                    del data[at : at + self.random.randrange(4)]
                case _:
                    data[at:at] = self.one(*BYTES)
        return bytes(data)

    def event(self):
        """Return an event, or what looks like one."""
        end = self.one(b"\n", b"\n", b"\r\n", b"\r")
        match self.random.randrange(12) if self.odd() else 9:
            case 0:
                lines = [b": keep-alive"]
            case 1:
                lines = [b"event: x", b"data: " + self.written(self.chunk()), b"id: 7"]
            case 2:
                lines = [b"data:" + line for line in self.written(self.chunk()).replace(b",", b",\n").split(b"\n")]
            case 3:
                lines = [self.one(b"data: [DONE]", b"data:[DONE]  ", b"data", b"data:", b"", b"data: [DONE]x")]
            case _:
                writer = Writer(self.random, self.one("", "", " ", " \t"), self.one(0, 0, 0.1))
                text = writer.value(self.chunk()).encode("utf-8", "surrogatepass")
                lines = [b"data:" + self.one(b" ", b" ", b"", b"\t ", b"\x0b") + text + self.one(b"", b"", b" ")]
        return self.damaged(end.join(lines)) + end + (self.one(b"\n", b"\r", b"\r\n", b"") if self.odd() else end)

    def stream(self):
        return b"".join(self.event() for _ in range(self.random.randrange(8))) + self.one(b"", b"data: [DONE]\n\n")

    def pieces(self, data):
        """Return data cut in any pieces, some of them empty."""
        most = self.one(0, 1, 3, 10, 2 * len(data))
        cuts = sorted(self.random.randrange(len(data) + 1) for _ in range(self.random.randrange(most + 1)))
        return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


BYTES = (
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\x0b"),
    *(b"0", b"-", b".", b"e", b"E5", b"+", b"00", b"-0", b"NaN", b"Infinity", b"true", b"nul", b"null"),
    *(b"\\u", b"\\/", b"\\ud83d", b"\\ude00", b"\\u0000", b"\\u0022", b"\\u00E9", b"\\uFFFF", b"\\u12", b"\\x"),
    *(b"//", b"/**/", b"'", b"\x1f", b"\xff", b"\x80", b"\xc0\x80", b"\xc3", b"\xc3\xa9", b"\xe0\x80\x80"),
    *(
        b"\xe2\x82",
        b"\xed\xa0\x80",
        b"\xed\x9f\xbf",
        b"\xee\x80\x80",
        b"\xef\xbb\xbf",
        b"\xc2\xa0",
        b"\xe2\x80\xa8",
    ),
    *(b"\xf0\x8f\xbf\xbf", b"\xf0\x90\x80\x80", b"\xf4\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"),
    *(b"\xf0\x9f\x98", b"data: ", b"[" * 70, b'{"a":' * 65, b'"a":1,', b'"usage":null,', b'"type":"file",'),
    b"9" * 301,
)
"""What is put into bytes to damage them."""
