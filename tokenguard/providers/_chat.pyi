"""What every call's bytes are read by: the request, the answer, the stream.

What is plain is read in one pass over the bytes; all else is left to ``careful``, and what is read is the same.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from typing import Final, final

from typing_extensions import disjoint_base

from tokenguard.jsontext import JsonObject
from tokenguard.model import Usage

MAX_ANSWER_BYTES: Final[int]
"""An answer longer than this is passed on, but not read for its usage: 16 MiB."""
MAX_EVENT_BYTES: Final[int]
"""An event longer than this is passed on before it is complete: 1 MiB."""

@final
class ChatRequest:
    """What matters of a request for a chat completion. Immutable."""

    def __init__(
        self,
        model: str,
        stream: bool,
        choices: int,
        output_cap: int | None,
        text_bytes: int,
        text_256ths: int,
        extra_tokens: int,
        attachments: bool,
        asks_for_usage: bool,
        body: JsonObject,
    ) -> None: ...
    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def stream(self) -> bool:
        """Whether the answer is to come as events."""

    @property
    def choices(self) -> int:
        """How many answers are asked for, 1 to 128."""

    @property
    def output_cap(self) -> int | None:
        """The largest cap that the caller set on each answer, in tokens; None without one."""

    @property
    def text_bytes(self) -> int:
        """The size of all text of the prompt, as UTF-8."""

    @property
    def text_256ths(self) -> int:
        """What that text is expected to come to by the classes of its bytes, in 256ths of a token."""

    @property
    def extra_tokens(self) -> int:
        """Tokens of the prompt that do not come from its text: framing, images, sound, files."""

    @property
    def attachments(self) -> bool:
        """Whether some of them come from attachments, whose size is only guessed."""

    @property
    def asks_for_usage(self) -> bool:
        """Whether the caller wants the usage at the end of the stream."""

    @property
    def body(self) -> JsonObject:
        """The whole body, read when it is first asked for."""

    def body_with_usage(self) -> bytes:
        """Return the body with ``stream_options.include_usage`` set, and nothing else changed."""

def scan_chat(raw: bytes) -> ChatRequest | None:
    """Return what a plain body asks for; None if ``careful.read_chat`` must say what it is, or is not.

    Plain is strict JSON in UTF-8 whose members are what ``read_chat`` in ``openai`` asks, and that has none of

    - attachments;
    - a model whose name is not visible ASCII;
    - an outer member whose name has an upper-case letter or is not ASCII, or any whose name has an escape;
    - a number such as 5.0 where a whole one belongs, or any but a whole one in what counts as JSON (tools);
    - half a surrogate pair;
    - over 64 levels, 64 members in one object, or 300 digits in one number.
    """

@disjoint_base
class Reader:
    """Reads an answer's usage as it passes: what the two below have in common."""

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece; return what to pass on."""

    def rest(self) -> bytes:
        """Return what is still to be passed on at the end."""

    def final_usage(self, ended: bool) -> Usage | None:
        """Return what the whole call took, if that has been told."""

@final
class JsonAnswer(Reader):
    """Reads the usage of an answer that comes as one JSON document, and passes every byte on."""

    def __init__(self) -> None: ...
    @property
    def streamed_tokens(self) -> int:
        """Always 0: nothing is visible before the whole document has come."""

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece; return what to pass on."""

    def rest(self) -> bytes:
        """Return what is still to be passed on at the end: nothing."""

    @property
    def usage(self) -> Usage | None:
        """The usage, once the whole document has come."""

    def final_usage(self, ended: bool) -> Usage | None:
        """Return what the whole call took, if that has been told."""

@final
class EventStream(Reader):
    """Reads the usage of an answer that comes as server-sent events. For one thread at a time.

    Args:
        swallow_usage: Keep back the one event that came only because we asked for the usage: the one without
            choices that tells it.
    """

    def __new__(cls, *, swallow_usage: bool) -> EventStream: ...
    @property
    def usage(self) -> Usage | None:
        """The last usage told, if any."""

    @property
    def streamed_tokens(self) -> int:
        """About how many tokens of visible output have come: at least one a delta, at four bytes each."""

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece; return what to pass on: every event that is complete, as it came."""

    def rest(self) -> bytes:
        """Return what is still to be passed on at the end: an event without the blank line that ends it."""

    def final_usage(self, ended: bool) -> Usage | None:
        """Return what the whole call took, if that has been told; a usage that output followed was of a part.

        Args:
            ended: Whether the stream has come to its end.
        """

__pyx_capi__: dict[str, object]
"""How other compiled modules find what is here."""
