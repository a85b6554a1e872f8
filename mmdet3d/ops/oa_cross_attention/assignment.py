"""Which query lends its visibility to each query that a camera sees."""

import torch
from torch import Tensor

from .._checks import check_dims, check_dtype
from .._library import AVAILABLE, use_compiled
from .reference import assign_queries_reference

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "oa_assign_queries")


def assign_queries(seen: Tensor) -> Tensor:
    """Query whose visibility each camera reads for each query it sees, when all cameras share one buffer.

    The released weights of STCOcc were trained with code that lists, for each camera, the queries it sees in ascending
    order, and writes their visibility to a buffer that the cameras share, one after the other. So place j of the buffer
    ends up with the j-th query of the last camera whose list is longer than j, and all cameras then read that buffer.

    Args:
        seen: (N, B, Q) bool; whether camera n attends to query q of sample b.

    Returns:
        (N, B, Q) int32 index of a query of the same sample; -1 where the camera does not attend. No gradient.

    Raises:
        TypeError: ``seen`` is not bool. ValueError: it has another number of axes.
    """
    check_dtype("seen", seen, (torch.bool,))
    check_dims("seen", seen, "N, B, Q")
    if _COMPILED and use_compiled(seen):
        return torch.ops.mmdet3d.oa_assign_queries(seen)
    return assign_queries_reference(seen)


if _COMPILED:

    @torch.library.register_fake("mmdet3d::oa_assign_queries")
    def _(seen):
        return seen.new_empty(seen.shape, dtype=torch.int32)
