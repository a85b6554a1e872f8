"""Supervision of the depth distribution by projected LiDAR points.

Li et al., "BEVDepth: Acquisition of Reliable Depth for Multi-view 3D Object Detection", AAAI 2023, arXiv 2206.10092.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet3d.structures import depth_bins


def depth_targets(gt_depth: Tensor, downsample: int, depth_range: Sequence[float]) -> Tensor:
    """Depth bin of each block of pixels, from the nearest point in it.

    Args:
        gt_depth: [..., H, W] depth of the point in a pixel along the optical axis in metres, 0 where there is none.
        downsample: Edge of a block in pixels; divides H and W.
        depth_range: (low, high, step) in metres: bin i holds the depths [low + i * step, low + (i + 1) * step).

    Returns:
        [..., H / downsample, W / downsample] int64, 0..D-1 with D = (high - low) / step, or -1 if the nearest point
        is out of range or there is none.

    Raises:
        ValueError: H or W is not a multiple of ``downsample``, or ``depth_range`` holds no whole number of bins.
    """
    height, width = gt_depth.shape[-2:]
    if height % downsample or width % downsample:
        raise ValueError(f"gt_depth [..., H, W] must be a multiple of downsample={downsample}, got {height} x {width}")
    num_bins = depth_bins(depth_range)
    low, _, step = depth_range
    nearest = torch.where(gt_depth == 0, 1e5, gt_depth)
    nearest = nearest.unflatten(-1, (-1, downsample)).unflatten(-3, (-1, downsample)).amin((-3, -1))
    # counted from one, so that 0 is left for "none" when the fraction is cut off towards zero
    position = (nearest - (low - step)) / step
    position = torch.where((position >= 0) & (position < num_bins + 1), position, 0)
    return position.long() - 1


def depth_loss(probability: Tensor, gt_depth: Tensor, downsample: int, depth_range: Sequence[float],
               loss_weight: float = 0.5) -> Tensor:
    """Binary cross entropy of the depth distribution, summed over the bins, mean over the pixels that have a point.

    Args:
        probability: [M, D, h, w] distribution over the depth bins of each feature pixel, M = B * N cameras.
        gt_depth: [B, N, H, W] (or any leading axes whose product is M), H = h * downsample, W = w * downsample, metres.
        downsample: Image pixels per feature pixel.
        depth_range: (low, high, step) in metres, see :func:`depth_targets`.
        loss_weight: Factor of the result.

    Returns:
        Scalar, float32 (float64 for a float64 distribution); 0 without any labelled pixel.
        Logarithms are at least -100.

    Raises:
        ValueError: shapes or the number of bins disagree.
    """
    labels = depth_targets(gt_depth, downsample, depth_range).flatten(0, -3)         # [M, h, w]
    expected = (labels.shape[0], depth_bins(depth_range), *labels.shape[1:])
    if tuple(probability.shape) != expected:
        raise ValueError(f"probability must be [B * N, D, h, w] = {list(expected)} for this gt_depth "
                         f"{list(gt_depth.shape)}, got {list(probability.shape)}")
    with torch.autocast(probability.device.type, enabled=False):
        probability = probability if probability.dtype == torch.float64 else probability.float()
        labelled = (labels >= 0).unsqueeze(1)                                        # [M, 1, h, w]
        one_hot = torch.zeros_like(probability).scatter_(1, labels.clamp(min=0).unsqueeze(1), 1)
        # binary_cross_entropy ends the process on NaN on a GPU: NaN goes around it
        broken = labelled & probability.isnan()
        safe = torch.where(labelled & ~broken, probability, 0.5)
        cross_entropy = F.binary_cross_entropy(safe, one_hot, reduction="none")
        total = torch.where(labelled, cross_entropy, 0).sum() + torch.where(broken, probability, 0).sum()
        return loss_weight * total / labelled.sum().clamp(min=1)
