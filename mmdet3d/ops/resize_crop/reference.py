"""Reference of ``resize_crop``: Pillow."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def resize_crop_reference(image: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    """What :func:`mmdet3d.ops.resize_crop.resize_crop` gives, by resizing the whole image with Pillow."""
    # In two steps, because Pillow 13 filters along columns first where that takes fewer operations.
    rows = Image.fromarray(image.numpy()).resize((size[0], image.shape[0]), Image.Resampling.BICUBIC)
    resized = rows.resize(tuple(size), Image.Resampling.BICUBIC).crop(tuple(crop))
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(resized.height, resized.width, 3)
