"""Feature pyramid that computes only the levels asked for (FPN, Lin et al. arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmcv.cnn import ConvModule
from mmcv.runner import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet3d.registry import NECKS


@NECKS.register_module()
class CustomFPN(BaseModule):
    """Top-down feature pyramid with outputs at selected levels only.

    Args:
        in_channels: Channels of each input, finest first.
        out_channels: Channels of every output.
        num_outs: Number of outputs; must be the number of ``out_ids``.
        out_ids: Input levels that get an output convolution.
        upsample_cfg: Options of the up-sampling between levels.

    ``start_level``, ``end_level``, ``add_extra_convs``, ``relu_before_extra_convs`` and ``no_norm_on_lateral`` are
    accepted with their defaults.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int, start_level: int = 0,
                 end_level: int = -1, out_ids: Sequence[int] = (), add_extra_convs: bool = False,
                 relu_before_extra_convs: bool = False, no_norm_on_lateral: bool = False,
                 conv_cfg: Mapping | None = None, norm_cfg: Mapping | None = None, act_cfg: Mapping | None = None,
                 upsample_cfg: Mapping | None = None, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg or {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"})
        if start_level != 0 or end_level not in (-1, len(in_channels)) or add_extra_convs or relu_before_extra_convs:
            raise ValueError("supported are start_level=0, end_level=-1 and no extra convolutions")
        if num_outs != len(out_ids) or any(not 0 <= level < len(in_channels) for level in out_ids):
            raise ValueError(f"num_outs={num_outs} must be the number of out_ids={list(out_ids)}, which are levels "
                             f"below {len(in_channels)}")
        self.in_channels, self.out_ids = tuple(in_channels), tuple(out_ids)
        self.upsample_cfg = dict(upsample_cfg or {"mode": "nearest"})
        lateral_norm = None if no_norm_on_lateral else norm_cfg
        self.lateral_convs = nn.ModuleList(
            ConvModule(c, out_channels, 1, conv_cfg=conv_cfg, norm_cfg=lateral_norm, act_cfg=act_cfg, inplace=False)
            for c in in_channels)
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act_cfg,
                       inplace=False) for _ in self.out_ids)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One output [M, out_channels, h_l, w_l] for each of ``out_ids``; inputs are [M, C_l, h_l, w_l]."""
        if len(inputs) != len(self.lateral_convs):
            raise ValueError(f"expected {len(self.lateral_convs)} feature maps, got {len(inputs)}")
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for level in range(len(laterals) - 1, 0, -1):
            size = laterals[level - 1].shape[-2:]
            laterals[level - 1] = laterals[level - 1] + F.interpolate(laterals[level], size=size, **self.upsample_cfg)
        return [conv(laterals[level]) for conv, level in zip(self.fpn_convs, self.out_ids, strict=True)]
