"""Training steps, forward and backward; on a GPU those of running sequences replay CUDA graphs.

A step of the released model launches 6600 kernels. Two CUDA graphs, one of the forward pass and one of the backward
pass, launch them at once. They run the same kernels, also for random numbers, which come from torch's generator as
without graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmdet3d.core.cuda_graphs.engine import GraphEngine, MemoryBuffers, on_device
from mmdet3d.models.detectors.base import BaseDetector
from mmdet3d.models.detectors.frame_plan import FramePlan
from mmdet3d.registry import ConfigError
from mmdet3d.structures import CameraInputs, FrameMeta, TemporalMemory
from mmdet3d.utils.precision import PRECISIONS


@dataclass
class _Inputs:
    """Where the captures of a kind find a batch."""

    images: Tensor
    targets: dict[str, Tensor]
    plan: FramePlan

    def load(self, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan) -> None:
        self.images.copy_(images, non_blocking=True)
        for name, target in self.targets.items():
            target.copy_(targets[name], non_blocking=True)
        self.plan.load(plan)


@dataclass
class CapturedStep:
    """A captured step from one set of histories to the other: its two graphs, and where they leave the losses."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    names: tuple[str, ...]
    values: Tensor
    loss: Tensor


class StepGraph:
    """Forward and backward pass of batch after batch, with gradients in ``grad`` of the parameters at the end.

    A memory is valid until the second step after the one that gave it: clone what is to be kept for longer. Gradients
    of replayed steps always lie in the same tensors, which are valid until the next step. The parameters must stay
    where they are.

    Steps in which a sequence starts, and the first ones of a kind, run kernel by kernel.

    Args:
        model: The detector, :class:`~mmdet3d.models.detectors.stcocc.STCOcc`, on its device.
        precision: "fp32" or "bf16".
        graphs: Capture and replay. If a capture fails, a warning says why and the steps go on without. False: the same
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
        self.model, self.dtype = model, PRECISIONS[precision]
        self.device = next(model.parameters()).device
        if graphs and self.device.type != "cuda":
            raise ConfigError(f"cuda_graphs=True needs the model on a CUDA device, it is on {self.device}")
        self.engine: GraphEngine[CapturedStep] = GraphEngine(self.device, enabled=graphs, what="a training step")
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[Tensor | None] = []
        self._used: list[bool] = []  # by a step without a graph
        self._inputs: dict[Hashable, _Inputs] = {}
        self._buffers = MemoryBuffers()

    @property
    def graphs(self) -> bool:
        """True while steps are captured and replayed."""
        return self.engine.enabled

    def step(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Forward and backward pass of a batch; replaces gradients and ``model.memory``.

        Args:
            batch: As ``forward_train`` of the model takes it, on its device but for the small matrices.

        Returns:
            ``loss`` (without gradient), ``log_vars``, ``num_samples`` and ``backward_done``, which is True.

        Raises:
            ValueError: the model is not in training mode, or the batch does not fit; nothing has changed then.
        """
        if not self.model.training:
            raise ValueError("the model is in evaluation mode; call model.train() first")
        inputs, meta = self.model.camera_inputs(batch["img_inputs"]), self.model.frame_meta(batch["img_metas"])
        with on_device(self.device):
            loss, log_vars = self._step(inputs, meta, _targets(batch, inputs.images.device, len(meta.starts)))
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(meta.starts), "backward_done": True}

    def _step(self, inputs: CameraInputs, meta: FrameMeta, targets: dict[str, Tensor]
              ) -> tuple[Tensor, dict[str, float]]:
        batch = len(meta.starts)
        self.model.check_targets(batch, **{name: value for name, value in targets.items() if name != "gt_depth"})
        plan = self.model.plan(inputs, meta, self.model.memory, self.device)
        memory = self._in_buffers(self.model.memory, batch)
        arguments = inputs.images, targets, plan, memory
        if not self.graphs or memory is None or any(meta.starts):
            with self.engine.in_pool():
                loss, log_vars = self._eager(*arguments)
            return loss.clone(), log_vars
        shapes = sorted((name, tuple(target.shape), target.dtype) for name, target in targets.items())
        kind = (plan.signature, tuple(inputs.images.shape), inputs.images.dtype, tuple(map(str, shapes)))
        if not self.engine.warmed_up(kind):
            with self.engine.on_stream():
                return self._eager(*arguments)
        capture = self.engine.captured((kind, self._buffers.active), lambda: self._capture(kind, *arguments))
        if capture is None:
            self._inputs.clear()
            self._gradients = []
            self._drop_gradients()
            return self._eager(*arguments)
        return self._replay(capture, self._inputs[kind], *arguments)

    # ---- one kernel after the other ---------------------------------------------------------------------------------

    def _forward(self, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan, memory: TemporalMemory | None
                 ) -> tuple[Tensor, tuple[str, ...], Tensor, TemporalMemory | None]:
        """Loss, names and values to log, new memory; the plan is on the device.

        Casts of weights that autocast keeps are made and dropped in here, so a capture holds those that it uses.
        """
        out = self._buffers.target.histories if self._buffers else None
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            prediction, features = self.model.compute(images, plan, memory, histories_out=out)
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
        if new is not None and not self._buffers:
            self._buffers.adopt(replace(new, features=None))
        self._remember(new)
        return loss.detach(), dict(zip(names, read(), strict=True))

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _in_buffers(self, memory: TemporalMemory | None, batch: int) -> TemporalMemory | None:
        """``memory`` in the buffers that the next step reads; None stays."""
        buffers, memory = self._buffers, memory and replace(memory, features=None)
        if buffers and not (buffers.source.batch_size == batch if memory is None else buffers.fits(memory)):
            self.engine.forget()
            self._inputs.clear()
            buffers.clear()
        if memory is None:
            return None
        if not buffers:
            buffers.make(memory, self.dtype)  # copies: the caller's own stay as they are
        buffers.load(memory)
        return replace(memory, histories=buffers.source.histories)

    def _remember(self, new: TemporalMemory | None) -> None:
        """Keep ``new``, whose histories lie in the other buffers, which the next step reads."""
        self.model.memory = None if new is None else replace(new, histories=self._buffers.target.histories,
                                                             features=None)
        self._buffers.swap()

    # ---- capturing and replaying ------------------------------------------------------------------------------------

    def _capture(self, kind: Hashable, images: Tensor, targets: Mapping[str, Tensor], plan: FramePlan,
                 memory: TemporalMemory) -> CapturedStep:
        """Capture the step from the current set of histories to the other; nothing is computed."""
        if kind not in self._inputs:
            self._inputs[kind] = _Inputs(torch.empty_like(images), {k: torch.empty_like(v) for k, v in targets.items()},
                                         plan.to(self.device))
        fixed = self._inputs[kind]
        self._drop_gradients()
        gc.collect()  # what still refers to a finished step would tie this one to its stream
        if not self.engine.captures:
            torch.cuda.empty_cache()  # the captures have memory of their own
        with self.engine.on_stream():
            with self.engine.graph() as forward:
                loss, names, values, _ = self._forward(fixed.images, fixed.targets, fixed.plan, memory)
            self._place_gradients()
            with self.engine.graph() as backward:
                torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])
                loss.backward()
        self._drop_gradients()
        return CapturedStep(forward, backward, names, values, loss.detach())

    def _place_gradients(self) -> None:
        """Give every parameter the gradient that all captures add to, so that each is there only once."""
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) if used else None
                               for parameter, used in zip(self._parameters, self._used, strict=True)]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _replay(self, capture: CapturedStep, fixed: _Inputs, images: Tensor, targets: Mapping[str, Tensor],
                plan: FramePlan, memory: TemporalMemory) -> tuple[Tensor, dict[str, float]]:
        fixed.load(images, targets, plan)
        capture.forward.replay()
        read = _read_later(capture.values)
        capture.backward.replay()
        self._place_gradients()
        self._remember(replace(memory, bda=plan.bda, sequence_ids=plan.sequence_ids,
                               ego_translation=plan.meta.ego_translation))
        # Read while the backward pass runs, so that the next launches are there when it ends.
        return capture.loss.clone(), dict(zip(capture.names, read(), strict=True))


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
