"""How a call is refused, by the proxy, the middlewares and the library alike.

Source: https://platform.openai.com/docs/guides/rate-limits and the retry rules of the official clients.
"""

from tokenguard.limiter import Refusal
from tokenguard.model import Answer, Decision

MAX_NAMES: int
"""Of how many buckets it is remembered what refusals tell of their names; the least used is forgotten first."""

def refuse(refused: Refusal | Decision, jitter: float) -> Answer:
    """Return the 429 for a refused call.

    Args:
        refused: The refusal.
        jitter: 0 to 1; how much of a tenth a wait over 1 s is prolonged by, so that a crowd that is refused
            together does not come back together. Who would wait for over a minute is told not to retry.

    Raises:
        ValueError: The decision is no refusal.
    """

def explain(decision: Decision) -> str:
    """Return a refusal in words: whose limit it was, how things are with it, and what may help.

    Raises:
        ValueError: The decision is no refusal.
    """
