"""Work next to other work on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


@functools.cache
def _side_stream(recorded: int, lane: int) -> torch.cuda.Stream:
    """The stream of a lane next to the stream with the handle ``recorded``.

    It is kept, because cuBLAS holds a workspace for each stream that ever ran a matrix product (32 MiB on an H200).
    Other recorded streams have others, because recordings may be replayed at the same time and must not write to one
    workspace (as far as PyTorch gives out different streams: it has 32 for each GPU).
    """
    return torch.cuda.Stream()


class Beside(Generic[Result]):
    """The result of work that runs next to what follows, until it is asked for.

    Only inside a CUDA graph that is being recorded: kernel by kernel, the host is the one that is waited for, and
    memory of one stream must not be used by another without more ado. And only without gradient, because a backward
    pass would run on the streams of the forward pass. Elsewhere the work is done when it is asked for.

    What the work reads must stay until :meth:`get`.

    Args:
        work: Launches kernels on the current stream.
        lane: Works of one lane follow one another; those that shall run next to each other need different ones.
    """

    def __init__(self, work: Callable[[], Result], lane: int = 0) -> None:
        self._work = functools.cache(work)  # once, whenever that is
        self._stream: torch.cuda.Stream | None = None
        if self.possible():
            current = torch.cuda.current_stream()
            self._stream = _side_stream(current.cuda_stream, lane)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._work()

    @staticmethod
    def possible() -> bool:
        """Whether work started now runs next to what follows."""
        return (not torch.is_grad_enabled() and torch.cuda.is_available()
                and torch.cuda.is_current_stream_capturing())

    def get(self) -> Result:
        """The result, for the current stream."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._stream = None
        return self._work()
