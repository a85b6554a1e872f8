"""Occupancy head: class logits at full resolution."""

from __future__ import annotations

from collections.abc import Mapping

from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.backbones.resnet3d import BasicBlock3D
from mmdet3d.ops import upsample_mlp
from mmdet3d.registry import HEADS

COARSE_WEIGHT = 0.5


def voxel_rows(volume: Tensor) -> Tensor:
    """A volume [B, C, Z, Y, X] with the channels last: [B, Z, Y, X, C]."""
    return volume.permute(0, 2, 3, 4, 1)


@HEADS.register_module()
class OccHead(BaseModule):
    """Classifies every voxel; the finest stage's logits are a (detached) residual.

    Args:
        num_classes: Classes K, free space last.
        in_channels: Channels C of the fused volume.
        out_channels: Half the hidden channels.
        conv_before_predictor, up_sample, last_occ_unsample: Must be True.
    """

    ignored_config_keys = frozenset({
        "class_weights", "empty_idx", "use_group_refine", "group_list", "foreground_idx", "background_idx",
        "class_frequency", "bev_w", "bev_h", "bev_z"})

    def __init__(self, num_classes: int, in_channels: int = 96, out_channels: int = 96,
                 conv_before_predictor: bool = True, up_sample: bool = True, last_occ_unsample: bool = True,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if not (conv_before_predictor and up_sample and last_occ_unsample):
            raise ValueError("conv_before_predictor, up_sample and last_occ_unsample must be True")
        self.num_classes = num_classes
        self.voxel_conv = BasicBlock3D(in_channels, in_channels)
        self.predicter = nn.Sequential(
            nn.Linear(in_channels, 2 * out_channels), nn.Softplus(), nn.Linear(2 * out_channels, num_classes))

    def forward(self, volume: Tensor, coarse_logits: Tensor) -> Tensor:
        """[B, C, Z, Y, X] and stage logits [B, X, Y, Z, K] -> logits [B, 2 X, 2 Y, 2 Z, K]."""
        first, _, second = self.predicter
        hidden = first(voxel_rows(self.voxel_conv(volume)))  # before up-sampling, with which a linear layer commutes
        return upsample_mlp(hidden, second.weight, second.bias, residual=coarse_logits, residual_weight=COARSE_WEIGHT)
