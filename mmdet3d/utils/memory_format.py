"""Memory format of convolutions."""

from __future__ import annotations

import torch
from torch import nn

FORMATS = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def use_channels_last(model: nn.Module) -> None:
    """Store the weights of all 2D and 3D convolutions channels-last, in place.

    A convolution whose weight is channels-last also computes and returns channels-last activations.
    """
    for module in model.modules():
        if (memory_format := FORMATS.get(type(module))) is not None:
            module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
