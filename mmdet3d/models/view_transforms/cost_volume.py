"""Stereo matching between two frames of the same camera (BEVStereo, Li et al. arXiv 2209.10248)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet3d.ops.plane_sweep import SweepGeometry, plane_sweep_probability

#: The invalid test looks at the first channel of the last group of this many channels (see ``stereo_cost_volume``).
CHANNEL_GROUP = 4


@torch.no_grad()
def stereo_cost_volume(current: Tensor, older: Tensor, geometry: SweepGeometry, depths: Tensor, *,
                       invalid_penalty: float, one_channel_invalid_test: bool = True) -> Tensor:
    """Probability of each depth by plane sweep: softmax over depth of the negated absolute feature difference.

    No gradient flows through the volume; the network that reads it is trained.

    Args:
        current: [M, C, H4, W4] stereo features of the frame, M = B * N.
        older: [M, C, H4, W4] those of the frame before.
        geometry: Cameras of the M entries, see :func:`sweep_geometry`.
        depths: [D] metres.
        invalid_penalty: Added to the cost where the older image has no value.
        one_channel_invalid_test: "No value" is when one channel, C - 4, of the warped feature is exactly zero, as the
            released weights expect: this also fires where a feature after ReLU is zero. False: when the point lies
            behind the older camera or outside its map.

    Returns:
        [M, D, H4, W4], sums to one over D.
    """
    validity = ({"invalid_channel": current.shape[1] - CHANNEL_GROUP} if one_channel_invalid_test
                else {"invalid_channel": None, "invalid_by_position": True})
    return plane_sweep_probability(current, older, geometry, depths, invalid_penalty=invalid_penalty, **validity)
