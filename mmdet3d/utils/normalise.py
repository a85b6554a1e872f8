"""Normalisation of images: the one table that the data pipeline and the network use."""

import functools

import numpy as np
import torch
from torch import Tensor

# Mean and standard deviation of ImageNet in the order red, green, blue ...
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
# ... while the channels of the tensor are blue, green, red: the released weights were trained so.


def _normalisation_table() -> np.ndarray:
    values = np.arange(256, dtype=np.float32)
    return np.stack([(values - np.float32(m)) / np.float32(s) for m, s in zip(MEAN, STD, strict=True)])


NORMALISED = _normalisation_table()
"""(3, 256) float32: tensor value of every pixel value, by output channel. A look-up is exact and the fastest way."""


@functools.cache
def _table(device: torch.device) -> Tensor:
    """[3, 256] :data:`NORMALISED` on a device; uploaded once, because the transfer of pageable memory waits."""
    with torch.inference_mode(False):
        return torch.from_numpy(NORMALISED).to(device)


def normalise_images(images: Tensor) -> Tensor:
    """Normalise pixels; floats are taken as normalised and returned as they are.

    Args:
        images: [..., 3, H, W] uint8, channels blue, green, red, as ``PrepareImageInputs(ship_uint8=True)`` gives them,
            or normalised floats.

    Returns:
        [..., 3, H, W] float32 on the same device, bit for bit what the data pipeline gives without ``ship_uint8``.

    Raises:
        ValueError: there are not three channels.
        TypeError: pixels are of another integer type.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 pixels or normalised floats, got {images.dtype}")
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"expected images [..., 3, H, W], got shape {tuple(images.shape)}")
    table = _table(images.device)
    normalised = torch.empty(images.shape, device=images.device)
    for channel in range(3):
        values = images.select(-3, channel)
        normalised.select(-3, channel).copy_(table[channel].index_select(0, values.flatten().int()).view(values.shape))
    return normalised
