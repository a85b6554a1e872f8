"""Recordings of CUDA graphs: on which GPU, and what one that fails would leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch


def on_device(device: torch.device) -> AbstractContextManager:
    """``device`` as the current GPU, on which streams, events and recordings are made; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def state_kept() -> Iterator[None]:
    """A recording that fails leaves its stream as the current one, and torch's generator as one that records.

    This puts the former ones back, for the current GPU.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):
            yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


def end_recording(pool: Any) -> None:
    """Tell the allocator of the current GPU that a recording into ``pool`` is over, which one broken off has not.

    Without a pool, no recording has begun.
    """
    if pool is None:
        return
    with suppress(RuntimeError, AttributeError):  # one that ended has
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def reason(error: BaseException) -> str:
    """Why a recording failed: the error that ended it, which the end of the recording may have replaced by another."""
    return str(error) if error.__context__ is None else f"{error.__context__} (then {error})"
