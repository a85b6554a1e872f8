"""Where the 3D reference points of the BEV queries appear in the cameras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdet3d.ops import project_points
from mmdet3d.utils.precision import full_precision

MIN_DEPTH = 1e-5


class CameraAnchors(NamedTuple):
    """Z anchors above every BEV query, seen by N cameras.

    Attributes:
        position: [N, B, Q, Z, 2] normalised image position (x, y) that the attention samples around.
        depth: [N, B, Q, Z] metres along the optical axis.
        valid: [N, B, Q, Z] whether the anchor lies in front of the camera and its position within (0, 1).
    """

    position: Tensor
    depth: Tensor
    valid: Tensor


def anchor_points(bev_size: tuple[int, int], num_heights: int, pc_range: Sequence[float], *,
                  legacy_heights: bool = True) -> Tensor:
    """Anchors of a Y x X bird's-eye view in the ego frame, metres: [Y * X, Z, 4] homogeneous.

    Args:
        bev_size: (Y, X).
        num_heights: Z anchors per query.
        pc_range: (x, y, z) lower then upper bounds in metres.
        legacy_heights: Heights run evenly from 0.5 m above the lower to 0.5 m below the upper bound, whatever the
            voxel size, as the released weights expect. False: voxel centres.
    """
    height, width = bev_size
    low, extent = pc_range[:3], [hi - lo for lo, hi in zip(pc_range[:3], pc_range[3:], strict=True)]
    if legacy_heights:
        z = torch.linspace(0.5, extent[2] - 0.5, num_heights) / extent[2]
    else:
        z = (torch.arange(num_heights) + 0.5) / num_heights
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    y, x, z = torch.meshgrid(y, x, z, indexing="ij")  # [Y, X, Z] each
    metric = [axis * size + start for axis, size, start in zip((x, y, z), extent, low, strict=True)]
    return torch.stack([*metric, torch.ones_like(x)], -1).flatten(0, 1)


@full_precision
def project_anchors(points: Tensor, image_from_ego: Tensor, image_size: tuple[int, int], *,
                    legacy_axis_swap: bool = True) -> CameraAnchors:
    """Project anchors into all cameras.

    Args:
        points: [Q, Z, 4] homogeneous points in the (augmented) ego frame, metres.
        image_from_ego: [B, N, 4, 4] to augmented pixels times depth.
        image_size: (H, W) of the network image.
        legacy_axis_swap: Divide u by the height and v by the width, as the released weights expect. This also decides
            which anchors count as valid. False: u by the width and v by the height.
    """
    height, width = image_size
    span = (height, width) if legacy_axis_swap else (width, height)
    return CameraAnchors(*project_points(points, image_from_ego, span, MIN_DEPTH))
