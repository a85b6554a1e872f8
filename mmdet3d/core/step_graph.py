"""Training steps, forward and backward; on a GPU those of running sequences replay CUDA graphs.

A step of the released model launches 6600 kernels, so that a GPU waits for Python for a good part of it. Two CUDA
graphs, one of the forward pass and one of the backward pass, launch them at once. They run the same kernels, also for
random numbers, which come from torch's generator as without graphs.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmdet3d.datasets.pipelines.device import normalise_on_device
from mmdet3d.models.detectors.base import BaseDetector
from mmdet3d.models.detectors.frame_plan import FramePlan
from mmdet3d.registry import ConfigError
from mmdet3d.structures import TemporalMemory
from mmdet3d.utils.precision import PRECISIONS
from mmdet3d.utils.recording import end_recording, on_device, reason, state_kept

logger = logging.getLogger(__name__)

#: Steps of a kind that run one kernel after the other before they are recorded: libraries choose algorithms and reserve
#: memory at first use, which a graph must not hold.
EAGER_STEPS = 2


@dataclass
class _Inputs:
    """Where the recordings of a kind find a batch."""

    images: Tensor
    targets: dict[str, Tensor]
    plan: FramePlan

    def load(self, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan) -> None:
        self.images.copy_(images, non_blocking=True)
        for name, target in self.targets.items():
            target.copy_(targets[name], non_blocking=True)
        self.plan.load(plan)


@dataclass
class _Recording:
    """A recorded step from one set of histories to the other: its two graphs, and where they leave the losses."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    names: tuple[str, ...]
    values: Tensor
    loss: Tensor


class StepGraph:
    """Forward and backward pass of batch after batch, with gradients in ``grad`` of the parameters at the end.

    The histories of the model's memory alternate between two sets of buffers, so a memory is valid until the second
    step after the one that gave it: clone what is to be kept for longer. Gradients of replayed steps always lie in the
    same tensors, which are valid until the next step. The parameters must stay where they are.

    Steps in which a sequence starts, and the first ones of a kind, run kernel by kernel.

    Args:
        model: The detector, :class:`~mmdet3d.models.detectors.stcocc.STCOcc`, on its device.
        precision: "fp32" or "bf16".
        graphs: Record and replay. If recording fails, a warning says why and the steps go on without. False: the same
            steps without graphs, on any device.

    Raises:
        ConfigError: the precision is unknown, or graphs are not possible: the model is another one, not on a GPU, or
            trained by several processes.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32", *, graphs: bool = True) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: expected one of {sorted(PRECISIONS)}, got {precision!r}")
        if isinstance(model, DistributedDataParallel) or (dist.is_available() and dist.is_initialized()
                                                          and dist.get_world_size() > 1):
            raise ConfigError("cuda_graphs=True trains in a single process only; leave it out with several")
        if not all(hasattr(model, name) for name in ("plan", "compute", "check_targets", "losses", "memory")):
            raise ConfigError("cuda_graphs=True needs a model with plan, compute, check_targets, losses and memory, as "
                              f"STCOcc has them; {type(model).__name__} has not")
        if not model.temporal_fusion_list:
            raise ConfigError("cuda_graphs=True records steps that go on from a memory; this model has none, because "
                              "temporal_fusion is None")
        self.model, self.graphs, self.dtype = model, graphs, PRECISIONS[precision]
        self.device = next(model.parameters()).device
        if graphs and self.device.type != "cuda":
            raise ConfigError(f"cuda_graphs=True needs the model on a CUDA device, it is on {self.device}")
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor | None] = []
        self._used: list[bool] = []  # by a step without a graph
        self._seen: dict[Hashable, int] = {}
        self._inputs: dict[Hashable, _Inputs] = {}
        self._recordings: dict[tuple[Hashable, int], _Recording] = {}
        self._sides: list[tuple[Tensor, ...]] = []
        self._side = 0
        self._pool: Any = None
        self._stream = torch.cuda.Stream(self.device) if graphs else None

    def step(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Forward and backward pass of a batch; replaces gradients and ``model.memory``.

        Args:
            batch: As ``forward_train`` of the model takes it, on its device but for the small matrices. Images may be
                bytes, see :func:`mmdet3d.datasets.pipelines.device.normalise_on_device`.

        Returns:
            ``loss`` (without gradient), ``log_vars``, ``num_samples`` and ``backward_done``, which is True.

        Raises:
            ValueError: the model is not in training mode, or the batch does not fit; nothing has changed then.
        """
        if not self.model.training:
            raise ValueError("the model is in evaluation mode; call model.train() first")
        with on_device(self.device):
            return self._step(batch)

    def _step(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs, metas = batch["img_inputs"], batch["img_metas"]
        targets = _targets(batch, inputs[0].device, len(metas))
        self.model.check_targets(len(metas), **{name: value for name, value in targets.items() if name != "gt_depth"})
        plan = self.model.plan(inputs, metas, self.model.memory)
        memory = self._in_place(self.model.memory, len(metas))
        loss, log_vars = self._choose(inputs[0], targets, plan, memory)
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(metas), "backward_done": True}

    def _choose(self, images: Tensor, targets: dict[str, Tensor], plan: FramePlan, memory: TemporalMemory | None
                ) -> tuple[Tensor, dict[str, float]]:
        arguments = images, targets, plan, memory
        if not self.graphs or memory is None or any(plan.meta.starts):
            with self._in_pool():
                loss, log_vars = self._eager(*arguments)
            return loss.clone(), log_vars
        shapes = sorted((name, tuple(target.shape), target.dtype) for name, target in targets.items())
        kind = (plan.signature, tuple(images.shape), images.dtype, tuple(map(str, shapes)))
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] <= EAGER_STEPS:
            with self._beside():
                return self._eager(*arguments)
        if (kind, self._side) not in self._recordings:
            try:
                self._recordings[kind, self._side] = self._record(kind, *arguments)
            except RuntimeError as error:
                logger.warning("CUDA graphs are off, because a training step could not be recorded: %s", reason(error))
                self._give_up()
        return self._replay(kind, *arguments) if self.graphs else self._eager(*arguments)

    # ---- one kernel after the other ---------------------------------------------------------------------------------

    def _forward(self, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan, memory: TemporalMemory | None
                 ) -> tuple[Tensor, tuple[str, ...], Tensor, TemporalMemory | None]:
        """Loss, names and values to log, new memory; the plan is on the device.

        Casts of weights that autocast keeps are made and dropped in here, so a recording holds those that it uses.
        """
        out = self._sides[1 - self._side] if self._sides else None
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            prediction, features = self.model.compute(normalise_on_device(images), plan, memory, histories_out=out)
            losses = self.model.losses(prediction, features.depth, **targets)
            loss, names, values = BaseDetector.reduce_losses(losses)
        return loss, names, values, prediction.memory

    def _eager(self, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan, memory: TemporalMemory | None
               ) -> tuple[Tensor, dict[str, float]]:
        self._drop_gradients()
        loss, names, values, new = self._forward(images, targets, plan.to(self.device), memory)
        read = _read_later(values)
        loss.backward()
        used = [parameter.grad is not None for parameter in self._parameters]
        self._used = [a or b for a, b in zip(self._used, used, strict=True)] if self._used else used
        if new is not None and not self._sides:
            self._sides, self._side = [tuple(torch.empty_like(h) for h in new.histories), new.histories], 0
        self._arrive(new)
        return loss.detach(), dict(zip(names, read(), strict=True))

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the recordings, which libraries and nodes for gradients must know before."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def _in_pool(self) -> Iterator[None]:
        """In the memory of the recordings, which lies idle between replays; what stays longer must be copied.

        Without, a step of this kind would hold as much again. The stream decides, because gradients are computed by
        threads of PyTorch's own.
        """
        if not self._recordings:
            yield
            return
        index = self._stream.device_index
        with self._beside():
            torch._C._cuda_beginAllocateCurrentStreamToPool(index, self._pool)
            try:
                yield
            finally:
                torch._C._cuda_endAllocateToPool(index, self._pool)
                torch._C._cuda_releasePool(index, self._pool)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _in_place(self, memory: TemporalMemory | None, batch: int) -> TemporalMemory | None:
        """``memory`` in the buffers that the next step reads; None stays."""
        shapes = [tensor.shape for tensor in memory.histories] if memory is not None else None
        held = [tensor.shape for tensor in self._sides[0]] if self._sides else None
        if held is not None and (held[0][0] != batch if shapes is None else held != shapes):
            self._forget()
        if memory is None:
            return None
        if not self._sides:
            held = memory.in_precision(self.dtype).clone().histories  # the caller's own stay as they are
            self._sides = [held, tuple(torch.empty_like(history) for history in held)]
            self._side = 0
        side = self._sides[self._side]
        for mine, theirs in zip(side, memory.histories, strict=True):
            if mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)
        return replace(memory, histories=side)

    def _forget(self) -> None:
        """Drop the buffers of the memory and what was recorded with them."""
        self._recordings.clear()
        self._inputs.clear()
        self._sides, self._side, self._pool = [], 0, None

    def _arrive(self, new: TemporalMemory | None) -> None:
        """``new`` lies in the other buffers, which the next step reads."""
        self.model.memory = None if new is None else replace(new, histories=self._sides[1 - self._side], features=None)
        self._side = 1 - self._side

    # ---- recording and replaying ------------------------------------------------------------------------------------

    def _record(self, kind: Hashable, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan,
                memory: TemporalMemory) -> _Recording:
        """Record the step from the current side to the other; nothing is computed."""
        if kind not in self._inputs:
            self._inputs[kind] = _Inputs(torch.empty_like(images), {k: torch.empty_like(v) for k, v in targets.items()},
                                         plan.to(self.device))
        fixed = self._inputs[kind]
        self._drop_gradients()
        gc.collect()  # what still refers to a finished step would tie this one to its stream
        if not self._recordings:
            torch.cuda.empty_cache()  # the recordings have memory of their own
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with state_kept(), self._beside():
            with torch.cuda.graph(graphs[0], **options):
                loss, names, values, _ = self._forward(fixed.images, fixed.targets, fixed.plan, memory)
            self._place_gradients()
            with torch.cuda.graph(graphs[1], **options):
                torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])
                loss.backward()
        self._drop_gradients()
        return _Recording(*graphs, names, values, loss.detach())

    def _place_gradients(self) -> None:
        """Give every parameter the gradient that all recordings add to, so that each is there only once."""
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) if used else None
                               for parameter, used in zip(self._parameters, self._used, strict=True)]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _replay(self, kind: Hashable, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan,
                memory: TemporalMemory) -> tuple[Tensor, dict[str, float]]:
        recording = self._recordings[kind, self._side]
        self._inputs[kind].load(images, targets, plan)
        recording.forward.replay()
        read = _read_later(recording.values)
        recording.backward.replay()
        self._place_gradients()
        self._arrive(replace(memory, bda=plan.bda, sequence_ids=plan.sequence_ids,
                             ego_translation=plan.meta.ego_translation))
        # Read while the backward pass runs, so that the next launches are there when it ends.
        return recording.loss.clone(), dict(zip(recording.names, read(), strict=True))

    def _give_up(self) -> None:
        end_recording(self._pool)
        self.graphs = False
        self._recordings.clear()
        self._inputs.clear()
        self._gradients, self._pool = [], None
        self._drop_gradients()
        torch.cuda.synchronize(self.device)


def _targets(batch: Mapping[str, Any], device: torch.device, count: int) -> dict[str, Tensor]:
    """What the losses read of a batch of ``count`` samples.

    Raises:
        ValueError: depth or labels are missing or on another device than the images, or the depth is of other samples.
    """
    targets = {name: value for name, value in batch.items()
               if isinstance(value, Tensor) and (name == "gt_depth" or name.startswith("voxel_"))}
    if missing := [name for name in ("gt_depth", "voxel_semantics") if name not in targets]:
        raise ValueError(f"training needs {missing}; got {sorted(batch)}")
    if elsewhere := {name: str(value.device) for name, value in targets.items() if value.device != device}:
        raise ValueError(f"targets must be on the device of the images, {device}; got {elsewhere}")
    if len(targets["gt_depth"]) != count:
        raise ValueError(f"gt_depth must be that of {count} samples, got {list(targets['gt_depth'].shape)}")
    return targets


def _read_later(values: Tensor) -> Callable[[], Sequence[float]]:
    """Begin to fetch ``values`` from the device; the function that is returned waits for them, not for later work."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        done.synchronize()
        return host.tolist()

    return read
