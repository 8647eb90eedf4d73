"""How far estimates of a prompt are off, by kind of text: before and after learning, beside bytes / 4.

    .venv/bin/pip install --target build/estimates tiktoken django
    .venv/bin/pip download --no-deps --dest build/estimates litellm
    .venv/bin/python -m benchmarks.estimates

The true count is that of OpenAI's own tokenizer with the vocabulary o200k_base, which the wheel of litellm
carries; the texts are the standard library's, Django's and made up here. Nothing of these is in this repository,
nor installed into the environment.

Each call is a body as a client sends it, read by the reader that the server reads with and estimated by the
estimator that it has. What is compared is what the text of the prompt comes to: framing is left out on both sides.
"""

import argparse
import base64
import gettext
import json
import os
import statistics
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from random import Random

from tokenguard.estimate import Estimator
from tokenguard.providers.openai import read_chat

TOOLS = Path(__file__).parents[1] / "build/estimates"
VOCABULARY = "fb374d419588a4632f3f557e76b4b70aebbca790"
"""By this name tiktoken keeps o200k_base: the SHA-1 of where it would fetch it from."""
MODEL = "gpt-4o"
LEARNING, MEASURED = 50, 150
"""Calls that are learned from, and calls that are measured."""
SHORTEST, LONGEST = 120, 12_000
"""Characters of a prompt; any order of magnitude between is as likely as the next."""


# --- texts --------------------------------------------------------------------------------------------------


def tools():
    """Make what was installed beside the environment importable; return Django's folder and the encoding."""
    sys.path.append(str(TOOLS))
    try:
        import django
        import tiktoken

        wheel = zipfile.ZipFile(next(TOOLS.glob("litellm-*.whl")))
    except (ImportError, StopIteration):
        raise SystemExit(__doc__.partition("\n\n")[2].partition("\n\n")[0]) from None
    cache = TOOLS / "vocabulary"
    cache.mkdir(exist_ok=True)
    name = next(name for name in wheel.namelist() if name.endswith(VOCABULARY))
    (cache / VOCABULARY).write_bytes(wheel.read(name))
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    return Path(django.__file__).parent, tiktoken.get_encoding("o200k_base")


def files(paths):
    """Return the texts of some files, one behind the other."""
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def catalogue(django, language):
    """Return what Django says in a language: sentences and labels."""
    said = []
    for path in sorted(django.rglob(f"locale/{language}/LC_MESSAGES/django.mo")):
        with path.open("rb") as file:
            messages = gettext.GNUTranslations(file)._catalog  # noqa: SLF001 - nothing else lists them
        said += [text for name, text in messages.items() if name and isinstance(text, str)]
    Random(1).shuffle(said)
    return " ".join(said)


def moment(random):
    """Return seconds of some day in 2025."""
    return 1_735_689_600 + random.random() * 31_000_000


def records(random, words):
    """Return what an API answers with, more or less."""

    def record():
        return {
            "id": random.randrange(10**6),
            "name": f"{random.choice(words)} {random.choice(words)}".title(),
            "email": f"{random.choice(words)}@example.com",
            "active": random.random() < 0.5,
            "score": round(random.random() * 100, 2),
            "tags": random.sample(words, 3),
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment(random))),
            "address": {"street": f"{random.randrange(300)} {random.choice(words)} Street", "parent": None},
        }

    return [record() for _ in range(1500)]


def log(random, words):
    """Return lines of an application's log and of a web server's."""
    lines = []
    for _ in range(3000):
        at = time.gmtime(moment(random))
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", at) + f".{random.randrange(1000):03}Z"
        address = ".".join(str(random.randrange(256)) for _ in range(4))
        lines.append(
            random.choice(
                (
                    f"{stamp} INFO [worker-{random.randrange(16)}] {random.choice(words)}: request_id="
                    f"{random.getrandbits(64):016x} status=200 duration_ms={random.random() * 500:.1f}",
                    f'{address} - - [{time.strftime("%d/%b/%Y:%H:%M:%S +0000", at)}] "GET /{random.choice(words)}/'
                    f'{random.randrange(10**5)} HTTP/1.1" 200 {random.randrange(10**5)} "-" "Mozilla/5.0"',
                    f"{stamp} ERROR {random.choice(words)} {random.choice(words)}: connection to {address}:"
                    f"{random.randrange(65536)} refused after {random.randrange(10)} retries",
                )
            )
        )
    return "\n".join(lines)


def csv(random, words):
    """Return rows of figures, with a word and a day in each."""
    return "\n".join(
        f"{random.randrange(10**6)},{random.choice(words)},{random.gauss(0, 100):.4f},{random.random():.6f},"
        f"{time.strftime('%Y-%m-%d', time.gmtime(moment(random)))}"
        for _ in range(4000)
    )


def texts(django):
    """Return the kinds of text by name."""
    import pydoc_data.topics

    random = Random(7)
    library = Path(sysconfig.get_path("stdlib"))
    english = "\n".join(pydoc_data.topics.topics.values())
    words = sorted({word for word in english.split() if word.isascii() and word.isalpha() and word.islower()})
    rows = records(random, words)
    scripts = [path for path in sorted(django.rglob("static/**/*.js")) if "i18n" not in path.parts]
    return {
        "English": english,
        "Python": files(sorted(library.glob("asyncio/*.py"))),
        "JavaScript": files(path for path in scripts if ".min." not in path.name),
        "JSON, indented": json.dumps(rows, indent=2),
        "JSON, compact": json.dumps(rows, separators=(",", ":")),
        "Chinese": catalogue(django, "zh_Hans"),
        "Japanese": catalogue(django, "ja"),
        "Russian": catalogue(django, "ru"),
        "German": catalogue(django, "de"),
        "HTML": files(sorted(django.rglob("templates/**/*.html"))),
        "logs": log(random, words),
        "CSV": csv(random, words),
        "base64": base64.b64encode(random.randbytes(200_000)).decode(),
    }


MIXES = {
    "chat: English 6, Python 2, German, JSON": "English " * 6 + "Python Python German JSON,_compact",
    "agent: Python 3, JSON 3, logs 2, HTML, English": "Python " * 3
    + "JSON,_compact " * 3
    + "logs logs HTML English",
    "all kinds alike": "",
}
"""Kinds of text that one caller sends, and how often each."""


# --- calls --------------------------------------------------------------------------------------------------


def pieces(random, kinds, count):
    """Yield prompts, cut anywhere out of texts of these kinds."""
    for _ in range(count):
        text = random.choice(kinds)
        size = min(int(SHORTEST * (LONGEST / SHORTEST) ** random.random()), len(text) // 2)
        start = random.randrange(len(text) - size)
        yield text[start : start + size]


def asked(text):
    """Return a call for a completion of one message, as it is read."""
    return read_chat(json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]}).encode())


def estimated(estimator, request):
    """Return what the text is expected to come to, without the framing."""
    estimate = estimator.estimate(
        MODEL, None, "caller", request.text_bytes, request.text_256ths, request.extra_tokens, 1, None
    )
    return estimate.prompt - request.extra_tokens


def measure(kinds, encoding, seed):
    """Return the ratios of what was estimated to what it was, in three ways, and how many bytes a token has."""
    random = Random(seed)

    def true(text):
        return len(encoding.encode(text, disallowed_special=()))

    learned = Estimator()
    for text in pieces(random, kinds, LEARNING):
        learned.learn(MODEL, None, "caller", asked(text).text_256ths, true(text), 1, 100)
    ratios, sizes = {"bytes / 4": [], "cold": [], "learned": []}, []
    for text in pieces(random, kinds, MEASURED):
        request, tokens = asked(text), true(text)
        sizes.append(request.text_bytes / tokens)
        ratios["bytes / 4"].append(-(-request.text_bytes // 4) / tokens)
        ratios["cold"].append(estimated(Estimator(), request) / tokens)
        ratios["learned"].append(estimated(learned, request) / tokens)
    return ratios, statistics.mean(sizes)


def mape(ratios):
    """Return the mean absolute error, as a part of what it was."""
    return statistics.mean(abs(ratio - 1) for ratio in ratios)


def cells(ratios):
    """Return a way's error, and between what its ratios are in nine of ten cases."""
    cuts = statistics.quantiles(ratios, n=20)
    return f"{100 * mape(ratios):.0f} % ({cuts[0]:.2f} to {cuts[-1]:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    django, encoding = tools()
    kinds = texts(django)
    of = {name: [text] for name, text in kinds.items()}
    of |= {name: [kinds[kind.replace("_", " ")] for kind in mix.split()] for name, mix in MIXES.items()}
    of["all kinds alike"] = list(kinds.values())
    errors = {}
    print(f"| text | bytes a token | bytes / 4 | cold | after {LEARNING} calls |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, some in of.items():
        ratios, size = measure(some, encoding, seed)
        print(f"| {name} | {size:.2f} | {' | '.join(map(cells, ratios.values()))} |", flush=True)
        if name in kinds:
            for way, found in ratios.items():
                errors.setdefault(way, []).append(mape(found))
    means = (f"{100 * statistics.mean(found):.0f} %" for found in errors.values())
    print(f"| mean of the {len(kinds)} kinds | | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
