"""Multi-scale deformable attention: weighted bilinear samples of feature maps at free locations.

Source: X. Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159,
equation 3 (without the linear projections).
"""

from collections.abc import Sequence

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
    full_precision_under_autocast,
)
from .._library import AVAILABLE, use_compiled
from .reference import ms_deform_attn_reference

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "ms_deform_attn_forward")
# The CUDA kernels take the sizes of the maps as arguments; more levels than this run the reference.
_MAX_CUDA_LEVELS = 16


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of L feature maps, for each query and head.

    ``out[b, q, m]`` is the sum over levels l and points p of
    ``attention_weights[b, q, m, l, p] * map_l[b, m](sampling_locations[b, q, m, l, p])``.

    A location (x, y) in units of the map, where [0, 1] spans it from outer border to outer border, is pixel
    (x * W - 0.5, y * H - 0.5), integers being pixel centres. The four neighbouring pixels are interpolated; those off
    the map count as zero. This is ``grid_sample(align_corners=False, padding_mode="zeros")`` at ``2 * location - 1``. A
    NaN or infinite location contributes 0 and gets gradient 0.

    The gradient of ``value`` on CUDA is summed by atomic additions, so its last bits vary from run to run, unless
    ``torch.use_deterministic_algorithms(True)`` is on. Then terms are rounded to a common unit and summed as integers,
    which is slower. The unit is less than ``max|grad_out| * max|attention_weights| * Q * L * P * 2**-59``, well below
    what float32 rounds for all but tiny gradients; if a gradient or weight is not finite, all of this gradient is NaN.
    Everything else, and all of it on the CPU, is deterministic anyway.

    Args:
        value: (B, S, M, D) features; M heads of D channels; S is the sum of H * W over the levels, each map row by row.
            float32 or float64; float16 and bfloat16 are computed in float32. Under autocast all inputs are taken in
            float32.
        spatial_shapes: (H, W) of each of the L levels. An (L, 2) integer tensor is accepted too, but one on a GPU makes
            the host wait for it: prefer Python integers.
        sampling_locations: (B, Q, M, L, P, 2) (x, y), dtype and device of ``value``.
        attention_weights: (B, Q, M, L, P), dtype and device of ``value``; used as given, not normalised.

    Returns:
        (B, Q, M * D), dtype of ``value``.

    Raises:
        TypeError: a dtype is not accepted. ValueError: shapes, levels or devices disagree.
    """
    levels = _read_levels(spatial_shapes)
    value, sampling_locations, attention_weights = full_precision_under_autocast(
        value, sampling_locations, attention_weights)
    _check_inputs(value, levels, sampling_locations, attention_weights)
    inputs = (sampling_locations, attention_weights)
    if not _runs_compiled(value, levels):
        return ms_deform_attn_reference(value, levels, *inputs)
    flat_levels = [size for level in levels for size in level]
    if value.device.type == "cpu" and value.dtype in (torch.float16, torch.bfloat16):
        floats = (sampling_locations.float(), attention_weights.float())
        return torch.ops.mmdet3d.ms_deform_attn_forward(value.float(), flat_levels, *floats).to(value.dtype)
    return torch.ops.mmdet3d.ms_deform_attn_forward(value, flat_levels, *inputs)


def _runs_compiled(value: Tensor, levels: list[tuple[int, int]]) -> bool:
    if not (_COMPILED and use_compiled(value)):
        return False
    return not (value.is_cuda and len(levels) > _MAX_CUDA_LEVELS)


def _read_levels(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"spatial_shapes must hold integers (int32 or int64), got {spatial_shapes.dtype}")
        spatial_shapes = spatial_shapes.tolist()
    try:
        pairs = [(height, width) for height, width in spatial_shapes]
    except (TypeError, ValueError):
        raise ValueError(f"spatial_shapes must be one (H, W) for each level, got {spatial_shapes!r}") from None
    levels = [tuple(as_integer("spatial_shapes", size) for size in pair) for pair in pairs]
    if any(size < 1 for level in levels for size in level):
        raise ValueError(f"spatial_shapes must be positive, got {levels}")
    return levels


def _check_inputs(value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    check_dtype("value", value, FLOAT_DTYPES)
    check_dims("value", value, "B, S, M, D")
    for name, tensor, axes in (
        ("sampling_locations", locations, "B, Q, M, L, P, 2"),
        ("attention_weights", weights, "B, Q, M, L, P"),
    ):
        check_same_dtype(name, tensor, "value", value)
        check_same_device(name, tensor, "value", value)
        check_dims(name, tensor, axes)
    B, S, M, _ = value.shape
    _, Q, _, _, P, _ = locations.shape
    pixels = sum(height * width for height, width in levels)
    if S != pixels:
        raise ValueError(f"value must have S = sum of H * W = {pixels} rows for spatial_shapes {levels}, got {S}")
    expected = (B, Q, M, len(levels), P)
    check_shape("sampling_locations", locations, "B, Q, M, L, P, 2", (*expected, 2))
    check_shape("attention_weights", weights, "B, Q, M, L, P", expected)


def _setup_context(ctx, inputs, output) -> None:
    value, ctx.levels, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_out: Tensor):
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.mmdet3d.ms_deform_attn_backward(grad_out, value, ctx.levels, locations, weights)
    return grads[0], None, grads[1], grads[2]


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("ms_deform_attn has no second derivative")


def _forward_fake(value, spatial_shapes, sampling_locations, attention_weights):
    B, _, M, D = value.shape
    return value.new_empty(B, sampling_locations.shape[1], M * D)


def _backward_fake(grad_out, value, spatial_shapes, sampling_locations, attention_weights):
    return tuple(t.new_empty(t.shape) for t in (value, sampling_locations, attention_weights))


def _register() -> None:
    library = torch.library
    library.register_fake("mmdet3d::ms_deform_attn_forward", _forward_fake)
    library.register_fake("mmdet3d::ms_deform_attn_backward", _backward_fake)
    library.register_autograd("mmdet3d::ms_deform_attn_forward", _backward, setup_context=_setup_context)
    library.register_autograd("mmdet3d::ms_deform_attn_backward", _no_second_derivative)


if _COMPILED:
    _register()
