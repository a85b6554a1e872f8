"""Depth and context per pixel, conditioned on the camera (BEVDepth, Li et al. arXiv 2206.10092)."""

from __future__ import annotations

import torch
from mmdet.models.backbones.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet3d.utils.fused_conv import FusedConv, fold_norm_into_next

NUM_CAMERA_PARAMETERS = 27
#: Keys of ``depthnet_cfg`` in config files.
DEPTHNET_KEYS = ("use_dcn", "use_aspp", "stereo", "bias", "cost_volume_downsample", "aspp_mid_channels")


class CameraMLP(nn.Module):
    """Two linear layers that turn the camera vector into channel features."""

    def __init__(self, in_features: int, features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, features)
        self.fc2 = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """[M, in_features] -> [M, features]."""
        return self.fc2(F.relu(self.fc1(x)))


class SELayer(nn.Module):
    """Squeeze-and-excitation gate whose excitation comes from the camera (Hu et al. arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, camera: Tensor) -> Tensor:
        """x [M, C, h, w] times the gate of camera [M, C]."""
        gate = self.conv_expand(F.relu(self.conv_reduce(camera[..., None, None])))
        return x * gate.sigmoid()


class _ASPPBranch(nn.Module):
    """Atrous convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        padding = 0 if kernel_size == 1 else dilation
        self.atrous_conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)))

    def fold_batch_norm(self) -> nn.Module:
        """The branch for evaluation."""
        return FusedConv(self.atrous_conv, self.bn, relu=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. arXiv 1706.05587), [M, C, h, w] -> [M, C, h, w]."""

    def __init__(self, channels: int, mid_channels: int) -> None:
        super().__init__()
        self.aspp1 = _ASPPBranch(channels, mid_channels, 1, 1)
        self.aspp2 = _ASPPBranch(channels, mid_channels, 3, 6)
        self.aspp3 = _ASPPBranch(channels, mid_channels, 3, 12)
        self.aspp4 = _ASPPBranch(channels, mid_channels, 3, 18)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels),
            nn.ReLU())
        self.conv1 = nn.Conv2d(5 * mid_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the five branches and mix them."""
        branches = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x)]
        # In the memory format of the others, which torch.cat would otherwise give up.
        branches.append(torch.empty_like(branches[0]).copy_(self.global_avg_pool(x)))
        return self.dropout(self.relu(self.bn1(self.conv1(torch.cat(branches, 1)))))

    def fold_batch_norm(self) -> nn.Module:
        """The pyramid for evaluation: itself, changed."""
        self.conv1, self.bn1, self.relu = FusedConv(self.conv1, self.bn1, relu=True), nn.Identity(), nn.Identity()
        return self


class DepthNet(nn.Module):
    """Depth logits and context features of every pixel.

    Args:
        in_channels: Channels of the image feature.
        mid_channels: Channels inside.
        context_channels: Channels of the context.
        depth_channels: Depth bins D.
        aspp_mid_channels: Channels of each branch of the spatial pyramid; ``mid_channels`` when negative.
        stereo: Whether a stereo cost volume [M, D, ...] joins the depth branch.
        bias: Penalty added to the cost where the older image has no value (used by the cost volume).
        use_aspp: Whether the depth branch holds the spatial pyramid.
        use_dcn: Deformable convolution; not supported.
        with_cp: Recompute the depth branch in the backward pass to save memory.
        cost_volume_downsample: Stride ratio of image feature and cost volume; 4 is supported.

    Raises:
        ValueError: an unsupported option.
    """

    def __init__(self, in_channels: int, mid_channels: int, context_channels: int, depth_channels: int, *,
                 use_dcn: bool = False, use_aspp: bool = True, with_cp: bool = False, stereo: bool = False,
                 bias: float = 0.0, cost_volume_downsample: int = 4, aspp_mid_channels: int = -1) -> None:
        super().__init__()
        if use_dcn:
            raise ValueError("depthnet_cfg.use_dcn=True is not supported; the published models set it to False")
        if stereo and cost_volume_downsample != 4:
            raise ValueError(f"the cost volume must be 4 times finer than the feature, got {cost_volume_downsample}")
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 3, padding=1), nn.BatchNorm2d(mid_channels), nn.ReLU(inplace=True))
        self.context_conv = nn.Conv2d(mid_channels, context_channels, 1)
        self.bn = nn.BatchNorm1d(NUM_CAMERA_PARAMETERS)
        self.depth_mlp = CameraMLP(NUM_CAMERA_PARAMETERS, mid_channels)
        self.depth_se = SELayer(mid_channels)
        self.context_mlp = CameraMLP(NUM_CAMERA_PARAMETERS, mid_channels)
        self.context_se = SELayer(mid_channels)
        depth_in, downsample = mid_channels, None
        if stereo:
            depth_in += depth_channels
            downsample = nn.Conv2d(depth_in, mid_channels, 1)
            self.cost_volumn_net = nn.Sequential(
                nn.Conv2d(depth_channels, depth_channels, 3, stride=2, padding=1), nn.BatchNorm2d(depth_channels),
                nn.Conv2d(depth_channels, depth_channels, 3, stride=2, padding=1), nn.BatchNorm2d(depth_channels))
        layers: list[nn.Module] = [BasicBlock(depth_in, mid_channels, downsample=downsample),
                                   BasicBlock(mid_channels, mid_channels), BasicBlock(mid_channels, mid_channels)]
        if use_aspp:
            layers.append(ASPP(mid_channels, aspp_mid_channels if aspp_mid_channels > 0 else mid_channels))
        layers.append(nn.Conv2d(mid_channels, depth_channels, 1))
        self.depth_conv = nn.Sequential(*layers)
        self.stereo = stereo
        self.bias = bias
        self.with_cp = with_cp

    def fold_batch_norm(self) -> nn.Module:
        """The net for evaluation: itself, with the camera vector's norm in the layers that read it."""
        for mlp in (self.depth_mlp, self.context_mlp):
            fold_norm_into_next(self.bn, mlp.fc1)
        self.bn = nn.Identity()
        return self

    def forward(self, x: Tensor, camera: Tensor, matching: Tensor | None) -> tuple[Tensor, Tensor]:
        """Depth logits [M, D, h, w] and context [M, C, h, w].

        Args:
            x: [M, in_channels, h, w] image feature, M = batch times cameras.
            camera: [M, 27] camera vector.
            matching: [M, D, h, w] stereo matching, ``cost_volumn_net`` of the cost volume; None without stereo.
        """
        camera = self.bn(camera)
        x = self.reduce_conv(x)
        context = self.context_conv(self.context_se(x, self.context_mlp(camera)))
        depth = self.depth_se(x, self.depth_mlp(camera))
        if self.stereo:
            depth = torch.cat([depth, matching], 1)
        if self.with_cp and depth.requires_grad:
            return torch.utils.checkpoint.checkpoint(self.depth_conv, depth, use_reentrant=False), context
        return self.depth_conv(depth), context
