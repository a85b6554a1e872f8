"""Plain PyTorch version of the plane sweep: what the compiled versions are judged by."""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Channels that are warped at once, to bound memory; each group is summed, then added to the running total.
CHANNEL_GROUP = 4

#: Normalised coordinate that lies outside the map, neighbouring taps included, for every map size.
_OUTSIDE = -3.0


def sweep_positions(
    infinite_homography: Tensor, epipole: Tensor, depths: Tensor, size: tuple[int, int], min_depth: float
) -> tuple[Tensor, Tensor]:
    """Where each pixel of the current map lands in the reference map, for each depth.

    Computed in float64, because a position near a pixel border decides which pixels are read.

    Args:
        infinite_homography: (N, 3, 3), see :func:`mmdet3d.ops.plane_sweep.plane_sweep`.
        epipole: (N, 3).
        depths: (D,) in metres.
        size: (H, W) of both maps.
        min_depth: Least depth in the reference camera, in metres.

    Returns:
        (N, D, H, W, 2) float64 positions (x, y) in pixels, and (N, D, H, W) bool, true where the position is
        in front of the camera and at least one of the pixels that it would be interpolated from is in the map.
    """
    height, width = size
    homography, epipole, depths = infinite_homography.double(), epipole.double(), depths.double()
    x = torch.arange(width, device=depths.device, dtype=depths.dtype)
    y = torch.arange(height, device=depths.device, dtype=depths.dtype)[:, None]
    h = homography[:, :, :, None, None]  # (N, 3, 3, 1, 1)
    at_infinity = h[:, :, 0] * x + h[:, :, 1] * y + h[:, :, 2]  # (N, 3, H, W)
    depths = depths[:, None, None, None]
    point = depths * at_infinity[:, None] + epipole[:, None, :, None, None]  # (N, D, 3, H, W)
    px, py = point[:, :, 0] / point[:, :, 2], point[:, :, 1] / point[:, :, 2]
    inside = (point[:, :, 2] >= min_depth) & (px > -1) & (px < width) & (py > -1) & (py < height)
    return torch.stack([px, py], dim=-1), inside


def plane_sweep_reference(
    current: Tensor,
    reference: Tensor,
    infinite_homography: Tensor,
    epipole: Tensor,
    depths: Tensor,
    *,
    invalid_channel: int | None,
    invalid_by_position: bool = False,
    invalid_penalty: float = 5.0,
    min_depth: float = 1e-3,
) -> Tensor:
    """Same contract as :func:`mmdet3d.ops.plane_sweep.plane_sweep`, without its checks."""
    batch, channels, height, width = current.shape
    dtype = torch.promote_types(current.dtype, torch.float32)
    cost = current.new_zeros((batch, depths.numel(), height, width), dtype=dtype)
    if cost.numel() == 0:
        return cost
    positions, inside = sweep_positions(infinite_homography, epipole, depths, (height, width), min_depth)
    # Any corner rule can express a position in pixels; this one also holds for a map of width 1.
    grid = (2 * positions + 1) / positions.new_tensor([width, height]) - 1
    grid = torch.where(inside[..., None], grid, _OUTSIDE).to(dtype).flatten(1, 2)  # (N, D * H, W, 2)
    for first in range(0, channels, CHANNEL_GROUP):
        group = slice(first, first + CHANNEL_GROUP)
        warped = F.grid_sample(
            reference[:, group].to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        ).view(batch, -1, *cost.shape[1:])  # (N, 4, D, H, W)
        cost += (current[:, group, None].to(dtype) - warped).abs().sum(dim=1)
        if invalid_channel is not None and first <= invalid_channel < first + CHANNEL_GROUP:
            invalid = warped[:, invalid_channel - first] == 0
    if invalid_by_position:
        invalid = ~inside
    if invalid_by_position or invalid_channel is not None:
        cost += invalid_penalty * invalid
    return cost
