"""Stereo cost volume: contract, checks and choice of implementation."""

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_dims, check_dtype, check_same_device, check_same_dtype, check_shape
from .._library import AVAILABLE, built_with_cuda
from .reference import plane_sweep_reference

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "plane_sweep")

#: Types of device that the compiled operator serves; asked once, since a tracer cannot ask the library.
_SERVED = (("cpu", "meta", "cuda") if built_with_cuda() else ("cpu", "meta")) if _COMPILED else ()


def plane_sweep(
    current: Tensor,
    reference: Tensor,
    infinite_homography: Tensor,
    epipole: Tensor,
    depths: Tensor,
    *,
    invalid_channel: int | None,
    invalid_by_position: bool = False,
    invalid_penalty: float = 5.0,
    min_depth: float = 1e-3,
) -> Tensor:
    """Matching cost of two feature maps of one moving camera, for each pixel and each assumed depth.

    A pixel (x, y) of the current map at depth d is the point ``num = d * (G @ (x, y, 1)) + b`` of the
    reference (older) camera, with G its ``infinite_homography`` and b its ``epipole``: ``num[2]`` is the depth
    there in metres and ``num[:2] / num[2]`` the position in the reference map. That map is read there
    bilinearly, as 0 outside; next to its border the pixels that exist still count with their weights. The cost
    is the sum over the channels of ``|current - warped|``. Where ``num[2] < min_depth`` (behind the camera,
    tested before the division) or where a position is not finite, ``warped`` is 0.

    Positions count pixels of the feature map, an integer being a pixel centre (``align_corners=True`` of
    ``grid_sample``). They are computed in float64, sums in float32 or, for float64 features, in float64.

    The operator has no gradient; a softmax over the negative cost is left to the caller. It is the cost volume
    of BEVDet-4D-Stereo and BEVStereo (Li et al., "BEVStereo: Enhancing Depth Estimation in Multi-view 3D Object
    Detection with Dynamic Temporal Stereo", arXiv 2209.10248), written as plane-induced homographies (Hartley
    and Zisserman, "Multiple View Geometry in Computer Vision", section 13.1).

    Args:
        current: (N, C, H, W) features of the current image, one entry per camera; float16, bfloat16, float32
            or float64.
        reference: (N, C, H, W) features of the older image, same dtype and device.
        infinite_homography: (N, 3, 3) float32 or float64, from current to reference pixels (of the feature map)
            for a point at infinity, in the scale in which its third row gives depth per metre of depth.
        epipole: (N, 3) float32 or float64, the current camera's centre as the reference camera sees it, in
            homogeneous pixels of the feature map; its third entry is a depth in metres.
        depths: (D,) float32 or float64, depths along the optical axis of the current camera in metres.
        invalid_channel: Channel whose warped value marks a position as invalid by being exactly 0, or None.
            In features that passed a ReLU this happens outside the map, but also inside it.
        invalid_by_position: Instead call a position invalid where it is behind the camera or outside the map,
            all pixels around it included. Needs ``invalid_channel=None``.
        invalid_penalty: Added to the cost at invalid positions.
        min_depth: Least depth in the reference camera, in metres.

    Returns:
        (N, D, H, W) cost, float32, or float64 for float64 features.

    Raises:
        ValueError: shapes or devices disagree, ``invalid_channel`` is no channel, or both rules are chosen.
        TypeError: a dtype is not accepted.
        RuntimeError: an input requires a gradient while gradients are recorded.
    """
    _check_tensors(current, reference, infinite_homography, epipole, depths)
    _check_options(current.shape[1], invalid_channel, invalid_by_position)
    inputs = (current, reference, infinite_homography, epipole, depths)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError("plane_sweep has no gradient; call it under torch.no_grad() or detach its inputs")
    if current.device.type in _SERVED:
        options = (invalid_channel, invalid_by_position, invalid_penalty, min_depth)
        return torch.ops.mmdet3d.plane_sweep(*inputs, *options)
    return plane_sweep_reference(
        *inputs, invalid_channel=invalid_channel, invalid_by_position=invalid_by_position,
        invalid_penalty=invalid_penalty, min_depth=min_depth,
    )


def _check_tensors(
    current: Tensor, reference: Tensor, infinite_homography: Tensor, epipole: Tensor, depths: Tensor
) -> None:
    check_dtype("current", current, FLOAT_DTYPES)
    check_dims("current", current, "N, C, H, W")
    check_same_dtype("reference", reference, "current", current)
    check_shape("reference", reference, "N, C, H, W", current.shape)
    check_same_device("reference", reference, "current", current)
    geometry = {"infinite_homography": infinite_homography, "epipole": epipole, "depths": depths}
    for name, tensor in geometry.items():
        check_dtype(name, tensor, (torch.float32, torch.float64))
        check_same_device(name, tensor, "current", current)
    cameras = current.shape[0]
    check_shape("infinite_homography", infinite_homography, "N, 3, 3", (cameras, 3, 3))
    check_shape("epipole", epipole, "N, 3", (cameras, 3))
    check_dims("depths", depths, "D")


def _check_options(channels: int, invalid_channel: int | None, invalid_by_position: bool) -> None:
    if invalid_channel is None:
        return
    if invalid_by_position:
        raise ValueError(f"invalid_by_position=True needs invalid_channel=None, got {invalid_channel}")
    if not 0 <= invalid_channel < channels:
        raise ValueError(
            f"invalid_channel must be None or one of the {channels} channels (0 to {channels - 1}), "
            f"got {invalid_channel}"
        )


if _COMPILED:

    @torch.library.register_fake("mmdet3d::plane_sweep")
    def _(current, reference, infinite_homography, epipole, depths, *options):
        cameras, _, height, width = current.shape
        dtype = torch.promote_types(current.dtype, torch.float32)
        return current.new_empty((cameras, depths.shape[0], height, width), dtype=dtype)
