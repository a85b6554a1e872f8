"""Re-sampling of a remembered volume into the current ego frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdet3d.structures import VoxelGrid
from mmdet3d.utils.precision import full_precision


def metric_from_index(grid: VoxelGrid, device: torch.device, corner_origin: bool = True) -> Tensor:
    """[4, 4] float64 matrix voxel index (x, y, z) -> metres.

    Args:
        grid: The voxel grid.
        device: Where the matrix shall be.
        corner_origin: An index stands for the voxel's lower corner, as the released weights expect; False: its centre.
    """
    matrix = torch.diag(torch.tensor([*grid.cell, 1.0], dtype=torch.float64, device=device))
    cell = torch.tensor(grid.cell, dtype=torch.float64, device=device)
    matrix[:3, 3] = torch.tensor(grid.low, dtype=torch.float64, device=device) + (0 if corner_origin else cell / 2)
    return matrix


def previous_index_from_index(grid: VoxelGrid, previous_bda: Tensor, previous_ego_from_ego: Tensor, bda: Tensor,
                              corner_origin: bool = True) -> Tensor:
    """[B, 4, 4] float32 matrix: voxel index now -> (fractional) voxel index in the previous frame's volume.

    Args:
        grid: The voxel grid.
        previous_bda: [B, 4, 4] BEV augmentation of the previous frame.
        previous_ego_from_ego: [B, 4, 4] current to previous ego.
        bda: [B, 4, 4] BEV augmentation of the current frame.
        corner_origin: See :func:`metric_from_index`.
    """
    metric = metric_from_index(grid, bda.device, corner_origin)
    ego_from_ego = previous_bda.double() @ previous_ego_from_ego.double() @ torch.linalg.inv(bda.double())
    return (torch.linalg.inv(metric) @ ego_from_ego @ metric).float()


@full_precision
def trilinear_taps(matrix: Tensor, size_zyx: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The eight voxels, and their weights, that each voxel of a warped volume is interpolated from.

    Args:
        matrix: [4, 4] target voxel index -> source voxel index.
        size_zyx: (Z, Y, X) of both volumes.

    Returns:
        Flat source indices [V, 8] int64 and weights [V, 8]. A tap outside the volume has weight 0 (and some valid
        index), so that space beyond the volume counts as zeros.
    """
    num_z, num_y, num_x = size_zyx
    axes = [torch.arange(n, device=matrix.device, dtype=matrix.dtype) for n in size_zyx]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    target = torch.stack([x, y, z, torch.ones_like(x)], -1).flatten(0, 2)  # [V, 4]
    source = target @ matrix[:3].T  # [V, 3] (x, y, z)
    low = source.floor()
    fraction = source - low
    index, weight = source.new_zeros(1, dtype=torch.long), source.new_ones(1)
    # Nested from z to x, so that index = (z * Y + y) * X + x.
    for axis, count in ((2, num_z), (1, num_y), (0, num_x)):
        position = torch.stack([low[:, axis], low[:, axis] + 1], -1)  # [V, 2]
        share = torch.stack([1 - fraction[:, axis], fraction[:, axis]], -1)
        share = torch.where((position >= 0) & (position < count), share, 0)
        position = position.clamp(0, count - 1).long()
        index = (index[..., None] * count + position[:, None]).flatten(1)
        weight = (weight[..., None] * share[:, None]).flatten(1)
    return index, weight


@full_precision
def gather_rows(rows: Tensor, taps: tuple[Tensor, Tensor]) -> Tensor:
    """Weighted sums of rows [V, F] for taps [V, 8] of :func:`trilinear_taps`: [V, F], differentiable in ``rows``."""
    index, weight = taps
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.embedding_bag(index, rows, per_sample_weights=weight.to(rows.dtype), mode="sum")
