"""Shape contracts shared by all parts: the voxel grid, a batch of frames, and the memory from frame to frame."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

META_KEYS = ("sequence_group_idx", "start_of_sequence", "curr_to_prev_ego_rt", "can_bus", "lidar2img", "ego2lidar")
"""Entries of ``img_metas`` that the model needs; ``noise_seed`` and ``image_keys`` are optional."""
CAN_BUS_LENGTH = 18


def _whole_steps(low: float, high: float, step: float) -> int | None:
    """Number of steps from low to high, at least 1; None unless it is whole, but for rounding."""
    count = (high - low) / step if step > 0 else 0
    return round(count) if round(count) >= 1 and abs(round(count) - count) <= 1e-3 else None


def depth_bins(depth_range: Sequence[float]) -> int:
    """Number of depth bins D of (low, high, step) in metres; bin i begins at ``low + i * step``.

    Raises:
        ValueError: these are not three numbers, or they hold no whole number of bins.
    """
    values = tuple(depth_range) if isinstance(depth_range, Sequence) else ()
    if len(values) != 3 or (bins := _whole_steps(*values)) is None:
        raise ValueError(f"depth must be [low, high, step] with a whole number of bins, got {depth_range}")
    return bins


@dataclass(frozen=True)
class VoxelGrid:
    """Axis-aligned voxels in the ego frame (x forward, y left, z up).

    Attributes:
        low: Lower bounds (x, y, z) in metres.
        high: Upper bounds (x, y, z) in metres.
        cell: Edge lengths (x, y, z) of a voxel in metres.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    cell: tuple[float, float, float]

    @classmethod
    def from_config(cls, grid_config: Mapping) -> VoxelGrid:
        """Grid of a ``grid_config`` dict whose ``x``, ``y`` and ``z`` are ``[low, high, cell]`` in metres.

        Raises:
            ValueError: an axis is missing, has not three numbers, or holds no whole number of voxels.
        """
        axes = []
        for axis in "xyz":
            if axis not in grid_config or len(grid_config[axis]) != 3:
                raise ValueError(f"grid_config needs {axis}=[low, high, cell], got {grid_config.get(axis)}")
            low, high, cell = (float(v) for v in grid_config[axis])
            if _whole_steps(low, high, cell) is None:
                raise ValueError(f"grid_config {axis}=[{low}, {high}, {cell}] holds no whole number of voxels")
            axes.append((low, high, cell))
        return cls(*(tuple(values) for values in zip(*axes, strict=True)))

    @property
    def size_xyz(self) -> tuple[int, int, int]:
        """Number of voxels (X, Y, Z)."""
        x, y, z = (round((h - lo) / c) for lo, h, c in zip(self.low, self.high, self.cell, strict=True))
        return x, y, z

    @property
    def size_zyx(self) -> tuple[int, int, int]:
        """Number of voxels (Z, Y, X), the axis order of feature volumes."""
        return self.size_xyz[::-1]

    @property
    def num_voxels(self) -> int:
        """Number of voxels X * Y * Z."""
        x, y, z = self.size_xyz
        return x * y * z

    def coarsen(self, factor: int) -> VoxelGrid:
        """Same bounds, voxels ``factor`` times larger along every axis.

        Raises:
            ValueError: an axis does not divide by ``factor``.
        """
        if any(n % factor for n in self.size_xyz):
            raise ValueError(f"cannot coarsen {self.size_xyz} (X, Y, Z) voxels by {factor}")
        return replace(self, cell=tuple(c * factor for c in self.cell))


@dataclass(frozen=True)
class CameraInputs:
    """Images and cameras of a batch: N cameras at F frames, newest first. Matrices are on the CPU, where they are read.

    Attributes:
        images: [B, N, F, 3, H, W] on any device: normalised floats, or uint8 pixels (blue, green, red).
        ego_from_sensor: [B, F, N, 4, 4].
        global_from_ego: [B, F, N, 4, 4], of the ego at the time of each image.
        intrinsics: [B, F, N, 4, 4] pinhole matrices of the original images, in pixels.
        post_aug: [B, F, N, 4, 4] image augmentations.
        bda: [B, 4, 4] BEV augmentation.
    """

    images: Tensor
    ego_from_sensor: Tensor
    global_from_ego: Tensor
    intrinsics: Tensor
    post_aug: Tensor
    bda: Tensor

    @classmethod
    def from_img_inputs(cls, img_inputs: Sequence[Tensor], num_cams: int, num_frames: int,
                        image_size: tuple[int, int] | None = None) -> CameraInputs:
        """Name, check and unflatten the six tensors of mmdet-style batches; matrices come to the CPU.

        Args:
            img_inputs: images [B, N * F, 3, H, W] camera-major; sensor2ego, ego2global, intrinsics and post_aug
                [B, F * N, 4, 4] frame-major; bda [B, 4, 4].
            num_cams: N.
            num_frames: F.
            image_size: (H, W) that the images must have; None for any.

        Raises:
            ValueError: these are not six tensors, one does not hold N * F entries, the tensors do not agree in B, or
                the images have another size.
        """
        if len(img_inputs) != 6:
            raise ValueError("expected six img_inputs (images, sensor2ego, ego2global, intrinsics, post_aug, bda), got "
                             f"{len(img_inputs)} img_inputs")
        images, *matrices = img_inputs
        batch, total = images.shape[0], num_cams * num_frames
        if images.dim() != 5 or images.shape[1] != total:
            raise ValueError(f"img_inputs[0] (images) must be [B, {total} = {num_cams} cameras x {num_frames} frames, "
                             f"3, H, W], got {tuple(images.shape)}")
        if image_size is not None and images.shape[2:] != (3, *image_size):
            raise ValueError(f"img_inputs[0] (images) must have 3 channels and the model's input_size (H, W) = "
                             f"{tuple(image_size)}, got {tuple(images.shape)} [B, N * F, 3, H, W]")
        names = ("sensor2ego", "ego2global", "intrinsics", "post_aug", "bda")
        for position, (name, matrix) in enumerate(zip(names, matrices, strict=True), 1):
            shape = (batch, 4, 4) if name == "bda" else (batch, total, 4, 4)
            if matrix.shape != shape:
                raise ValueError(f"img_inputs[{position}] ({name}) must be {shape}, got {tuple(matrix.shape)}")
        *matrices, bda = _on_host(matrices)
        return cls(images.unflatten(1, (num_cams, num_frames)),
                   *(matrix.unflatten(1, (num_frames, num_cams)) for matrix in matrices), bda)


def _on_host(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The matrices on the CPU; those on a device come in one transfer, which waits for the device."""
    matrices = list(matrices)
    remote = [i for i, matrix in enumerate(matrices) if matrix.device.type != "cpu"]
    if remote:
        values = torch.cat([matrices[i].detach().flatten() for i in remote]).cpu()
        for i, part in zip(remote, values.split([matrices[i].numel() for i in remote]), strict=True):
            matrices[i] = part.view(matrices[i].shape).to(matrices[i].dtype)
    return matrices


@dataclass(frozen=True)
class FrameMeta:
    """Meta data of a batch, read from ``img_metas``; all tensors are on the CPU.

    Attributes:
        sequence_ids: B sequence numbers.
        starts: Whether a sequence starts, per sample.
        previous_ego_from_ego: [B, 4, 4] float32 current to previous ego.
        ego_translation: [B, 3] float64 position in the global frame, metres.
        yaw: [B] float64 heading in radians.
        image_from_ego: [B, N, 4, 4] float32 ego to augmented pixels times depth.
        noise_seeds: [B] int32 seeds of the flow head's noise in evaluation; None where samples bring no ``noise_seed``.
        image_keys: For each sample, a key of the images of each frame, newest first, from ``image_keys``: equal keys
            promise equal images after augmentation. None where samples bring none.
    """

    sequence_ids: tuple[int, ...]
    starts: tuple[bool, ...]
    previous_ego_from_ego: Tensor
    ego_translation: Tensor
    yaw: Tensor
    image_from_ego: Tensor
    noise_seeds: Tensor | None = None
    image_keys: tuple[tuple[Hashable, ...], ...] | None = None

    @classmethod
    def from_metas(cls, img_metas: Sequence[Mapping], num_cams: int | None = None) -> FrameMeta:
        """Stack the meta data of a batch; the dicts stay as they are.

        Args:
            img_metas: One dict per sample, with at least :data:`META_KEYS`.
            num_cams: Cameras N; None takes any number that is the same for all samples.

        Raises:
            ValueError: there is no sample, a key is missing, a sequence number is negative, or a value has the wrong
                shape.
        """
        if not img_metas:
            raise ValueError("img_metas is empty; it needs one dict per sample")
        require_meta(img_metas, META_KEYS)
        for position, meta in enumerate(img_metas):
            if int(meta["sequence_group_idx"]) < 0:
                raise ValueError(f"img_metas[{position}]: sequence_group_idx must not be negative, "
                                 f"got {meta['sequence_group_idx']}")
        can_bus = _stack(img_metas, "can_bus", [(CAN_BUS_LENGTH,)], torch.float64)
        num_cams = len(img_metas[0]["lidar2img"]) if num_cams is None else num_cams
        image_from_lidar = _stack(img_metas, "lidar2img", [(num_cams, 4, 4)])
        lidar_from_ego = _stack(img_metas, "ego2lidar", [(1, 4, 4), (4, 4)])
        with torch.autocast("cpu", enabled=False):  # half precision would move points by metres
            image_from_ego = image_from_lidar @ lidar_from_ego  # [B, N, 4, 4] @ [B, 1, 4, 4]
        seeds, keys = ([meta.get(name) for meta in img_metas] for name in ("noise_seed", "image_keys"))
        return cls(
            sequence_ids=tuple(int(meta["sequence_group_idx"]) for meta in img_metas),
            starts=tuple(bool(meta["start_of_sequence"]) for meta in img_metas),
            previous_ego_from_ego=_stack(img_metas, "curr_to_prev_ego_rt", [(4, 4)]),
            ego_translation=can_bus[:, :3],
            yaw=can_bus[:, -2],
            image_from_ego=image_from_ego,
            noise_seeds=None if None in seeds else torch.tensor([int(seed) for seed in seeds], dtype=torch.int32),
            image_keys=None if any(key is None for key in keys) else tuple(map(tuple, keys)))


def require_meta(img_metas: Sequence[Mapping], keys: Sequence[str], unless: str | None = None) -> None:
    """Refuse meta data that lack an entry; samples with the entry ``unless`` need none.

    Raises:
        ValueError: a dict lacks some of ``keys``; the message names it and them.
    """
    for position, meta in enumerate(img_metas):
        missing = [key for key in keys if key not in meta]
        if missing and (unless is None or meta.get(unless) is None):
            raise ValueError(f"img_metas[{position}] lacks {missing}; it has {sorted(meta)}")


def _stack(img_metas: Sequence[Mapping], key: str, shapes: Sequence[tuple[int, ...]],
           dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, *shapes[0]] values of ``key`` on the CPU; each must have one of ``shapes``, all of the same number."""
    values = []
    for position, meta in enumerate(img_metas):
        value = torch.as_tensor(np.asarray(meta[key]), dtype=dtype)
        if tuple(value.shape) not in shapes:
            raise ValueError(f"img_metas[{position}]: {key} must have the shape "
                             f"{' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
        values.append(value.reshape(shapes[0]))
    return torch.stack(values)


@dataclass(frozen=True)
class FrameCache:
    """Image features of the newest frame in evaluation: at the next frame it is one of the earlier ones.

    Attributes:
        keys: For each batch slot, keys of the pictures of the newest frame and of the one before it; equal keys promise
            equal pictures.
        stereo: [B * N, C4, H4, W4] stereo features.
        neck: [B * N, C, h, w] features of the neck.
        matching: [B * N, D, h, w] stereo matching with the frame before; None without stereo.
        sweep: Cameras that ``matching`` was computed with, on the CPU (a ``SweepGeometry``); None without stereo.
    """

    keys: tuple[tuple[Hashable, Hashable], ...]
    stereo: Tensor
    neck: Tensor
    matching: Tensor | None
    sweep: Any

    def to(self, device: torch.device | str) -> FrameCache:
        """The same features on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def clone(self) -> FrameCache:
        """A copy that shares no features."""
        return self._map(torch.clone)

    def narrow(self, count: int) -> FrameCache:
        """Those of the first ``count`` batch slots."""
        entries = count * (len(self.stereo) // len(self.keys))
        sweep = self.sweep
        if sweep is not None:
            sweep = type(sweep)(*(v[:entries] if isinstance(v, Tensor) else v for v in sweep))
        return replace(self._map(lambda tensor: tensor[:entries]), keys=self.keys[:count], sweep=sweep)

    def _map(self, function: Callable[[Tensor], Tensor]) -> FrameCache:
        tensors = {name: getattr(self, name) for name in ("stereo", "neck", "matching")}
        return replace(self, **{name: None if t is None else function(t) for name, t in tensors.items()})


@dataclass(frozen=True)
class TemporalMemory:
    """What the model remembers of the frames before: a value that goes in and comes out of a forward pass.

    Attributes:
        histories: One tensor per stage, finest first, [B, V, T * C]: for each of the V voxels (flat index
            ``(z * Y + y) * X + x``) the fused features of T frames, newest first. No gradient; float32, or the dtype
            of autocast if the frame was computed with it.
        sizes: (Z, Y, X) of each stage.
        channels: C.
        bda: [B, 4, 4] BEV augmentation of the newest frame, on the CPU.
        sequence_ids: [B] int64 sequence that each batch slot follows, on the CPU.
        ego_translation: [B, 3] float64 position of the ego vehicle in the global frame at the newest frame, metres, on
            the CPU.
        features: Image features that the next frame needs again; None in training, and where the samples do not say
            which pictures they hold. Not part of :meth:`state_dict`.
    """

    histories: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int, int], ...]
    channels: int
    bda: Tensor
    sequence_ids: Tensor
    ego_translation: Tensor
    features: FrameCache | None = None

    @property
    def batch_size(self) -> int:
        """Number of batch slots B."""
        return self.sequence_ids.shape[0]

    def history_volume(self, stage: int) -> Tensor:
        """[B, T * C, Z, Y, X] view of the history of ``stage`` (0 = finest), slot after slot, newest first."""
        history = self.histories[stage]
        return history.unflatten(1, self.sizes[stage]).permute(0, 4, 1, 2, 3)

    def newest_volume(self, stage: int) -> Tensor:
        """[B, C, Z, Y, X] view of the newest slot: the fused volume that ``stage`` produced at the frame before."""
        return self.history_volume(stage)[:, : self.channels]

    def to(self, device: torch.device | str) -> TemporalMemory:
        """The same memory with histories and features on another device; the small host-side entries stay."""
        return replace(self, histories=tuple(h.to(device) for h in self.histories),
                       features=None if self.features is None else self.features.to(device))

    def in_precision(self, dtype: torch.dtype | None) -> TemporalMemory:
        """The same memory as steps under autocast to ``dtype`` keep it; None: without autocast. See ``histories``."""
        return replace(self, histories=tuple(
            h.to(torch.promote_types(h.dtype, torch.float32) if dtype is None else dtype) for h in self.histories))

    def narrow(self, count: int) -> TemporalMemory:
        """Views of the first ``count`` batch slots: for a batch from which the last sequences have disappeared.

        Raises:
            ValueError: ``count`` is not in 1..B.
        """
        if not 1 <= count <= self.batch_size:
            raise ValueError(f"cannot take {count} of {self.batch_size} batch slots")
        tensors = {name: getattr(self, name)[:count] for name in ("bda", "sequence_ids", "ego_translation")}
        return replace(self, histories=tuple(h[:count] for h in self.histories), **tensors,
                       features=None if self.features is None else self.features.narrow(count))

    def clone(self) -> TemporalMemory:
        """A copy that shares no storage."""
        tensors = {name: getattr(self, name).clone() for name in ("bda", "sequence_ids", "ego_translation")}
        return replace(self, histories=tuple(h.clone() for h in self.histories), **tensors,
                       features=None if self.features is None else self.features.clone())

    def state_dict(self) -> dict:
        """Plain tensors and tuples, for checkpoints; :meth:`from_state_dict` is the inverse."""
        return {name: getattr(self, name) for name in _SAVED}

    @classmethod
    def from_state_dict(cls, state: Mapping) -> TemporalMemory:
        """Memory of what :meth:`state_dict` gave.

        Raises:
            ValueError: keys are missing or unknown.
        """
        if set(state) != set(_SAVED):
            raise ValueError(f"temporal memory needs {sorted(_SAVED)}, got {sorted(state)}")
        host = {name: state[name].cpu() for name in ("bda", "sequence_ids", "ego_translation")}
        return cls(**{**state, **host, "histories": tuple(state["histories"]),
                      "sizes": tuple(tuple(size) for size in state["sizes"])})


_SAVED = tuple(name for name in TemporalMemory.__dataclass_fields__ if name != "features")
