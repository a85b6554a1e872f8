"""What the command line tools share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def explains_itself(error: BaseException) -> bool:
    """True for errors that are raised to be read by the user, not for those that nobody expects."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("mmdet3d")


def error_line(error: BaseException) -> str:
    """One line for the user about an error that ends a tool; the kind of error is named unless it explains itself."""
    text = " ".join(str(error).split()) or "no message"
    named = text if explains_itself(error) else f"{type(error).__name__}: {text}"
    return f"error: {named} (--debug shows where)"


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


def add_predictor_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add the options of :class:`~mmdet3d.core.predictor.Predictor` that every predicting tool has.

    Returns:
        The group of ``--scene-start``, for other spellings of the same choice.
    """
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact",
                        help="fast: convolutions and linear layers in float16; docs/benchmarks.md says what that "
                             "changes (%(default)s)")
    parser.add_argument("--fuse-conv-bn", action=argparse.BooleanOptionalAction, default=True,
                        help="fold batch normalisation into convolutions: faster, equal up to rounding")
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument("--scene-start", choices=("none", "primed", "carried"), default="none",
                        help="memory at the first frame of a scene: none; that frame's own, from a run of it without "
                             "memory; or that of the scene before, as the reference has it (%(default)s)")
    return starts
