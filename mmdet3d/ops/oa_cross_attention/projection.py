"""Where 3D points appear in the cameras."""

import torch
from torch import Tensor

from .._checks import check_dims, check_dtype, check_same_device, check_same_dtype, check_shape
from .._library import AVAILABLE, use_compiled
from .reference import project_points_reference

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "oa_project_points")


def project_points(
    points: Tensor, image_from_points: Tensor, span: tuple[float, float], min_depth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Project points into all cameras of all samples.

    Args:
        points: (Q, Z, 4) homogeneous points, metres. float32 or float64.
        image_from_points: (B, N, 4, 4) to pixels times depth, dtype and device of ``points``.
        span: What pixels (x, y) are divided by.
        min_depth: Least depth that pixels are divided by, metres.

    Returns:
        Position (N, B, Q, Z, 2) in units of ``span``; depth (N, B, Q, Z) in metres; and valid (N, B, Q, Z), whether the
        depth is above ``min_depth`` and both coordinates of the position are within (0, 1). No gradient.

    Raises:
        TypeError: a dtype is not accepted. ValueError: shapes or devices disagree, or a length of ``span`` is not
            positive.
    """
    check_dtype("points", points, (torch.float32, torch.float64))
    check_dims("points", points, "Q, Z, 4")
    check_shape("points", points, "Q, Z, 4", (*points.shape[:2], 4))
    check_same_dtype("image_from_points", image_from_points, "points", points)
    check_same_device("image_from_points", image_from_points, "points", points)
    check_dims("image_from_points", image_from_points, "B, N, 4, 4")
    check_shape("image_from_points", image_from_points, "B, N, 4, 4", (*image_from_points.shape[:2], 4, 4))
    if len(span) != 2 or min(span) <= 0:
        raise ValueError(f"span must be two positive lengths (x, y), got {tuple(span)}")
    with torch.no_grad():
        if _COMPILED and use_compiled(points):
            return torch.ops.mmdet3d.oa_project_points(points, image_from_points, *map(float, span), min_depth)
        return project_points_reference(points, image_from_points, span, min_depth)


if _COMPILED:

    @torch.library.register_fake("mmdet3d::oa_project_points")
    def _(points, image_from_points, *others):
        B, N = image_from_points.shape[:2]
        shape = (N, B, *points.shape[:2])
        return points.new_empty((*shape, 2)), points.new_empty(shape), points.new_empty(shape, dtype=torch.bool)
