"""Everything of a frame that is small matrices: computed on the host, sent to the device in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdet3d.models.attention.backward_projection import BEVFormerBackwardProjection
from mmdet3d.models.temporal import SparseFusion
from mmdet3d.models.view_transforms.feature_reuse import NO_REUSE, FeatureReuse, feature_reuse
from mmdet3d.models.view_transforms.geometry import LiftGeometry
from mmdet3d.ops.plane_sweep import SweepGeometry
from mmdet3d.structures import FrameCache, FrameMeta, TemporalMemory, VoxelGrid
from mmdet3d.utils.precision import full_precision

#: Bytes; every tensor of a packed buffer begins at a multiple.
ALIGNMENT = 16


class StageGeometry(NamedTuple):
    """What the stages read.

    Attributes:
        bda: [B, 4, 4] BEV augmentation.
        image_from_augmented: [B, N, 4, 4] float32 augmented ego to augmented pixels times depth.
        shift: [B, 2] float32 displacement of the previous bird's-eye view, in units of the map (x, y).
        previous_flips: [B, 2] bool, whether the BEV augmentation changed its flip along (x, y) since the frame before.
        start_mask: [B] bool, whether a sequence starts.
        index_matrices: For each temporal fusion, finest stage first, [B, 4, 4] float32: voxel index (x, y, z) now to
            (fractional) voxel index in the previous frame's volume.
        noise_seeds: [B] int32 seeds of the flow head's noise in evaluation, or None.
    """

    bda: Tensor
    image_from_augmented: Tensor
    shift: Tensor
    previous_flips: Tensor
    start_mask: Tensor
    index_matrices: tuple[Tensor, ...]
    noise_seeds: Tensor | None


@dataclass(frozen=True)
class FramePlan:
    """The geometry of a frame for the device, and its meta data for the host.

    Attributes:
        lifts: Geometry of the lifted frames, the key frame last. None without images.
        stages: Geometry of the stages.
        meta: Meta data, on the CPU.
        bda: [B, 4, 4] BEV augmentation, on the CPU.
        sequence_ids: [B] int64 sequence numbers, on the CPU.
        reuse: Which image features are there already.
        key_sweep: Cameras of the key frame's stereo pair, on the CPU; None without stereo.
        buffer: uint8, all tensors of ``lifts`` and ``stages`` one after the other. They are views of it, but for a plan
            that waits in page-locked memory for its way to a device.
    """

    lifts: LiftGeometry | None
    stages: StageGeometry
    meta: FrameMeta
    bda: Tensor
    sequence_ids: Tensor
    reuse: FeatureReuse
    key_sweep: SweepGeometry | None
    buffer: Tensor

    @classmethod
    def pack(cls, lifts: LiftGeometry | None, stages: StageGeometry, meta: FrameMeta,
             cache: FrameCache | None = None, *, pinned: bool = False) -> FramePlan:
        """Plan of a frame.

        Args:
            lifts: Geometry of the lifted frames on the CPU, or None.
            stages: Geometry of the stages on the CPU.
            meta: Meta data.
            cache: Features of the sample before.
            pinned: The buffer is to be page-locked, so that a GPU can fetch it in the background.
        """
        reuse, sweeps = NO_REUSE, _sweeps(lifts, len(meta.starts))
        if lifts is not None:
            reuse = feature_reuse(meta.image_keys, sweeps, cache)
        tensors = _tensors((lifts, stages))
        offsets, size = _layout(tensors)
        buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        memory = buffer.numpy()
        for tensor, offset in zip(tensors, offsets, strict=True):
            values = tensor.numpy()
            np.ndarray(values.shape, values.dtype, memory, offset)[...] = values
        plan = cls(lifts, stages, meta, stages.bda, torch.tensor(meta.sequence_ids), reuse,
                   sweeps[0] if sweeps else None, buffer)
        return plan if pinned else plan._on(buffer)

    @property
    def signature(self) -> Hashable:
        """What steers the computation of a frame besides tensors: frames that agree in it run the same kernels."""
        return self.meta.starts, self.reuse, self.buffer.shape, self.stages.noise_seeds is None

    def to(self, device: torch.device | str) -> FramePlan:
        """The plan with its tensors on ``device``: one transfer, which does not wait when the buffer is pinned."""
        device = torch.device(device)
        return self if device == self.buffer.device else self._on(self.buffer.to(device, non_blocking=True))

    def load(self, other: FramePlan) -> FramePlan:
        """``other`` in the storage of this plan, which must be of the same shapes: for what keeps its addresses.

        Raises:
            ValueError: the buffers differ in size.
        """
        if other.buffer.shape != self.buffer.shape:
            raise ValueError(f"the plan holds {len(self.buffer)} bytes and cannot take one of {len(other.buffer)}")
        self.buffer.copy_(other.buffer, non_blocking=True)
        return replace(other, lifts=self.lifts, stages=self.stages, buffer=self.buffer)

    def _on(self, buffer: Tensor) -> FramePlan:
        tree = (self.lifts, self.stages)
        tensors = _tensors(tree)
        rest = iter(_views(buffer, tensors, _layout(tensors)[0]))
        lifts, stages = map_tensors(lambda _: next(rest), tree)
        return replace(self, lifts=lifts, stages=stages, buffer=buffer)


def _sweeps(lifts: LiftGeometry | None, batch: int) -> list[SweepGeometry]:
    """Cameras of the stereo pairs, key frame first; none without stereo."""
    if lifts is None or lifts.sweep is None:
        return []
    return [lifts.select(start, batch).sweep for start in range(len(lifts.camera_vector) - batch, -1, -batch)]


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    tensors: list[Tensor] = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, tree)
    return tensors


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` of nested (named) tuples with ``function`` of every tensor in its place; other values stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        values = [map_tensors(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Offset of each tensor in the buffer, and the buffer's size, in bytes."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return offsets, size


def _views(buffer: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int]) -> list[Tensor]:
    return [buffer[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(tensors, offsets, strict=True)]


@torch.no_grad()
@full_precision
def stage_geometry(meta: FrameMeta, bda: Tensor, memory: TemporalMemory | None,
                   projection: BEVFormerBackwardProjection, fusions: Sequence[SparseFusion], grids: Sequence[VoxelGrid]
                   ) -> StageGeometry:
    """Geometry of the stages, on the CPU.

    Args:
        meta: Meta data of the batch.
        bda: [B, 4, 4] BEV augmentation on the CPU.
        memory: What the previous frame returned, or None.
        projection: Any stage's backward projection, because their options are the same.
        fusions: Temporal fusions, whose options are the same; none for a model without memory.
        grids: Voxel grid of each stage.
    """
    earlier_bda = None if memory is None else memory.bda
    flips = bda * (bda if earlier_bda is None else earlier_bda)
    return StageGeometry(
        bda=bda, image_from_augmented=projection.image_from_augmented(meta.image_from_ego, bda),
        shift=projection.displacement(ego_displacement(memory, meta), meta.yaw, bda),
        previous_flips=flips[:, [0, 1], [0, 1]] < 0, start_mask=torch.tensor(meta.starts),
        index_matrices=tuple(fusions[0].index_matrices(
            grids, meta.starts, bda, earlier_bda, meta.previous_ego_from_ego)) if fusions else (),
        noise_seeds=meta.noise_seeds)


def ego_displacement(memory: TemporalMemory | None, meta: FrameMeta) -> Tensor:
    """[B, 3] float64 global motion since the previous frame, 0 where a sequence starts or nothing is known."""
    if memory is None:
        return torch.zeros_like(meta.ego_translation)
    moved = meta.ego_translation - memory.ego_translation
    return torch.where(torch.tensor(meta.starts)[:, None], 0, moved)
