"""How far estimates were off, as it is published."""

import re

import pytest

from tests.house import House
from tokenguard._bucket import BucketTable
from tokenguard.account import Account
from tokenguard.backends.memory import MemoryBackend
from tokenguard.metrics import MAX_MODEL_BYTES, MAX_MODELS, Metrics
from tokenguard.model import Identity

ERROR, DEVIATION = "tokenguard_estimate_error", "tokenguard_estimate_deviation"


class Node:
    """What a process counts, over a table that may be another's too."""

    def __init__(self, table=None):
        self.backend = MemoryBackend(table or BucketTable(16))
        self.metrics = Metrics(self.backend)

    def call(self, estimated, used, model="m", prompt=(100, 100), told=True):
        """Settle a call that was estimated and used so many tokens."""
        account = Account("req-1")
        account.identity, account.model = Identity("alice"), model
        account.estimate, account.charged, account.usage_told = estimated, used, told
        account.prompt_estimate, account.prompt = prompt
        self.metrics.settled(account)

    def text(self, accept=None):
        return self.metrics.exposition(accept)[1].decode()

    def seen(self, name, **labels):
        """Return the one sample of a name with these labels, None if there is none."""
        told = {
            frozenset(re.findall(r'(\w+)="([^"]*)"', found[1])): float(found[2])
            for found in re.finditer(rf"^{name}{{(.*)}} (\S+)$", self.text(), re.MULTILINE)
        }
        return told.get(frozenset(labels.items()))

    def models(self):
        return set(re.findall(rf'^{ERROR}_count{{model="([^"]*)"', self.text(), re.MULTILINE))


def off(node, quantile, of="total", model="m"):
    return node.seen(ERROR, model=model, of=of, quantile=str(quantile))


def test_nothing_is_published_before_a_usage_was_told():
    """A call without a usage tells nothing of estimates."""
    node = Node()
    node.call(300, 300, told=False)

    assert node.models() == set()


@pytest.mark.parametrize(
    ("estimated", "error", "half", "most"),
    [
        # All are in one bin, and the quantile is as far into it as the quantile says.
        (1000, 0.0, 0.025, 0.0475),
        (1030, 0.03, 0.025, 0.0475),
        (970, -0.03, 0.025, 0.0475),
        (1070, 0.07, 0.075, 0.0975),
        (880, -0.12, 0.15, 0.195),
        (1300, 0.3, 0.35, 0.485),
        (100, -0.9, 0.75, 0.975),
        (3000, 2.0, 2.5, 3.85),
        (9000, 8.0, 4.0, 4.0),
    ],
)
def test_error_is_published_within_its_bin(estimated, error, half, most):
    """The quantiles of calls that are all off alike are within the bounds around that."""
    node = Node()
    for _ in range(100):
        node.call(estimated, 1000)

    assert off(node, 0.5) == pytest.approx(half)
    assert off(node, 0.95) == pytest.approx(most)
    assert node.seen(f"{ERROR}_count", model="m", of="total") == 100


def test_errors_of_either_sign_count_alike_and_are_told_apart():
    """Half too low and half too high: one size of error, and the histogram says how many were below."""
    node = Node()
    for _ in range(10):
        node.call(930, 1000)
        node.call(1070, 1000)
    node.call(1300, 1000)

    # 21 calls: 20 off by 0.05 to 0.1, one by 0.2 to 0.5. The median is the 10.5th of the first 20,
    assert off(node, 0.5) == pytest.approx(0.05 + 0.05 * 10.5 / 20)
    # and the 19.95th is the quantile of 95 in 100.
    assert off(node, 0.95) == pytest.approx(0.05 + 0.05 * 19.95 / 20)
    buckets = {
        bound: node.seen(f"{DEVIATION}_bucket", model="m", of="total", le=bound)
        for bound in ("-0.5", "-0.1", "-0.05", "0.0", "0.05", "0.1", "0.2", "0.5", "+Inf")
    }
    assert buckets == {
        "-0.5": 0, "-0.1": 0, "-0.05": 10, "0.0": 10, "0.05": 10, "0.1": 20, "0.2": 20, "0.5": 21, "+Inf": 21,
    }  # fmt: skip


def test_prompt_and_total_are_published_apart():
    """A prompt that was estimated well does not hide a total that was not."""
    node = Node()
    for _ in range(20):
        node.call(1000, 400, prompt=(102, 100))

    assert off(node, 0.95, of="prompt") < 0.05
    assert off(node, 0.5, of="total") > 1


def test_prompt_that_no_usage_was_told_for_has_no_error():
    """A provider that counts nothing for the prompt tells nothing of its estimate."""
    node = Node()
    node.call(300, 200, prompt=(100, 0))

    assert off(node, 0.5, of="prompt") is None
    assert off(node, 0.5, of="total") is not None


def test_exact_bounds_belong_below():
    """An error that is a bound counts as within it."""
    node = Node()
    node.call(1500, 1000)
    node.call(500, 1000)

    assert node.seen(f"{DEVIATION}_bucket", model="m", of="total", le="0.5") == 2
    assert node.seen(f"{DEVIATION}_bucket", model="m", of="total", le="-0.5") == 1


# --- which models -------------------------------------------------------------------------------------------


def test_models_are_told_apart():
    """Each model has its own errors."""
    node = Node()
    node.call(1000, 1000, "gpt-4o")
    node.call(3000, 1000, "qwen/Qwen3 8B")

    assert node.models() == {"gpt-4o", "qwen/Qwen3 8B"}
    assert off(node, 0.5, model="gpt-4o") < 0.05
    assert off(node, 0.5, model="qwen/Qwen3 8B") > 1


def test_models_beyond_so_many_count_together():
    """However many models there are, 32 are told apart, and nothing of the others is lost."""
    node = Node()
    for number in range(3 * MAX_MODELS):
        node.call(1000, 1000, f"model-{number}")
        node.call(1000, 1000, "model-0")

    assert node.models() == {"other", *(f"model-{number}" for number in range(MAX_MODELS))}
    assert node.seen(f"{ERROR}_count", model="other", of="total") == 2 * MAX_MODELS
    assert node.seen(f"{ERROR}_count", model="model-0", of="total") == 3 * MAX_MODELS + 1


@pytest.mark.parametrize("model", ["m" * (MAX_MODEL_BYTES + 1), "é" * (MAX_MODEL_BYTES // 2 + 1), "other"])
def test_model_whose_name_is_too_long_counts_with_the_rest(model):
    """A name that fits no tally is none of a series, and takes no room from others."""
    node = Node()
    node.call(1000, 1000, model)
    node.call(1000, 1000, "é" * (MAX_MODEL_BYTES // 2))

    assert node.models() == {"other", "é" * (MAX_MODEL_BYTES // 2)}


def test_processes_of_a_node_agree_on_the_models():
    """Which models are told apart is the same for all who share the table, and their calls add up."""
    table = BucketTable(16)
    one, two = Node(table), Node(table)
    for number in range(MAX_MODELS):
        (one, two)[number % 2].call(1000, 1000, f"model-{number}")
    for node in (one, two):
        node.call(1000, 1000, "late")
        for number in range(MAX_MODELS):
            node.call(1000, 1000, f"model-{number}")

    assert one.models() == two.models() == {"other", *(f"model-{number}" for number in range(MAX_MODELS))}
    assert one.seen(f"{ERROR}_count", model="model-1", of="total") == 3
    assert two.seen(f"{ERROR}_count", model="other", of="total") == 2


def test_all_models_with_all_errors_fit_the_table():
    """The most series that there can be leave room for all that is counted besides."""
    node = Node()
    for number in range(MAX_MODELS + 1):
        for error in range(-9, 60):
            node.call(1000 + 100 * error, 1000, f"model-{number}", prompt=(1000 + 100 * error, 1000))
            node.call(1000 + 3 * error, 1000, f"model-{number}", prompt=(1000 + 3 * error, 1000))

    assert len(node.backend.table.tallies()) < 900
    assert node.seen(f"{ERROR}_count", model="other", of="prompt") == 138


@pytest.mark.parametrize("model", ['a"b', "a\\b", "a{b}", "é", "a,b=c"])
@pytest.mark.parametrize("accept", [None, "application/openmetrics-text"])
def test_name_of_a_model_cannot_break_the_exposition(model, accept):
    """A name of any characters that a model may have is escaped as the format asks."""
    node = Node()
    node.call(1000, 1000, model)
    escaped = model.replace("\\", "\\\\").replace('"', '\\"')

    assert f'{ERROR}_count{{model="{escaped}",of="total"}} 1.0' in node.text(accept)


def test_errors_are_published_in_both_formats():
    """The summary and the histogram are well-formed where there are errors, and where there are none."""
    node = Node()
    for _ in range(2):
        assert f"# TYPE {ERROR} summary" in node.text()
        assert f"# TYPE {DEVIATION} histogram" in node.text("application/openmetrics-text")
        node.call(900, 1000)
    assert f"{DEVIATION}_sum" not in node.text()


def test_house_settles_into_metrics():
    """A table that others count in too is no hindrance."""
    node = Node(House({}).table)
    node.call(1000, 1000)

    assert node.models() == {"m"}
