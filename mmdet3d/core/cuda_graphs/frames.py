"""Evaluation frame after frame; on a GPU the frames of a running sequence replay a CUDA graph.

A frame of the released model launches about 800 kernels, most of them shorter than their launch. A capture has two
parts where only the newest images go through the image network: that network, and the rest, which needs the geometry
of the frame. The first part runs while the host works that geometry out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d.core.cuda_graphs.engine import GraphEngine, MemoryBuffers, copy_memory, on_device
from mmdet3d.models.detectors.frame_plan import FramePlan
from mmdet3d.structures import TemporalMemory

FrameResult = tuple[Tensor, Tensor, TemporalMemory | None]
"""Classes, flow, and the memory for the next frame, see :class:`FrameRunner`."""


@dataclass
class CapturedFrame:
    """A captured frame: its input, and where it leaves its results.

    ``network`` needs the images alone and leaves their features in ``newest``; None if ``graph`` is the whole frame.
    """

    network: torch.cuda.CUDAGraph | None
    graph: torch.cuda.CUDAGraph
    plan: FramePlan
    semantics: Tensor
    flow: Tensor
    newest: Any


class FrameRunner:
    """Runs frame after frame with a detector in evaluation mode.

    A call that goes on from the memory that the last one returned leaves that one as it is; others, and the call after
    it, write to it. Keep ``memory.clone()`` for longer, or to switch between streams.

    Args:
        model: :class:`~mmdet3d.models.detectors.stcocc.STCOcc`, or a copy of it in half precision (:func:`fast_copy`);
            its weights must stay where they are.
        graphs: Capture and replay CUDA graphs. Default: where the model is on a GPU. If a capture fails, a warning says
            why and the runner goes on without.
    """

    def __init__(self, model: nn.Module, *, graphs: bool | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        # A detector of another kind needs run() and decode() only; its frames run kernel by kernel.
        self._planned = all(hasattr(model, name) for name in ("camera_inputs", "frame_meta", "plan", "compute"))
        graphs = self._planned and self.device.type == "cuda" if graphs is None else graphs
        if graphs and not self._planned:
            raise ValueError(f"graphs=True needs a detector with plan and compute; {type(model).__name__} has not")
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs=True needs the model on a CUDA device, it is on {self.device}")
        self.dtype: torch.dtype | None = getattr(model, "inference_dtype", None)
        self.engine: GraphEngine[CapturedFrame] = GraphEngine(self.device, enabled=graphs, what="a frame")
        self._buffers = MemoryBuffers()
        self._images: dict[Hashable, Tensor] = {}
        self._last_kind: Hashable = None

    @property
    def graphs(self) -> bool:
        """True while frames are captured and replayed."""
        return self.engine.enabled

    @torch.no_grad()
    def __call__(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping],
                 memory: TemporalMemory | None = None) -> FrameResult:
        """Run a frame.

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
            return self._run(img_inputs, img_metas, memory)

    def _run(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None
             ) -> FrameResult:
        if not self._planned:
            images, *matrices = img_inputs
            with self._arithmetic():
                prediction, _ = self.model.run([images.to(self.device), *matrices], img_metas, memory)
            return *self.model.decode(prediction), prediction.memory
        inputs = self.model.camera_inputs(img_inputs)
        begun = self._expected(inputs.images, img_metas)
        images = self._upload(inputs.images, newest_only=begun is not None)  # in the background, as all that follows
        if begun is not None:
            begun.network.replay()
        plan = self.model.plan(inputs, self.model.frame_meta(img_metas), memory, self.device)
        kind, self._last_kind = (plan.signature, images.shape, images.dtype), None
        if begun is not None and self.engine.captures.get((kind, self._buffers.active)) is not begun:
            images, begun = self._upload(inputs.images), None  # begun in vain: the other images are needed too
        if not self.graphs or memory is None or any(plan.meta.starts) or not self.engine.warmed_up(kind):
            return self._compute(images, plan.to(self.device), memory)
        return self._replay(kind, images, plan, memory, begun)

    def __reduce__(self) -> tuple:
        """Copies and pickles begin without captures."""
        return _make_runner, (self.model, self.graphs)

    def _upload(self, images: Tensor, newest_only: bool = False) -> Tensor:
        """The images on the device; with graphs in a buffer that stays, because captures read it."""
        if not self.graphs:
            return images.to(self.device, non_blocking=True)
        key = (images.shape, images.dtype)
        if key not in self._images:
            self._images[key] = torch.empty(images.shape, dtype=images.dtype, device=self.device)
        buffer = self._images[key]
        if not newest_only:
            return buffer.copy_(images, non_blocking=True)
        # One by one, because only copies of memory that lies together do not wait.
        for target, source in zip(buffer[:, :, 0].flatten(0, 1), images[:, :, 0].flatten(0, 1), strict=True):
            target.copy_(source, non_blocking=True)
        return buffer

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Autocast and cuDNN settings of the model's precision.

        In half precision cuDNN searches the fastest algorithm of a convolution at its first use.
        """
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
                 **buffers: Sequence[Tensor]) -> FrameResult:
        """Run the device's part; with the features of the ``newest`` images the images are not read."""
        with self._arithmetic():
            prediction, _ = self.model.compute(images, plan, memory, newest=newest, **buffers)
        return *self.model.decode(prediction), prediction.memory

    def _expected(self, images: Tensor, img_metas: Sequence[Mapping]) -> CapturedFrame | None:
        """The capture of a frame that is probably of the kind of the last one, if it can begin with the images."""
        capture = self.engine.captures.get((self._last_kind, self._buffers.active))
        if (capture is None or capture.network is None or self._last_kind[1:] != (images.shape, images.dtype)
                or any(meta.get("start_of_sequence", True) for meta in img_metas)):
            return None
        return capture

    def _replay(self, kind: Hashable, images: Tensor, plan: FramePlan, memory: TemporalMemory,
                begun: CapturedFrame | None) -> FrameResult:
        buffers = self._buffers
        if not buffers.fits(memory):
            self.engine.forget()
            buffers.make(memory, self.dtype)
        buffers.load(memory)
        capture = self.engine.captured((kind, buffers.active), lambda: self._capture(images, plan))
        if capture is None:
            self._images.clear()
            buffers.clear()
            return self._compute(images, plan.to(self.device), memory)
        capture.plan.load(plan)
        if capture.network is not None and capture is not begun:
            capture.network.replay()
        capture.graph.replay()
        self._last_kind = kind
        buffers.swap()
        return capture.semantics.clone(), capture.flow.clone(), self._with_host_entries(buffers.source, plan)

    def _capture(self, images: Tensor, plan: FramePlan) -> CapturedFrame:
        source, target = self._buffers.source, self._buffers.target
        fixed, first, newest = plan.to(self.device), None, None
        network = self.model.forward_projection
        if network.newest_alone(plan.reuse):
            with self.engine.graph() as first, self._arithmetic():
                newest = network.frame_features(images[:, :, 0].flatten(0, 1))
        with self.engine.graph() as graph:
            semantics, flow, memory = self._compute(images, fixed, source, newest, histories_out=target.histories)
            copy_memory(target, memory)
        return CapturedFrame(first, graph, fixed, semantics, flow, newest)

    @staticmethod
    def _with_host_entries(memory: TemporalMemory, plan: FramePlan) -> TemporalMemory:
        """``memory`` with what the host knows of the frame."""
        features = memory.features
        if features is not None:
            features = replace(features, keys=tuple(keys[:2] for keys in plan.meta.image_keys), sweep=plan.key_sweep)
        return replace(memory, bda=plan.bda, sequence_ids=torch.tensor(plan.meta.sequence_ids),
                       ego_translation=plan.meta.ego_translation, features=features)


def _make_runner(model: nn.Module, graphs: bool) -> FrameRunner:
    return FrameRunner(model, graphs=graphs)
