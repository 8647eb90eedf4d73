"""What is to be compiled is what runs."""

import importlib

import pytest

from tests.compiled import SUFFIX, compiled, module_of

SOURCES = sorted(compiled())


@pytest.mark.parametrize("source", SOURCES)
def test_module_is_loaded_from_its_extension(source):
    """No module that setup.py compiles runs as plain Python."""
    module = importlib.import_module(module_of(source))

    assert module.__file__.endswith(SUFFIX), f"{module.__file__} is not compiled: run `make runtime`"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("tokenguard.account", ["Account"]),
        ("tokenguard.api.call", ["Call", "CallSoon", "Guard"]),
        ("tokenguard.estimate", ["Estimator", "Traffic"]),
        ("tokenguard.exchange", ["End", "Exchange", "Settlement", "Terms"]),
        ("tokenguard.limiter", ["Limiter", "Refusal", "Reservation"]),
        ("tokenguard.metrics", ["Metrics"]),
        ("tokenguard.model", ["Answer", "Head", "UpstreamRequest"]),
        ("tokenguard.plan", ["Plan"]),
    ],
)
def test_hot_classes_are_structures_of_c(module, names):
    """A class that every call goes through keeps what it holds in fields of C, and not in a dictionary."""
    for name in names:
        assert not getattr(importlib.import_module(module), name).__dictoffset__, name
