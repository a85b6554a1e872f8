"""Shape contracts shared by all parts: the voxel grid, and what is remembered from frame to frame."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


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
