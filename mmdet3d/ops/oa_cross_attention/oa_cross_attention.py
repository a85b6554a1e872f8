"""Deformable cross attention of bird's-eye-view queries to the cameras that see them, weighted by occlusion.

Source: Liao et al., "STCOcc: Sparse Spatial-Temporal Cascade Renovation for 3D Occupancy and Scene Flow Prediction",
CVPR 2025, arXiv:2504.19749; after the spatial cross-attention of BEVFormer (Li et al., arXiv:2203.17270).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, as_integer, check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, use_compiled
from .reference import oa_cross_attention_reference

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "oa_cross_attention_forward")


def oa_cross_attention(
    value: Tensor,
    size: Sequence[int],
    base_offsets: Tensor,
    offset_slope: Tensor,
    attention_weights: Tensor,
    position: Tensor,
    consistency: Tensor,
    visibility: Tensor,
    source: Tensor,
) -> Tensor:
    """Mean over the cameras that see a query of weighted bilinear samples around its anchors.

    Camera n attends to query q of sample b where ``source[n, b, q]`` is the index s of a query; it then reads the
    visibility ``v = visibility[b, s]``. Head m samples near each anchor p, at (x, y)

        position[n, b, q, p] + (base_offsets[b, q, m, p] + mean(v) * offset_slope[m, p]) / (w, h)

    with weight ``attention_weights[b, q, m, p] * consistency[n, b, q, p] * v[p]``. Locations are read as by
    ``ms_deform_attn``: [0, 1] spans the map from outer border to outer border, pixels off the map count as zero, and
    one that is no number contributes nothing. A query that no camera sees gets 0.

    Gradients go to ``value``, ``base_offsets``, ``offset_slope`` and ``attention_weights``, to nothing else. That of
    ``value`` on CUDA is summed by atomic additions, so its last bits vary from run to run, unless
    ``torch.use_deterministic_algorithms(True)`` is on. Then terms are rounded to a common unit and summed as integers,
    which is slower: the unit is the product of the largest magnitudes of the gradient and of the three weights, times
    ``Q * P * 2**-60`` or smaller; if one of these is not finite, all of this gradient is NaN. Everything else, and all
    of it on the CPU, is deterministic anyway.

    Args:
        value: (N, B, h * w, M, D) features of N cameras, row by row; M heads of D channels. float32 or float64;
            float16 and bfloat16 are read as they are, and computed with in float32.
        size: (h, w) of the maps.
        base_offsets: (B, Q, M, P, 2) (x, y) offsets in pixels for a mean visibility of 0. This and the other floating
            point arguments are taken in float32, in float64 for float64 ``value``.
        offset_slope: (M, P, 2) what a mean visibility of 1 adds to the offsets.
        attention_weights: (B, Q, M, P), used as given, not normalised.
        position: (N, B, Q, P, 2) (x, y) of the anchors in the cameras.
        consistency: (N, B, Q, P) weight of the anchors in the cameras.
        visibility: (B, Q, P) weight of the anchors.
        source: (N, B, Q) int32, see :func:`assign_queries`; what is no index of a query, such as -1, means that the
            camera does not attend.

    Returns:
        (B, Q, M * D) float32, float64 for float64 ``value``.

    Raises:
        TypeError: a dtype is not accepted. ValueError: shapes or devices disagree.
    """
    height, width = _read_size(size)
    inputs = (base_offsets, offset_slope, attention_weights, position, consistency, visibility)
    _check_inputs(value, height, width, *inputs, source)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    inputs = [tensor.to(dtype) for tensor in inputs]
    inputs[3:] = [tensor.detach() for tensor in inputs[3:]]
    if not (_COMPILED and use_compiled(value)):
        return oa_cross_attention_reference(value, (height, width), *inputs, source)
    if value.device.type == "cpu":
        value = value.to(dtype)
    return torch.ops.mmdet3d.oa_cross_attention_forward(value, height, width, *inputs, source)


def _read_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f"size must be (h, w), got {size!r}") from None
    height, width = as_integer("size", height), as_integer("size", width)
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {(height, width)}")
    return height, width


def _check_inputs(value: Tensor, height: int, width: int, base_offsets: Tensor, offset_slope: Tensor,
                  attention_weights: Tensor, position: Tensor, consistency: Tensor, visibility: Tensor,
                  source: Tensor) -> None:
    check_dtype("value", value, FLOAT_DTYPES)
    check_dims("value", value, "N, B, S, M, D")
    check_dtype("base_offsets", base_offsets, FLOAT_DTYPES)
    check_dims("base_offsets", base_offsets, "B, Q, M, P, 2")
    N, B, S, M, _ = value.shape
    _, Q, _, P, _ = base_offsets.shape
    if S != height * width:
        raise ValueError(f"value must have S = h * w = {height * width} rows for size {(height, width)}, got {S}")
    check_dtype("source", source, (torch.int32,))
    for name, tensor, axes, expected in (
        ("base_offsets", base_offsets, "B, Q, M, P, 2", (B, Q, M, P, 2)),
        ("offset_slope", offset_slope, "M, P, 2", (M, P, 2)),
        ("attention_weights", attention_weights, "B, Q, M, P", (B, Q, M, P)),
        ("position", position, "N, B, Q, P, 2", (N, B, Q, P, 2)),
        ("consistency", consistency, "N, B, Q, P", (N, B, Q, P)),
        ("visibility", visibility, "B, Q, P", (B, Q, P)),
        ("source", source, "N, B, Q", (N, B, Q)),
    ):
        if name != "source":
            check_dtype(name, tensor, FLOAT_DTYPES)
        check_shape(name, tensor, axes, expected)
        check_same_device(name, tensor, "value", value)


def _setup_context(ctx, inputs, output) -> None:
    value, ctx.height, ctx.width, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(ctx, grad_out: Tensor):
    value, *others = ctx.saved_tensors
    backward = torch.ops.mmdet3d.oa_cross_attention_backward
    grads = backward(grad_out, value, ctx.height, ctx.width, *others)
    return grads[0], None, None, *grads[1:], None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("oa_cross_attention has no second derivative")


def _forward_fake(value, height, width, base_offsets, *others):
    B, Q, M, _, _ = base_offsets.shape
    return base_offsets.new_empty(B, Q, M * value.shape[-1])


def _backward_fake(grad_out, value, height, width, base_offsets, offset_slope, attention_weights, *others):
    return tuple(t.new_empty(t.shape) for t in (value, base_offsets, offset_slope, attention_weights))


def _register() -> None:
    library = torch.library
    library.register_fake("mmdet3d::oa_cross_attention_forward", _forward_fake)
    library.register_fake("mmdet3d::oa_cross_attention_backward", _backward_fake)
    library.register_autograd("mmdet3d::oa_cross_attention_forward", _backward, setup_context=_setup_context)
    library.register_autograd("mmdet3d::oa_cross_attention_backward", _no_second_derivative)


if _COMPILED:
    _register()
