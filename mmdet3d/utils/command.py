"""What the command line tools share."""

from __future__ import annotations


def error_line(error: BaseException) -> str:
    """One line for the user about an error that ends a tool; the kind of error is named unless it explains itself."""
    text = " ".join(str(error).split()) or "no message"
    explains = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("mmdet3d")
    return f"error: {text if explains else f'{type(error).__name__}: {text}'} (--debug shows where)"
