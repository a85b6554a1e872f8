"""Words for users."""

from collections.abc import Sequence


def listing(entries: Sequence[str], shown: int = 5) -> str:
    """``entries`` separated by commas: the first ``shown``, and how many more there are."""
    more = len(entries) - shown
    return ", ".join(entries[:shown]) + (f" and {more} more" if more > 0 else "")
