"""What became of one call, as the metrics and the log tell it."""

from __future__ import annotations

from enum import StrEnum

from tokenguard.model import BucketName, Identity


class Outcome(StrEnum):
    """What became of a reservation."""

    SETTLED = "settled"
    REFUNDED = "refunded"
    KEPT = "kept"


class Account:
    """One call, filled in as it goes.

    Attributes:
        request_id: What the call is known by here, at the caller's and at the provider's.
        identity: Who called; None until it has been read.
        model: Which model.
        stream: Whether a stream was asked for.
        estimate: Tokens that the call was expected to take, and that were reserved if it was admitted.
        prompt_estimate: How many of them for the prompt.
        admitted: Whether every bucket on its path passed.
        refused_by: The binding bucket of a refusal.
        outcome: What became of the reservation; None as long as it is open, or if there was none.
        charged: Tokens that the call was charged in the end.
        usage_told: Whether they are what the provider told.
        prompt: How many of them the prompt took, if it told.
        forgiven: Tokens that fell below the floor of a bucket's debt, summed over the buckets.
        status: What the caller was answered; 499 if it hung up first, 0 as long as it is open.
        upstream_status: What the provider answered; None if it did not.
        upstream_s: Seconds until the head of that answer.
        failure: What broke off, if anything.
        seconds: How long the call took in all.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.identity: Identity | None = None
        self.model: str | None = None
        self.stream = False
        self.estimate = 0
        self.prompt_estimate = 0
        self.admitted = False
        self.refused_by: BucketName | None = None
        self.outcome: Outcome | None = None
        self.charged = 0
        self.usage_told = False
        self.prompt = 0
        self.forgiven = 0
        self.status = 0
        self.upstream_status: int | None = None
        self.upstream_s: float | None = None
        self.failure: str | None = None
        self.seconds = 0.0

    @property
    def open(self) -> bool:
        """Whether there is a reservation that is neither settled, refunded nor kept."""
        return self.admitted and self.outcome is None
