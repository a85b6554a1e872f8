"""Contract, checks and dispatch of ``resize_crop``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library
from .._checks import as_integer, check_dims, check_dtype
from .reference import resize_crop_reference

# A library that was built before this operator was added does not have it.
_COMPILED = _library.AVAILABLE and hasattr(torch.ops.mmdet3d, "resize_crop")


def resize_crop(image: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    """Part of a resized image, computed alone, with exactly the values that Pillow gives for the whole.

    Equal to ``Image.resize(size, BICUBIC).crop(crop)`` of Pillow, byte for byte: separable cubic convolution with
    a = -0.5 (Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981), widened by the scale
    when the image gets smaller; weights of 22 fractional bits; first along rows, rounded to bytes, then along
    columns. Pillow 13 filters along columns first for some sizes, which moves single values by one; not where both
    axes shrink alike. It runs on one thread; loader workers are parallel already.

    Args:
        image: (H, W, 3) uint8 on the CPU.
        size: (width, height) of the whole resized image.
        crop: (left, top, right, bottom) in the resized image; what reaches beyond it is 0.

    Returns:
        (bottom - top, right - left, 3) uint8.

    Raises:
        TypeError: ``image`` is not uint8, or ``size`` or ``crop`` do not hold integers.
        ValueError: ``image`` is not an image of three channels on the CPU, ``size`` is not positive, or ``crop`` has
            no area.
    """
    check_dtype("image", image, (torch.uint8,))
    check_dims("image", image, "H, W, 3")
    if image.shape[2] != 3 or image.numel() == 0 or image.device.type != "cpu":
        raise ValueError(f"image must have shape (H, W, 3) on the CPU, got {tuple(image.shape)} on {image.device}")
    size = [as_integer("size", length) for length in size]
    crop = [as_integer("crop", edge) for edge in crop]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (width, height), at least 1 each, got {tuple(size)}")
    if len(crop) != 4 or crop[0] >= crop[2] or crop[1] >= crop[3]:
        raise ValueError(f"crop must be (left, top, right, bottom) with left < right and top < bottom, got "
                         f"{tuple(crop)}")
    if _COMPILED:
        return torch.ops.mmdet3d.resize_crop(image.contiguous(), size, crop)
    return resize_crop_reference(image, size, crop)
