"""How the C library keeps the memory that a model on a CPU uses from frame to frame."""

from __future__ import annotations

import ctypes
import functools

# Parameters of mallopt(3) of the GNU C library.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep freed memory, instead of handing large blocks back to the system. Once, for good.

    The activations of a frame take gigabytes in blocks of up to half a gigabyte. By default each is mapped anew, and
    the system clears it page by page, which takes a third of the time of a frame on two cores.

    Returns:
        Whether the C library is one that can be told.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
