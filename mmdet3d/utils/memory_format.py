"""Memory format of convolutions."""

from __future__ import annotations

import torch
from torch import nn


def use_channels_last(model: nn.Module) -> None:
    """Store the weights of all 2D and 3D convolutions channels-last, in place.

    A convolution whose weight is channels-last also computes and returns channels-last activations. The strides are set
    for kernels of one pixel too, where both formats are the same numbers in the same order: gradients come with these
    strides, and ``DistributedDataParallel`` copies a gradient whose strides are not the weight's.
    """
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Conv3d):
            weight = module.weight.data
            # clone: contiguous() would keep the strides of axes of length 1
            module.weight.data = weight.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
