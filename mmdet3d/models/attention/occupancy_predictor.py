"""Occupancy prediction inside the transformer, and the visibility weights derived from it."""

from __future__ import annotations

import torch
from mmdet.models.backbones.resnet import BasicBlock
from torch import Tensor, nn

from mmdet3d.utils.precision import Softplus


class OccupancyPredictor(nn.Module):
    """Class logits of every voxel from a BEV map.

    Args:
        in_channels: Channels C of the map.
        out_channels: Half the hidden channels.
        num_heights: Voxels Z above each BEV cell.
        num_classes: Classes K, free space last.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heights: int, num_classes: int) -> None:
        super().__init__()
        self.num_heights = num_heights
        self.num_classes = num_classes
        self.bev_conv = BasicBlock(in_channels, in_channels)
        self.predicter = nn.Sequential(
            nn.Linear(in_channels, 2 * out_channels), Softplus(),
            nn.Linear(2 * out_channels, num_heights * num_classes))

    def forward(self, bev: Tensor) -> Tensor:
        """[B, C, Y, X] -> logits [B, X, Y, Z, K]."""
        logits = self.predicter(self.bev_conv(bev).permute(0, 3, 2, 1))
        return logits.unflatten(-1, (self.num_heights, self.num_classes))


def occupied_probability(logits: Tensor) -> Tensor:
    """One minus the probability of the last class (free space), [..., K] -> [...]."""
    return 1 - logits.softmax(-1)[..., -1]


def query_visibility(logits: Tensor) -> Tensor:
    """[B, Q, Z] probability that each voxel above a query is occupied, for logits [B, X, Y, Z, K]; no gradient."""
    with torch.no_grad():
        return occupied_probability(logits).transpose(1, 2).flatten(1, 2)
