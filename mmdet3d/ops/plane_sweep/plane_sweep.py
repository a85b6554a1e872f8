"""Stereo cost volume: contract, checks and choice of implementation."""

import torch
from torch import Tensor

from .._checks import (
    FLOAT_DTYPES,
    as_integer,
    check_dims,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from .._library import AVAILABLE, built_with_cuda
from .geometry import SweepGeometry
from .reference import plane_sweep_reference

#: Shapes of one camera's entries of the tensors of a SweepGeometry, in order.
_CAMERA_SHAPES = ((2, 2), (2, 2), (2,), (3, 3), (3,), (3, 3))

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "plane_sweep")

#: Whether the library has the softmax of the costs in the same pass.
_FUSED = _COMPILED and built_with_cuda() and hasattr(torch.ops.mmdet3d, "plane_sweep_probability")

#: Types of device that the compiled operator serves; asked once, since a tracer cannot ask the library.
_SERVED = (("cpu", "meta", "cuda") if built_with_cuda() else ("cpu", "meta")) if _COMPILED else ()


def plane_sweep(
    current: Tensor,
    reference: Tensor,
    geometry: SweepGeometry,
    depths: Tensor,
    *,
    invalid_channel: int | None,
    invalid_by_position: bool = False,
    invalid_penalty: float = 5.0,
    min_depth: float = 1e-3,
) -> Tensor:
    """Matching cost of two feature maps of one moving camera, for each pixel and each assumed depth.

    A pixel of the current map is the pixel (u, v) of the network's image; for the depth d, with the names of
    :class:`SweepGeometry`:

    1. ``(x, y) = pixel_from_augmented @ ((u, v) - offset)``, in the original image
    2. ``(X, Y, Z) = (x * d, y * d, d)``
    3. ``P = older_from_pixel @ (X, Y, Z) + translation``, metres in the older camera
    4. ``P[2] < min_depth`` is behind the camera
    5. ``Q = intrinsics @ P``, ``p = Q[:2] / Q[2]``
    6. ``p = augmentation @ p + offset``
    7. ``g = p / (W_img - 1, H_img - 1) * 2 - 1``
    8. ``(g + 1) / 2 * (W - 1, H - 1)``, the position in the older map

    That map is read there bilinearly, as 0 outside; next to its border the pixels that exist still count with
    their weights. The cost is the sum over the channels of ``|current - warped|``. Behind the camera or where a
    position is not finite, ``warped`` is 0. An integer position is a pixel centre (``align_corners=True`` of
    ``grid_sample``); a map one pixel wide or high has all its positions on that pixel.

    **Rounding.** The steps are taken in float32, or float64 for float64 features, for each point, and each is
    rounded, products and sums of a matrix product one by one, in the order of the columns. Composing the matrices,
    even in float64, is more accurate but is not the same: where a position falls on an integer within rounding
    (1e-6 pixels), the last bit decides whether a neighbouring pixel has a weight, and hence, if that one alone is
    not 0, whether ``invalid_channel`` calls the position invalid, which costs ``invalid_penalty``. Released
    weights were trained with these roundings; see ``docs/parity.md``.

    What follows the positions is in float32 (float64 for float64 features); for float16 features on a GPU of compute
    capability 7.5 or more, interpolation and differences are in float16: six roundings of a channel, each of at most
    2^-11 of ``|current|`` plus the weighted mean of ``|reference|``, which partly cancel in the sum over channels,
    taken in float32. Such features must be finite and below 16000, or depths next to each other may cost inf or NaN.

    The operator has no gradient; a softmax over the negative cost is left to the caller. It is the cost volume
    of BEVDet-4D-Stereo and BEVStereo (Li et al., "BEVStereo: Enhancing Depth Estimation in Multi-view 3D Object
    Detection with Dynamic Temporal Stereo", arXiv 2209.10248); the sweep itself is that of Collins, "A Space-Sweep
    Approach to True Multi-Image Matching", CVPR 1996.

    Args:
        current: (N, C, H, W) features of the current image, one entry per camera; float16 (see Rounding), bfloat16,
            float32 or float64.
        reference: (N, C, H, W) features of the older image, same dtype and device.
        geometry: The cameras; converted to the dtype of the steps.
        depths: (D,) float32 or float64, depths along the optical axis of the current camera in metres.
        invalid_channel: Channel whose warped value marks a position as invalid by being exactly 0, or None.
            In features that passed a ReLU this happens outside the map, but also inside it.
        invalid_by_position: Instead call a position invalid where it is behind the camera or outside the map,
            all pixels around it included. Needs ``invalid_channel=None``.
        invalid_penalty: Added to the cost at invalid positions.
        min_depth: Least depth in the older camera, in metres.

    Returns:
        (N, D, H, W) cost, float32, or float64 for float64 features.

    Raises:
        ValueError: shapes or devices disagree, ``image_size`` is not two lengths of at least 2, ``invalid_channel``
            is no channel, or both rules are chosen.
        TypeError: a dtype is not accepted, or ``geometry`` is not a :class:`SweepGeometry`.
        RuntimeError: an input requires a gradient while gradients are recorded.
    """
    _check_arguments(current, reference, geometry, depths, invalid_channel, invalid_by_position)
    if current.device.type in _SERVED:
        return torch.ops.mmdet3d.plane_sweep(
            current, reference, *geometry.tensors.values(), geometry.image_size, depths,
            invalid_channel, invalid_by_position, invalid_penalty, min_depth,
        )
    return plane_sweep_reference(
        current, reference, geometry, depths, invalid_channel=invalid_channel,
        invalid_by_position=invalid_by_position, invalid_penalty=invalid_penalty, min_depth=min_depth,
    )


def plane_sweep_probability(
    current: Tensor,
    reference: Tensor,
    geometry: SweepGeometry,
    depths: Tensor,
    *,
    invalid_channel: int | None,
    invalid_by_position: bool = False,
    invalid_penalty: float = 5.0,
    min_depth: float = 1e-3,
) -> Tensor:
    """Softmax over the depths of the negated cost of :func:`plane_sweep`, on a GPU in the same pass.

    Args and errors are those of :func:`plane_sweep`.

    Returns:
        (N, D, H, W) probabilities, which sum to 1 over D; from a GPU in PyTorch's channels-last memory format.
    """
    options = {"invalid_channel": invalid_channel, "invalid_by_position": invalid_by_position,
               "invalid_penalty": invalid_penalty, "min_depth": min_depth}
    if not (_FUSED and current.device.type == "cuda"):
        return plane_sweep(current, reference, geometry, depths, **options).neg_().softmax(1)
    _check_arguments(current, reference, geometry, depths, invalid_channel, invalid_by_position)
    return torch.ops.mmdet3d.plane_sweep_probability(
        current, reference, *geometry.tensors.values(), geometry.image_size, depths, *options.values())


def _check_arguments(
    current: Tensor, reference: Tensor, geometry: SweepGeometry, depths: Tensor, invalid_channel: int | None,
    invalid_by_position: bool,
) -> None:
    _check_geometry(geometry)
    _check_tensors(current, reference, geometry, depths)
    _check_options(current.shape[1], invalid_channel, invalid_by_position)
    inputs = (current, reference, *geometry.tensors.values(), depths)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError("plane_sweep has no gradient; call it under torch.no_grad() or detach its inputs")


def _check_geometry(geometry: SweepGeometry) -> None:
    if not isinstance(geometry, SweepGeometry):
        raise TypeError(f"geometry must be a SweepGeometry, got {type(geometry).__name__}")
    size = geometry.image_size
    if len(size) != 2 or min(as_integer("geometry.image_size", length) for length in size) < 2:
        raise ValueError(f"geometry.image_size must be (H_img, W_img), at least 2 each, got {tuple(size)}")


def _check_tensors(current: Tensor, reference: Tensor, geometry: SweepGeometry, depths: Tensor) -> None:
    check_dtype("current", current, FLOAT_DTYPES)
    check_dims("current", current, "N, C, H, W")
    check_same_dtype("reference", reference, "current", current)
    check_shape("reference", reference, "N, C, H, W", current.shape)
    check_same_device("reference", reference, "current", current)
    cameras = {f"geometry.{name}": tensor for name, tensor in geometry.tensors.items()}
    for name, tensor in {**cameras, "depths": depths}.items():
        check_dtype(name, tensor, (torch.float32, torch.float64))
        check_same_device(name, tensor, "current", current)
    for (name, tensor), shape in zip(cameras.items(), _CAMERA_SHAPES, strict=True):
        check_shape(name, tensor, ", ".join(["N", *map(str, shape)]), (current.shape[0], *shape))
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
    def _(current, reference, *others):
        depths = others[len(_CAMERA_SHAPES) + 1]  # after the cameras and image_size
        cameras, _, height, width = current.shape
        dtype = torch.promote_types(current.dtype, torch.float32)
        return current.new_empty((cameras, depths.shape[0], height, width), dtype=dtype)


if _FUSED:

    @torch.library.register_fake("mmdet3d::plane_sweep_probability")
    def _(current, reference, *others):
        depths = others[len(_CAMERA_SHAPES) + 1]
        cameras, _, height, width = current.shape
        dtype = torch.promote_types(current.dtype, torch.float32)
        return current.new_empty((cameras, height, width, depths.shape[0]), dtype=dtype).permute(0, 3, 1, 2)
