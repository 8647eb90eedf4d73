"""TokenGuard keeps every team, role and user of a shared LLM account within its token budget."""

from tokenguard._version import __version__

__all__ = ["__version__"]
