"""How well the depth of 3D anchors fits the depth distribution at their image position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_dims, check_dtype, check_same_device, check_same_dtype, check_shape
from .._library import AVAILABLE, use_compiled
from .reference import depth_consistency_reference

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "oa_depth_consistency")
# A lane of a CUDA kernel holds its bins in registers; with more bins than this the reference runs.
_MAX_CUDA_BINS = 256


@dataclass(frozen=True)
class DepthFit:
    """The rule that turns a depth distribution and an anchor's depth into a weight.

    Attributes:
        first: Depth of the first bin, metres.
        step: Distance between bins, metres.
        sigma: Width of the Gaussian.
        squared_sigma: The weight is ``exp(-mu^2 / 2 * sigma^2)`` evaluated left to right. False:
            ``exp(-mu^2 / (2 sigma^2))``.
        distance_to_neighbours: ``mu`` is the distance to the nearer of the two bins next to the most probable one.
            False: to the most probable bin itself.
        softmax_depth: Apply a softmax to the sampled distribution before the arg max; it only decides ties.
    """

    first: float
    step: float
    sigma: float = 2.0
    squared_sigma: bool = True
    distance_to_neighbours: bool = True
    softmax_depth: bool = True


def depth_consistency(
    position: Tensor, anchor_depth: Tensor, valid: Tensor, depth: Tensor, rule: DepthFit
) -> Tensor:
    """Weight in (0, 1] of each anchor in each camera.

    The depth distribution is sampled bilinearly at the anchor's position as by ``ms_deform_attn`` (zero off the map);
    its first most probable bin is compared with the anchor's depth. After the depth consistency of FB-BEV (Li et al.,
    arXiv:2308.02236).

    Args:
        position: (N, B, Q, Z, 2) (x, y), where [0, 1] spans the map from outer border to outer border. float32 or
            float64.
        anchor_depth: (N, B, Q, Z) metres, dtype and device of ``position``.
        valid: (N, B, Q, Z) bool. A query none of whose anchors is valid in a camera gets weight 0 there.
        depth: (B, N, D, h, w) probability of the depth bins, finite; taken in the dtype of ``position``.
        rule: How distances become weights.

    Returns:
        (N, B, Q, Z), dtype of ``position``. No gradient.

    Raises:
        TypeError: a dtype is not accepted, or ``rule`` is not a :class:`DepthFit`. ValueError: shapes or devices
            disagree.
    """
    _check_inputs(position, anchor_depth, valid, depth, rule)
    with torch.no_grad():
        depth = depth.to(position.dtype)
        if not _runs_compiled(depth):
            return depth_consistency_reference(position, anchor_depth, valid, depth, rule)
        height, width = depth.shape[-2:]
        bins_last = depth.flatten(3).transpose(2, 3).contiguous()
        return torch.ops.mmdet3d.oa_depth_consistency(
            position, anchor_depth, valid, bins_last, height, width, rule.first, rule.step, rule.sigma,
            rule.squared_sigma, rule.distance_to_neighbours, rule.softmax_depth,
        )


def _runs_compiled(depth: Tensor) -> bool:
    return _COMPILED and use_compiled(depth) and not (depth.is_cuda and depth.shape[2] > _MAX_CUDA_BINS)


def _check_inputs(position: Tensor, anchor_depth: Tensor, valid: Tensor, depth: Tensor, rule: DepthFit) -> None:
    if not isinstance(rule, DepthFit):
        raise TypeError(f"rule must be a DepthFit, got {type(rule).__name__}")
    check_dtype("position", position, (torch.float32, torch.float64))
    check_dims("position", position, "N, B, Q, Z, 2")
    N, B, Q, Z, _ = position.shape
    check_shape("position", position, "N, B, Q, Z, 2", (N, B, Q, Z, 2))
    check_same_dtype("anchor_depth", anchor_depth, "position", position)
    check_shape("anchor_depth", anchor_depth, "N, B, Q, Z", (N, B, Q, Z))
    check_dtype("valid", valid, (torch.bool,))
    check_shape("valid", valid, "N, B, Q, Z", (N, B, Q, Z))
    check_dtype("depth", depth, (torch.float32, torch.float64, torch.float16, torch.bfloat16))
    check_dims("depth", depth, "B, N, D, h, w")
    check_shape("depth", depth, "B, N, D, h, w", (B, N, *depth.shape[2:]))
    if 0 in depth.shape[2:]:
        raise ValueError(f"depth must have at least one bin and one pixel, got (B, N, D, h, w) = {tuple(depth.shape)}")
    for name, tensor in (("anchor_depth", anchor_depth), ("valid", valid), ("depth", depth)):
        check_same_device(name, tensor, "position", position)


if _COMPILED:

    @torch.library.register_fake("mmdet3d::oa_depth_consistency")
    def _(position, anchor_depth, *others):
        return anchor_depth.new_empty(anchor_depth.shape)
