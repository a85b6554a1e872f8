"""Evaluation frame after frame; on a GPU the frames of a running sequence replay a CUDA graph.

A frame of the released model launches about 800 kernels, most of them shorter than their launch, so that a GPU would
wait for Python half of the time. A CUDA graph launches them all at once. It runs the same kernels on the same numbers,
so results are equal bit for bit.

A recording has two parts where of all pictures only the newest go through the image network: that network, and the
rest, which needs the geometry of the frame. The first part runs while the host works that geometry out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d.models.detectors.frame_plan import FramePlan
from mmdet3d.structures import TemporalMemory
from mmdet3d.utils.recording import end_recording, on_device, reason, state_kept

logger = logging.getLogger(__name__)

#: Frames of a kind that run one kernel after the other before their graph is recorded: libraries choose algorithms and
#: reserve memory at first use, which a graph must not hold.
EAGER_FRAMES = 2


@dataclass
class _Recording:
    """A recorded frame: what to fill before it is replayed, and where it leaves its results.

    ``pictures`` needs the pictures alone and leaves their features in ``newest``; None if ``graph`` is the whole frame.
    """

    pictures: torch.cuda.CUDAGraph | None
    graph: torch.cuda.CUDAGraph
    plan: FramePlan
    semantics: Tensor
    flow: Tensor
    newest: Any


class FrameRunner:
    """Predicts frame after frame with a detector in evaluation mode.

    The memory that a call returns stays valid until the second call after it: the runner alternates between two sets of
    buffers. Pass ``memory.clone()`` to keep one for longer.

    Args:
        model: :class:`~mmdet3d.models.detectors.stcocc.STCOcc`, or what :func:`fast_copy` made of it; its weights must
            stay where they are.
        graphs: Record and replay CUDA graphs. Default: where the model is on a GPU. If recording fails, a warning says
            why and the runner goes on without.
        prepare: What makes the network's float images of what is passed as images, on the device (normalisation of
            bytes, for example). Default: nothing.
    """

    def __init__(self, model: nn.Module, *, graphs: bool | None = None,
                 prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        if self.graphs and self.device.type != "cuda":
            raise ValueError(f"graphs=True needs the model on a CUDA device, it is on {self.device}")
        self.prepare = prepare or _as_they_are
        self.dtype: torch.dtype | None = getattr(model, "inference_dtype", None)
        self._seen: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self._last_kind: Hashable = None
        self._images: dict[Hashable, Tensor] = {}
        self._sides: list[TemporalMemory] = []
        self._side = 0
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def __call__(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping],
                 memory: TemporalMemory | None = None) -> tuple[Tensor, Tensor, TemporalMemory | None]:
        """Occupancy and flow of a frame.

        Args:
            img_inputs: As :meth:`STCOcc.run` takes them; images on any device, matrices best on the CPU.
            img_metas: One dict per sample.
            memory: What the call for the frame before returned; None at first.

        Returns:
            Classes uint8 [B, X, Y, Z]; flow float16 [B, X, Y, Z, 2] in m/s; both on the model's device, which is not
            waited for. The memory for the next frame.

        Raises:
            ValueError: inputs or memory do not fit.
        """
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        with on_device(self.device):
            return self._frame(img_inputs, img_metas, memory)

    def _frame(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None
               ) -> tuple[Tensor, Tensor, TemporalMemory | None]:
        begun = self._expected(img_inputs[0], img_metas)
        images = self._upload(img_inputs[0], newest_only=begun is not None)  # in the background, as all that follows
        if begun is not None:
            begun.pictures.replay()
        stand_in = torch.empty(1, device=self.device).expand(images.shape)  # the plan reads shape and device
        plan = self.model.plan((stand_in, *img_inputs[1:]), img_metas, memory)
        kind, self._last_kind = (plan.signature, images.shape, images.dtype), None
        if begun is not None and self._recordings.get((kind, self._side)) is not begun:
            images, begun = self._upload(img_inputs[0]), None  # begun in vain: the other pictures are needed too
        if not self.graphs or memory is None or any(plan.meta.starts):
            return self._eager(images, plan, memory)
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] <= EAGER_FRAMES:
            return self._eager(images, plan, memory)
        return self._replay(kind, images, plan, memory, begun)

    def __reduce__(self) -> tuple:
        """Copies and pickles begin without recordings."""
        return _make_runner, (self.model, self.graphs, self.prepare)

    def _upload(self, images: Tensor, newest_only: bool = False) -> Tensor:
        """The images on the device; with graphs in a buffer that stays, because recordings read it."""
        if not self.graphs:
            return images.to(self.device, non_blocking=True)
        key = (images.shape, images.dtype)
        if key not in self._images:
            self._images[key] = torch.empty(images.shape, dtype=images.dtype, device=self.device)
        buffer = self._images[key]
        if not newest_only:
            return buffer.copy_(images, non_blocking=True)
        # One by one, because only copies of memory that lies together do not wait.
        targets, sources = (self.model.forward_projection.newest_pictures(x).unbind(1) for x in (buffer, images))
        for target, source in zip(targets, sources, strict=True):
            for one, other in zip(target, source, strict=True):
                one.copy_(other, non_blocking=True)
        return buffer

    def _eager(self, images: Tensor, plan: FramePlan, memory: TemporalMemory | None):
        return self._compute(images, plan.to(self.device), memory)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """That of the mode. In the fast one cuDNN searches the fastest algorithm of a convolution at its first use."""
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = benchmark or (
            self.dtype is not None and not torch.are_deterministic_algorithms_enabled())
        try:
            # Without its cache autocast converts what is left to convert again in each frame, as a graph must.
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
                yield
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def _compute(self, images: Tensor, plan: FramePlan, memory: TemporalMemory | None, newest: Any = None,
                 **buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor, TemporalMemory | None]:
        """With the features of the ``newest`` pictures the images are not read."""
        with self._arithmetic():
            prediction, _ = self.model.compute(self.prepare(images) if newest is None else images, plan, memory,
                                               newest=newest, **buffers)
        return *self.model.outputs(prediction), prediction.memory

    def _expected(self, images: Tensor, img_metas: Sequence[Mapping]) -> _Recording | None:
        """The recording of a frame that is probably of the kind of the last one, if it can begin with the pictures."""
        recording = self._recordings.get((self._last_kind, self._side))
        if (recording is None or recording.pictures is None or self._last_kind[1:] != (images.shape, images.dtype)
                or any(meta.get("start_of_sequence", True) for meta in img_metas)):
            return None
        return recording

    def _replay(self, kind: Hashable, images: Tensor, plan: FramePlan, memory: TemporalMemory,
                begun: _Recording | None):
        if not self._in_place(memory):
            self._take_in(memory)
        recording = self._recordings.get((kind, self._side))
        if recording is None:
            try:
                recording = self._record(images, plan)
            except RuntimeError as error:
                logger.warning("CUDA graphs are off, because a frame could not be recorded: %s", reason(error))
                self._give_up()
                return self._eager(images, plan, memory)
            self._recordings[kind, self._side] = recording
        recording.plan.load(plan)
        if recording.pictures is not None and recording is not begun:
            recording.pictures.replay()
        recording.graph.replay()
        self._last_kind = kind
        self._side = 1 - self._side
        memory = self._with_host_entries(self._sides[self._side], plan)
        return recording.semantics.clone(), recording.flow.clone(), memory

    def _take_in(self, memory: TemporalMemory) -> None:
        """Make ``memory`` what the next recording reads."""
        if not self._fits(memory):
            # With a pool of their own for the next ones: where cuBLAS holds workspaces in this one, PyTorch keeps it
            # and, because no recording uses it any more, refuses it to others.
            self._recordings.clear()
            self._pool = None
            self._sides = [memory.in_precision(self.dtype).clone() for _ in range(2)]
            self._side = 0
        else:
            _copy_memory(self._sides[self._side], memory)

    def _in_place(self, memory: TemporalMemory) -> bool:
        """Whether ``memory`` lies where the next recording reads, as what the runner returned last does."""
        return self._fits(memory) and all(
            mine.data_ptr() == theirs.data_ptr()
            for mine, theirs in zip(_tensors(self._sides[self._side]), _tensors(memory), strict=True))

    def _fits(self, memory: TemporalMemory) -> bool:
        return bool(self._sides) and [t.shape for t in _tensors(memory)] == [t.shape for t in _tensors(self._sides[0])]

    def _record(self, images: Tensor, plan: FramePlan) -> _Recording:
        source, target = self._sides[self._side], self._sides[1 - self._side]
        fixed, first, newest = plan.to(self.device), None, None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        torch.cuda.synchronize()
        network = self.model.forward_projection
        with state_kept():
            if network.newest_alone(plan.reuse):
                first = torch.cuda.CUDAGraph()
                with torch.cuda.graph(first, **options), self._arithmetic():
                    newest = network.frame_features(self.prepare(network.newest_pictures(images).flatten(0, 1)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, **options):
                semantics, flow, memory = self._compute(images, fixed, source, newest, histories_out=target.histories)
                _copy_memory(target, memory)
        return _Recording(first, graph, fixed, semantics, flow, newest)

    def _give_up(self) -> None:
        end_recording(self._pool)
        self.graphs = False
        self._recordings.clear()
        self._images.clear()
        self._sides, self._pool = [], None
        torch.cuda.synchronize()

    @staticmethod
    def _with_host_entries(memory: TemporalMemory, plan: FramePlan) -> TemporalMemory:
        """``memory`` with what the host knows of the frame."""
        features = memory.features
        if features is not None:
            features = replace(features, keys=tuple(keys[:2] for keys in plan.meta.image_keys), sweep=plan.key_sweep)
        return replace(memory, bda=plan.bda, sequence_ids=torch.tensor(plan.meta.sequence_ids),
                       ego_translation=plan.meta.ego_translation, features=features)


def _as_they_are(images: Tensor) -> Tensor:
    return images


def _make_runner(model: nn.Module, graphs: bool, prepare: Callable[[Tensor], Tensor]) -> FrameRunner:
    return FrameRunner(model, graphs=graphs, prepare=prepare)


def _tensors(memory: TemporalMemory) -> list[Tensor]:
    """The tensors of a memory that lie on the device."""
    cache = memory.features
    features = () if cache is None else (cache.stereo, cache.neck, cache.matching)
    return [*memory.histories, *(tensor for tensor in features if tensor is not None)]


def _copy_memory(target: TemporalMemory, source: TemporalMemory) -> None:
    """Copy what lies on the device, but for what is there already."""
    for to, tensor in zip(_tensors(target), _tensors(source), strict=True):
        if to.data_ptr() != tensor.data_ptr():
            to.copy_(tensor)
