"""The tests' provider with limits, as a process, and a caller that costs little and does not retry."""

import asyncio
import json
import multiprocessing
from collections import defaultdict
from contextlib import contextmanager

import httptools

from tests.e2e.fake_openai import Serving

ANSWERED_WITHIN_S = 60


class Provider:
    """The provider, as the process that started it has it.

    Attributes:
        url: As ``OPENAI_BASE_URL`` has it.
    """

    def __init__(self, pipe):
        self._pipe = pipe
        self.url = f"http://127.0.0.1:{pipe.recv()}/v1"

    def ask(self, question):
        """Return what a function says of the provider: a function of a module, for it travels by its name."""
        self._pipe.send(question)
        return self._pipe.recv()


def _provide(pipe, made):
    fake = made()
    with Serving(fake) as serving:
        pipe.send(serving.port)
        while (question := pipe.recv()) is not None:

            async def answered(question=question):
                return question(fake)

            pipe.send(asyncio.run_coroutine_threadsafe(answered(), serving.loop).result())


@contextmanager
def provider(made):
    """Run what a function makes, a fake provider, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_provide, args=(theirs, made), daemon=True)
    process.start()
    try:
        yield Provider(ours)
        ours.send(None)
    finally:
        process.join(10)
        process.kill()


class Answer:
    """An answer, as its bytes come in."""

    def __init__(self):
        self.parser = httptools.HttpResponseParser(self)
        self.fields, self.body, self.done = {}, b"", False

    @property
    def status(self):
        return self.parser.get_status_code()

    @property
    def error(self):
        """The error that it tells, and what stands beside it."""
        return json.loads(self.body)

    def on_header(self, name, value):
        self.fields[name.decode().lower()] = value.decode()

    def on_body(self, piece):
        self.body += piece

    def on_message_complete(self):
        self.done = True


class Callers:
    """Call over connections that are kept, one for each call that is under way."""

    def __init__(self):
        self._idle = defaultdict(list)

    async def call(self, port, user, body, request_id="", **fields):
        """Return the answer; None if the connection breaks off or nothing comes."""
        named = {"x-user-id": user, "x-request-id": request_id, **fields}
        content = json.dumps(body).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "host: gateway.example", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in named.items() if value]
        request = "\r\n".join([*lines, "", ""]).encode() + content
        try:
            async with asyncio.timeout(ANSWERED_WITHIN_S):
                return await self._exchange(port, request)
        except (OSError, TimeoutError):
            return None

    async def _exchange(self, port, request):
        idle = self._idle[port]
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        answer = Answer()
        try:
            writer.write(request)
            while not answer.done:
                piece = await reader.read(65536)
                if not piece:
                    raise ConnectionAbortedError
                answer.parser.feed_data(piece)
        except BaseException:
            writer.close()
            raise
        idle.append((reader, writer))
        return answer

    def close(self):
        for connections in self._idle.values():
            for _, writer in connections:
                writer.close()


def why(answer):
    """Say whose the limit is that a 429 speaks of."""
    told = answer.error
    if "x-upstream-request-id" in answer.fields:
        return "passed on from the provider"
    short = [bucket for bucket in told.get("tokenguard", {}).get("buckets", ()) if not bucket["allowed"]]
    if short:
        names = (f"{one['scope']}:{one['id']} {one['meter']} {one['model'] or ''}".strip() for one in short)
        return "budget " + " and ".join(sorted(names))
    return f"gate: {told['error']['message'].partition('.')[0][:60]}"
