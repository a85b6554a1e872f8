"""The steps of ``history_warp`` in plain PyTorch."""

import torch
from torch import Tensor


def trilinear_taps(matrix: Tensor, size_zyx: tuple[int, int, int], voxels: Tensor | None = None
                   ) -> tuple[Tensor, Tensor]:
    """The eight voxels, and their weights, that each voxel of a warped volume is interpolated from.

    Every product and every sum is rounded to the dtype of ``matrix``, in the order in which they are written, so that
    all devices agree. Autocast does not touch them.

    Args:
        matrix: [4, 4] target voxel index (x, y, z) -> source voxel index; float32 or float64.
        size_zyx: (Z, Y, X) of both volumes.
        voxels: [K] flat indices ``(z * Y + y) * X + x`` of target voxels; all Z * Y * X, in order, by default.

    Returns:
        Flat source indices [K, 8] int64 and weights [K, 8]. A tap outside the volume has weight 0 (and some valid
        index), so that space beyond the volume counts as zeros.
    """
    num_z, num_y, num_x = size_zyx
    if voxels is None:
        voxels = torch.arange(num_z * num_y * num_x, device=matrix.device)
    x, y, z = voxels % num_x, voxels // num_x % num_y, voxels // (num_x * num_y)
    x, y, z = (coordinate.to(matrix.dtype) for coordinate in (x, y, z))
    index, weight = voxels.new_zeros(1), matrix.new_ones(1)
    # Nested from z to x, so that index = (z * Y + y) * X + x.
    for axis, count in ((2, num_z), (1, num_y), (0, num_x)):
        row = matrix[axis]
        source = row[0] * x + row[1] * y + row[2] * z + row[3]
        low = source.floor()
        fraction = source - low
        position = torch.stack([low, low + 1], -1)  # [K, 2]
        inside = (position >= 0) & (position < count)
        share = torch.where(inside, torch.stack([1 - fraction, fraction], -1), 0)
        position = torch.where(inside, position, 0).long()
        index = (index[..., None] * count + position[:, None]).flatten(1)
        weight = (weight[..., None] * share[:, None]).flatten(1)
    return index, weight


def history_warp_reference(history: Tensor, matrix: Tensor, size_zyx: tuple[int, int, int], *,
                           oldest_at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of :func:`mmdet3d.ops.history_warp`, by an index and a sum per tap; slot 0 is zero."""
    accumulate = torch.promote_types(history.dtype, torch.float32)
    matrix = matrix.to(accumulate)
    new = torch.zeros_like(history, memory_format=torch.contiguous_format)
    for past, volume, warp in zip(history, new, matrix, strict=True):
        volume[:, 1:] = _sum_taps(past[:, :-1], *trilinear_taps(warp, size_zyx), accumulate)
    if oldest_at is None:
        return new, None
    rows = [_sum_taps(past[:, -1], *trilinear_taps(warp, size_zyx, voxels), accumulate)
            for past, warp, voxels in zip(history, matrix, oldest_at, strict=True)]
    empty = history.new_zeros(0, oldest_at.shape[1], history.shape[3])
    return new, torch.stack(rows).to(history.dtype) if rows else empty


def _sum_taps(rows: Tensor, index: Tensor, weight: Tensor, accumulate: torch.dtype) -> Tensor:
    """[K, ...] weighted sums of rows [V, ...], tap after tap."""
    total = torch.zeros(len(index), *rows.shape[1:], dtype=accumulate, device=rows.device)
    for tap in range(index.shape[1]):
        share = weight[:, tap].view(-1, *[1] * (rows.dim() - 1))
        total += share * rows[index[:, tap]].to(accumulate)
    return total
