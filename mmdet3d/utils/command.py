"""What the command line tools share."""

from __future__ import annotations

import sys
from collections.abc import Callable


def error_line(error: BaseException) -> str:
    """One line for the user about an error that ends a tool; the kind of error is named unless it explains itself."""
    text = " ".join(str(error).split()) or "no message"
    explains = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("mmdet3d")
    return f"error: {text if explains else f'{type(error).__name__}: {text}'} (--debug shows where)"


def run_tool(action: Callable[[], int | None], *, debug: bool = False, failure: int = 2, who: str = "",
             interrupted: str = "interrupted") -> int:
    """Run a tool and tell what goes wrong in one line.

    Args:
        action: The tool; returns its exit status, None for 0.
        debug: Let errors through, with their traceback.
        failure: Exit status after an error.
        who: What the line about an error begins with.
        interrupted: What is said after Ctrl-C.

    Returns:
        The exit status: that of ``action``, ``failure``, or 130 after Ctrl-C.
    """
    try:
        return action() or 0
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return 130
    except Exception as error:  # whatever went wrong, the user sees one line unless asked for more
        if debug:
            raise
        sys.stderr.write(f"{who}{error_line(error)}\n")
        return failure
