"""The state machine of captured work: warm-up, capture, replay, and giving up.

A GPU waits for Python where work is many short kernels. A CUDA graph launches them all at once: the same kernels on
the same numbers, so results are equal bit for bit. What a graph reads and writes must stay where it is, hence the
buffers here; how the work is captured is its owner's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mmdet3d.core.cuda_graphs.torch_private import abort_capture, allocating_in, restored_on_failure
from mmdet3d.structures import TemporalMemory

logger = logging.getLogger(__name__)

Captured = TypeVar("Captured")

#: Calls of a kind that run kernel by kernel before one is captured: libraries choose algorithms and reserve memory at
#: first use, which a graph must not hold.
EAGER_CALLS = 2


def on_device(device: torch.device) -> AbstractContextManager:
    """``device`` as the current GPU, on which streams, events and captures are made; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class GraphEngine(Generic[Captured]):
    """Captures of one kind of work, with the stream and the memory pool that they share.

    Nothing here depends on the number of processes. To be used with the device as the current one.

    Args:
        device: Where the work runs.
        enabled: Capture at all.
        what: Name of the work for the warning, such as "a frame".

    Attributes:
        enabled: False once a capture failed.
        captures: What was captured, by key.
    """

    def __init__(self, device: torch.device, *, enabled: bool, what: str) -> None:
        self.enabled, self.what = enabled, what
        self.captures: dict[Hashable, Captured] = {}
        self._calls: dict[Hashable, int] = {}
        self._pool: Any = None
        self.stream = torch.cuda.Stream(device) if enabled else None

    def warmed_up(self, kind: Hashable) -> bool:
        """Count a call of a kind; True from the one on that may be captured."""
        self._calls[kind] = self._calls.get(kind, 0) + 1
        return self._calls[kind] > EAGER_CALLS

    def captured(self, key: Hashable, capture: Callable[[], Captured]) -> Captured | None:
        """Return the capture with a key, made by ``capture`` if it is not there yet.

        Returns:
            None if it failed: a warning said why, and the engine is off from then on.
        """
        if key not in self.captures:
            torch.cuda.synchronize()
            try:
                with restored_on_failure():
                    self.captures[key] = capture()
            except RuntimeError as error:
                logger.warning("CUDA graphs are off, because %s could not be captured: %s", self.what, _cause(error))
                self._give_up()
                return None
        return self.captures[key]

    @contextmanager
    def graph(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Capture the block; to be used in ``capture`` of :meth:`captured`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a loader's that pins memory, may go on with what a capture must not do.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            yield graph

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run the block on the stream of the captures, which libraries and nodes for gradients must know before."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    @contextmanager
    def in_pool(self) -> Iterator[None]:
        """Run the block in the memory of the captures, if there are any; what stays longer must be copied.

        Without, work of this kind would hold as much again.
        """
        if not self.captures:
            yield
            return
        with self.on_stream(), allocating_in(self._pool, self.stream.device_index):
            yield

    def forget(self) -> None:
        """Drop the captures; later ones get another pool.

        Where cuBLAS holds workspaces in the old one, PyTorch keeps it and, because no capture uses it any more, refuses
        it to others.
        """
        self.captures.clear()
        self._pool = None

    def _give_up(self) -> None:
        if self._pool is not None:
            abort_capture(self._pool)
        self.enabled = False
        self.forget()
        torch.cuda.synchronize()


class MemoryBuffers:
    """Two sets of tensors for a temporal memory: a call reads one and writes the other, then they change places.

    A memory that lies here is valid until the second call after the one that gave it, if the next call goes on from it;
    one that goes on from another memory loads that in its place.
    """

    def __init__(self) -> None:
        self._sets: list[TemporalMemory] = []
        self.active = 0

    def __bool__(self) -> bool:
        return bool(self._sets)

    @property
    def source(self) -> TemporalMemory:
        """The set that the next call reads."""
        return self._sets[self.active]

    @property
    def target(self) -> TemporalMemory:
        """The set that the next call writes."""
        return self._sets[1 - self.active]

    def fits(self, memory: TemporalMemory) -> bool:
        """True if there are buffers, of the shapes of ``memory``."""
        return bool(self) and _shapes(memory) == _shapes(self.source)

    def make(self, memory: TemporalMemory, dtype: torch.dtype | None) -> None:
        """Make both sets for memories like ``memory``, in the precision of autocast to ``dtype`` (None: without)."""
        self._sets, self.active = [memory.in_precision(dtype).clone() for _ in range(2)], 0

    def adopt(self, memory: TemporalMemory) -> None:
        """Take the tensors of ``memory`` as the set that the next call writes, and make another like it."""
        self._sets, self.active = [memory.clone(), memory], 0

    def load(self, memory: TemporalMemory) -> None:
        """Bring the numbers of a fitting memory to where the next call reads, unless they lie there."""
        copy_memory(self.source, memory)

    def swap(self) -> None:
        """After a call: what it wrote is read next."""
        self.active = 1 - self.active

    def clear(self) -> None:
        """Give the tensors back."""
        self._sets, self.active = [], 0


def device_tensors(memory: TemporalMemory) -> list[Tensor]:
    """The tensors of a memory that lie on its device."""
    cache = memory.features
    features = () if cache is None else (cache.stereo, cache.neck, cache.matching)
    return [*memory.histories, *(tensor for tensor in features if tensor is not None)]


def copy_memory(target: TemporalMemory, source: TemporalMemory) -> None:
    """Copy what lies on the device, but for what is there already."""
    for to, tensor in zip(device_tensors(target), device_tensors(source), strict=True):
        if to.data_ptr() != tensor.data_ptr():
            to.copy_(tensor)


def _shapes(memory: TemporalMemory) -> list[torch.Size]:
    return [tensor.shape for tensor in device_tensors(memory)]


def _cause(error: BaseException) -> str:
    """Why a capture failed: the error that ended it, which the end of the capture may have replaced by another."""
    return str(error) if error.__context__ is None else f"{error.__context__} (then {error})"
