"""Calls of PyTorch that are not public, all those that capturing needs; written for PyTorch 2.11."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def restored_on_failure() -> Iterator[None]:
    """Restore the current stream and the generator of the current GPU if a capture in the block fails.

    A failed capture leaves its stream as the current one, and the generator as one that is captured.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):
            yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


@contextmanager
def allocating_in(pool: Any, device: int) -> Iterator[None]:
    """Take new memory of the current stream from a pool of captured graphs, which lies idle between replays.

    The stream decides, because gradients are computed by threads of PyTorch's own.
    """
    torch._C._cuda_beginAllocateCurrentStreamToPool(device, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def abort_capture(pool: Any) -> None:
    """Tell the allocator of the current GPU that a capture into ``pool`` is over, also if it broke off."""
    with suppress(RuntimeError, AttributeError):  # a capture that ended has told it
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
