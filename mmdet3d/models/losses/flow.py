"""L1 loss of the voxel flow on the classes that move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flow_loss(flow: Tensor, target: Tensor, semantics: Tensor, foreground_idx: Sequence[int],
              loss_weight: float = 0.8) -> Tensor:
    """L1 distance to the true flow on foreground voxels: mean within a sample, sum over the batch.

    Args:
        flow: [B, X, Y, Z, 2] predicted flow, metres per second in the ego frame.
        target: [B, X, Y, Z, 2] true flow; values off the foreground are not looked at, even if they are NaN.
        semantics: [B, X, Y, Z] integer labels of the voxels, which decide what is foreground.
        foreground_idx: Classes that have a flow.
        loss_weight: Factor of the result.

    Returns:
        Scalar, float32 (float64 for float64 flow). A sample without foreground adds 0 and no gradient.

    Raises:
        ValueError: the shapes disagree.
    """
    if flow.dim() != 5 or flow.shape != target.shape or flow.shape[:4] != semantics.shape:
        raise ValueError(f"expected flow and target [B, X, Y, Z, 2] and semantics [B, X, Y, Z], got "
                         f"{list(flow.shape)}, {list(target.shape)} and {list(semantics.shape)}")
    with torch.autocast(flow.device.type, enabled=False):
        flow = flow if flow.dtype == torch.float64 else flow.float()
        foreground = torch.zeros_like(semantics, dtype=torch.bool)
        for index in foreground_idx:
            foreground |= semantics == index
        # the difference is masked before abs, whose gradient at NaN is NaN
        distance = torch.where(foreground.unsqueeze(-1), flow - target.to(flow.dtype), 0).abs()
        numbers = foreground.flatten(1).sum(1) * flow.shape[-1]                      # [B] values averaged over
        return loss_weight * (distance.flatten(1).sum(1) / numbers.clamp(min=1)).sum()
