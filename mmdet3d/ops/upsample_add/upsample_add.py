"""The step from one stage of the cascade to the next finer one: contract, checks and choice of implementation."""

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_dims, check_dtype, check_same_device, check_same_dtype, check_shape
from .._library import AVAILABLE, use_compiled
from .reference import upsample_add_reference

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "upsample_add")


def upsample_add(fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """``fine + up(coarse)`` and the mean of that over Z.

    ``up`` is trilinear x2 with ``align_corners=False``: along each axis the weights are 1/4 and 3/4, held at the
    borders. CUDA has a fused kernel for float32, float16 and bfloat16 where no gradient is recorded: it interpolates,
    adds and averages in float32 and rounds once at the end (the plain version rounds the interpolated volume too, and
    averages what was rounded). Elsewhere PyTorch's own kernels run, which are differentiable.

    Args:
        fine: (B, C, 2 Z, 2 Y, 2 X); float32, float64, float16 or bfloat16.
        coarse: (B, C, Z, Y, X), same dtype and device.

    Returns:
        The sum, like ``fine``, and its mean (B, C, 2 Y, 2 X), float32 (float64 for float64); from the fused kernel both
        with the channels last in memory.

    Raises:
        TypeError: a dtype is not accepted. ValueError: shapes, dtypes or devices disagree.
    """
    check_dtype("fine", fine, FLOAT_DTYPES)
    check_dims("coarse", coarse, "B, C, Z, Y, X")
    B, C, Z, Y, X = coarse.shape
    check_shape("fine", fine, "B, C, 2 Z, 2 Y, 2 X", (B, C, 2 * Z, 2 * Y, 2 * X))
    check_same_dtype("coarse", coarse, "fine", fine)
    check_same_device("coarse", coarse, "fine", fine)
    if not _fused(fine, coarse):
        return upsample_add_reference(fine, coarse)
    rows = [volume.permute(0, 2, 3, 4, 1).contiguous() for volume in (fine, coarse)]
    total, mean = torch.ops.mmdet3d.upsample_add(*rows)
    return total.permute(0, 4, 1, 2, 3), mean.permute(0, 3, 1, 2)


def _fused(fine: Tensor, coarse: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and (fine.requires_grad or coarse.requires_grad)
    return _COMPILED and fine.is_cuda and not recorded and fine.dtype != torch.float64 and use_compiled(fine)


if _COMPILED:

    @torch.library.register_fake("mmdet3d::upsample_add")
    def _(fine, coarse):
        B, _, Y, X, C = fine.shape
        return torch.empty_like(fine), fine.new_empty(B, Y, X, C, dtype=torch.float32)
