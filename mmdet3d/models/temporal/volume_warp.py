"""Re-sampling of a remembered volume into the current ego frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdet3d.structures import VoxelGrid
from mmdet3d.utils.precision import full_precision
from mmdet3d.utils.remember import remembered


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


def previous_index_from_index(grids: Sequence[VoxelGrid], previous_bda: Tensor, previous_ego_from_ego: Tensor,
                              bda: Tensor, corner_origin: bool = True) -> Tensor:
    """[G, B, 4, 4] float32 matrices: voxel index now -> (fractional) voxel index in the previous frame's volume.

    Args:
        grids: The G voxel grids.
        previous_bda: [B, 4, 4] BEV augmentation of the previous frame.
        previous_ego_from_ego: [B, 4, 4] current to previous ego.
        bda: [B, 4, 4] BEV augmentation of the current frame.
        corner_origin: See :func:`metric_from_index`.
    """
    metric, index = _grid_frames(tuple(grids), corner_origin, bda.device)
    ego_from_ego = previous_bda.double() @ previous_ego_from_ego.double() @ _inverse(bda)
    return (index @ ego_from_ego @ metric).float()


@remembered
def _grid_frames(grids: tuple[VoxelGrid, ...], corner_origin: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """[G, 1, 4, 4] :func:`metric_from_index` of the grids, and its inverse."""
    metric = torch.stack([metric_from_index(grid, device, corner_origin) for grid in grids])[:, None]
    return metric, torch.linalg.inv(metric)


@remembered
def _inverse(matrices: Tensor) -> Tensor:
    """Inverse of [B, 4, 4] in float64."""
    return torch.linalg.inv(matrices.double())


@full_precision
def gather_rows(rows: Tensor, taps: tuple[Tensor, Tensor]) -> Tensor:
    """[V, F] weighted sums of rows [V, F], differentiable in ``rows``.

    Args:
        rows: [V, F] features of the voxels.
        taps: Indices and weights [V, 8] of :func:`mmdet3d.ops.history_warp.trilinear_taps`.
    """
    index, weight = taps
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.embedding_bag(index, rows, per_sample_weights=weight.to(rows.dtype), mode="sum")
