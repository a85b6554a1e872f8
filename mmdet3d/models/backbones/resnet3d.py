"""Residual encoder of voxel volumes (3D ResNet, He et al. arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmcv.cnn import ConvModule
from mmcv.runner import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmdet3d.registry import BACKBONES
from mmdet3d.utils.fused_conv import FusedBlock

CONV3D, NORM3D = {"type": "Conv3d"}, {"type": "BN3d"}


def conv3d_bn(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, relu: bool = True
              ) -> ConvModule:
    """3D convolution without bias, batch norm, and an optional ReLU."""
    return ConvModule(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False,
                      conv_cfg=CONV3D, norm_cfg=NORM3D, act_cfg={"type": "ReLU", "inplace": True} if relu else None)


class BasicBlock3D(nn.Module):
    """Two 3x3x3 convolutions with a residual connection, [B, C, Z, Y, X] -> [B, C', Z', Y', X'].

    Args:
        in_channels: C.
        out_channels: C'.
        stride: Stride of the first convolution.
        downsample: Whether the shortcut is a strided 3x3x3 convolution with batch norm instead of the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, downsample: bool = False) -> None:
        super().__init__()
        self.conv1 = conv3d_bn(in_channels, out_channels, stride=stride)
        self.conv2 = conv3d_bn(out_channels, out_channels, relu=False)
        self.downsample = conv3d_bn(in_channels, out_channels, stride=stride, relu=False) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + identity)

    def fold_batch_norm(self) -> nn.Module:
        """The block for evaluation."""
        shortcut = None if self.downsample is None else (self.downsample.conv, self.downsample.norm)
        return FusedBlock([(self.conv1.conv, self.conv1.norm), (self.conv2.conv, self.conv2.norm)], shortcut)


@BACKBONES.register_module()
class CustomResNet3D(BaseModule):
    """3D encoder that returns one volume per stage, all with the same number of channels.

    Args:
        numC_input: Channels of the input volume.
        num_layer: Blocks of each stage.
        num_channels: Channels of each stage.
        stride: Stride of each stage.
        backbone_output_ids: Stages whose output is returned.
        adjust_number_channel: Channels of every output; outputs with another number are projected by 1x1x1
            convolutions. When the first stage has this number already, it is returned as it is.
        with_cp: Recompute the stages in the backward pass to save memory.
    """

    def __init__(self, numC_input: int, num_layer: Sequence[int] = (2, 2, 2), num_channels: Sequence[int] | None = None,
                 stride: Sequence[int] = (2, 2, 2), backbone_output_ids: Sequence[int] | None = None,
                 adjust_number_channel: int | None = None, with_cp: bool = False, init_cfg: Mapping | None = None
                 ) -> None:
        super().__init__(init_cfg)
        channels = list(num_channels or [numC_input * 2 ** (i + 1) for i in range(len(num_layer))])
        if not len(num_layer) == len(channels) == len(stride):
            raise ValueError("num_layer, num_channels and stride must be equally long, "
                             f"got {list(num_layer)}, {channels}, {list(stride)}")
        self.output_ids = tuple(range(len(num_layer)) if backbone_output_ids is None else backbone_output_ids)
        stages, previous = [], numC_input
        for blocks, width, step in zip(num_layer, channels, stride, strict=True):
            first = BasicBlock3D(previous, width, stride=step, downsample=True)
            stages.append(nn.Sequential(first, *(BasicBlock3D(width, width) for _ in range(blocks - 1))))
            previous = width
        self.layers = nn.Sequential(*stages)
        self.with_cp = with_cp
        self.keep_first = adjust_number_channel is None or channels[0] == adjust_number_channel
        if adjust_number_channel is not None:
            adjusted = channels[1:] if self.keep_first else channels
            self.adjust_layer = nn.ModuleList(conv3d_bn(width, adjust_number_channel, 1) for width in adjusted)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, numC_input, Z, Y, X] -> volumes of the selected stages, finest first."""
        outputs = []
        for index, layer in enumerate(self.layers):
            if self.with_cp and torch.is_grad_enabled():  # the stages draw no random numbers
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
            if index in self.output_ids:
                outputs.append(x)
        if not hasattr(self, "adjust_layer"):
            return outputs
        kept, rest = (outputs[:1], outputs[1:]) if self.keep_first else ([], outputs)
        return kept + [adjust(x) for adjust, x in zip(self.adjust_layer, rest, strict=True)]
