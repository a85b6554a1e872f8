"""Work next to other work on a GPU."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

#: Streams that no work uses, by the stream that is being recorded. They are kept, because cuBLAS holds a workspace for
#: each stream that ever ran a matrix product (32 MiB on an H200); and not shared between recorded streams, because
#: recordings may be replayed at the same time and must not write to one workspace.
_IDLE: defaultdict[int, list[torch.cuda.Stream]] = defaultdict(list)


class Beside(Generic[Result]):
    """The result of work that runs next to what follows, until it is asked for.

    Only inside a CUDA graph that is being recorded: kernel by kernel, the host is the one that is waited for, and
    memory of one stream must not be used by another without more ado. And only without gradient, because a backward
    pass would run on the streams of the forward pass. Elsewhere the work is done when it is asked for.

    What the work reads must stay until :meth:`get`.

    Args:
        work: Launches kernels on the current stream.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = functools.cache(work)  # once, whenever that is
        self._stream: torch.cuda.Stream | None = None
        if self.possible():
            current = torch.cuda.current_stream()
            self._home = _IDLE[current.cuda_stream]
            self._stream = self._home.pop() if self._home else torch.cuda.Stream()
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
            self._home.append(self._stream)
            self._stream = None
        return self._work()
