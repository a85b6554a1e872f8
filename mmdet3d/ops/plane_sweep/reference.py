"""Plain PyTorch version of the plane sweep: what the compiled versions are judged by."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import SweepGeometry, sweep_positions

#: Channels that are warped at once, to bound memory; each group is summed, then added to the running total.
CHANNEL_GROUP = 4


def plane_sweep_reference(
    current: Tensor,
    reference: Tensor,
    geometry: SweepGeometry,
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
    grid, inside = sweep_positions(geometry, depths, (height, width), min_depth, dtype)
    grid = torch.where(inside[..., None], grid, 0).flatten(1, 2)  # (N, D * H, W, 2)
    for first in range(0, channels, CHANNEL_GROUP):
        group = slice(first, first + CHANNEL_GROUP)
        warped = F.grid_sample(
            reference[:, group].to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=True
        ).view(batch, -1, *cost.shape[1:])  # (N, 4, D, H, W)
        # No coordinate could say "outside" instead: in a map one pixel wide, every one means that pixel.
        warped = torch.where(inside[:, None], warped, 0)
        cost += (current[:, group, None].to(dtype) - warped).abs().sum(dim=1)
        if invalid_channel is not None and first <= invalid_channel < first + CHANNEL_GROUP:
            invalid = warped[:, invalid_channel - first] == 0
    if invalid_by_position:
        invalid = ~inside
    if invalid_by_position or invalid_channel is not None:
        cost += invalid_penalty * invalid
    return cost
