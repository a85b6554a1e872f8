"""The steps of ``frustum_cells`` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdet3d.structures import VoxelGrid

from ..plane_sweep.geometry import ordered_product

if TYPE_CHECKING:
    from .frustum_cells import FrustumGeometry


def frustum_cells_reference(cameras: FrustumGeometry, columns: Tensor, rows: Tensor, depths: Tensor, grid: VoxelGrid,
                            *, truncate_toward_zero: bool = True) -> Tensor:
    """Same contract as :func:`mmdet3d.ops.frustum_cells.frustum_cells`, without its checks."""
    shape = (*cameras.offset.shape[:2], len(depths), len(rows), len(columns))
    linear, offset, rotation, translation, bda = (
        tensor.flatten(0, 1)[..., None, None, None]
        for tensor in (*cameras[:4], cameras.bda[:, None].expand(-1, shape[1], -1, -1)))  # (B * N, ..., 1, 1, 1)
    depths = depths[:, None, None]
    x, y = ordered_product(linear, (columns - offset[:, 0], rows[:, None] - offset[:, 1]))  # (B * N, 1, h, w)
    point = _transform(rotation, translation, (x * depths, y * depths, depths))
    point = _transform(bda[:, :3, :3], bda[:, :3, 3], point)
    cells, inside = 0, True
    for position, low, edge, size in reversed(list(zip(point, grid.low, grid.cell, grid.size_xyz, strict=True))):
        # By a tensor: CUDA divides by a number less exactly.
        position = (position - low) / depths.new_full((), edge)
        position = position.trunc() if truncate_toward_zero else position.floor()
        inside = (position >= 0) & (position < size) & inside
        # Clamped before the conversion, because a float beyond the integer range has no defined integer.
        cells = cells * size + position.clamp(-1, size).to(torch.int32)
    return torch.where(inside, cells, -1).view(shape)


def _transform(matrix: Tensor, translation: Tensor, point: Sequence[Tensor]) -> list[Tensor]:
    """Matrix (M, 3, 3, 1, 1, 1) times point plus translation (M, 3, 1, 1, 1), 3 x (M, D, h, w)."""
    return [p + t for p, t in zip(ordered_product(matrix, point), translation.unbind(1), strict=True)]
