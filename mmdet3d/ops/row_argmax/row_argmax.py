"""Index of the greatest value of a row: contract, checks and choice of implementation."""

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_dtype
from .._library import AVAILABLE, built_with_cuda
from .reference import row_argmax_reference

#: False also for a library that was built before this operator was written.
_FUSED = AVAILABLE and built_with_cuda() and hasattr(torch.ops.mmdet3d, "row_argmax")

_MAX_COLUMNS = 256


def row_argmax(values: Tensor) -> Tensor:
    """Index of the greatest value along the last axis, the first of equal ones; NaN is greater than any number.

    That is ``values.argmax(-1)`` as PyTorch computes it on CPUs, in a byte. PyTorch's CUDA kernel gives a row to
    several threads, which is slow for rows as short as those of classes; this one does not.

    Args:
        values: (..., K) float32, float64, float16 or bfloat16, 1 <= K <= 256.

    Returns:
        (...) uint8. No gradient flows through it.

    Raises:
        TypeError: the dtype is not accepted. ValueError: there is no axis, or its length is not 1 to 256.
    """
    check_dtype("values", values, FLOAT_DTYPES)
    if values.dim() < 1 or not 1 <= values.shape[-1] <= _MAX_COLUMNS:
        raise ValueError(f"values must have shape (..., K) with 1 <= K <= {_MAX_COLUMNS}, got {tuple(values.shape)}")
    if _FUSED and values.is_cuda and values.dtype != torch.float64:
        return torch.ops.mmdet3d.row_argmax(values.detach().contiguous())
    return row_argmax_reference(values)


if _FUSED:

    @torch.library.register_fake("mmdet3d::row_argmax")
    def _(values):
        return values.new_empty(values.shape[:-1], dtype=torch.uint8)
