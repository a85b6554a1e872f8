"""BEVPoolv2 in plain PyTorch: what the compiled versions are judged by, and what runs where they are not built."""

import math

import torch
from torch import Tensor


def voxel_of_point(cell_index: Tensor, num_cells: int) -> Tensor:
    """Flat index ``b * num_cells + cell`` of the voxel of each frustum point, ``B * num_cells`` for points outside.

    Args:
        cell_index: (B, N, D, H, W) integers; values outside [0, num_cells) mean outside.
        num_cells: Z * Y * X.

    Returns:
        (B * N * D * H * W,) int64.
    """
    batch = cell_index.shape[0]
    inside = (cell_index >= 0) & (cell_index < num_cells)
    sample = torch.arange(batch, device=cell_index.device).view(-1, 1, 1, 1, 1)
    return torch.where(inside, cell_index + sample * num_cells, batch * num_cells).flatten()


def sort_by_cell_reference(cell_index: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Points in stable order of their voxel, and where each voxel's points start (see ``PoolOrder``)."""
    voxel, points = torch.sort(voxel_of_point(cell_index, num_cells).int(), stable=True)
    voxels = torch.arange(cell_index.shape[0] * num_cells + 1, dtype=torch.int32, device=cell_index.device)
    return points.int(), torch.searchsorted(voxel, voxels, out_int32=True)


def bev_pool_v2_reference(
    depth: Tensor, context: Tensor, cell_index: Tensor, grid_size: tuple[int, int, int]
) -> Tensor:
    """Sum ``depth * context`` over the points of each voxel; same contract as ``bev_pool_v2``."""
    batch, channels, num_cells = depth.shape[0], context.shape[-1], math.prod(grid_size)
    # Half precision is summed in float32, as the kernels do.
    dtype = depth.dtype if depth.dtype == torch.float64 else torch.float32
    values = depth.to(dtype).unsqueeze(-1) * context.to(dtype).unsqueeze(2)  # (B, N, D, H, W, C)
    # The last row collects the points outside, so that no shape depends on the data.
    volume = values.new_zeros(batch * num_cells + 1, channels)
    volume = volume.index_add(0, voxel_of_point(cell_index, num_cells), values.flatten(0, 4))
    volume = volume[:-1].view(batch, *grid_size, channels).permute(0, 4, 1, 2, 3)
    return volume.to(depth.dtype).contiguous()
