"""Plain PyTorch version of ``upsample_add``: what the compiled version is tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample_add_reference(fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """See ``upsample_add``; differentiable."""
    with torch.autocast(fine.device.type, enabled=False):
        total = fine + F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False).to(fine.dtype)
        return total, total.mean(2, dtype=torch.promote_types(total.dtype, torch.float32))
