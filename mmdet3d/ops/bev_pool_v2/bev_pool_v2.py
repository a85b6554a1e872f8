"""BEVPoolv2: sum depth-weighted image features into the voxels that their frustum points fall in.

Source: J. Huang and G. Huang, "BEVPoolv2: A Cutting-edge Implementation of BEVDet Toward Deployment",
arXiv:2211.17111.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    as_integer,
    check_dims,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    full_precision_under_autocast,
)
from .._library import AVAILABLE, built_with_cuda, use_compiled
from .reference import bev_pool_v2_reference, sort_by_cell_reference

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "bev_pool_v2_forward")
#: False for a library that was built before this operator was written.
_STACKED = _COMPILED and hasattr(torch.ops.mmdet3d, "bev_pool_v2_stacked")
_MAX_INT32 = 2**31 - 1


class PoolOrder(NamedTuple):
    """Frustum points sorted by voxel, made by ``sort_by_cell``; valid for as long as ``cell_index`` does not change.

    The points of voxel ``v = (b * Z + z) * Y * X + y * X + x`` are ``points[starts[v]:starts[v + 1]]``. A voxel without
    points has an interval of length 0, so no shape depends on the data and building it never waits for the GPU.
    """

    #: (B * N * D * H * W,) int32 flat index of (b, n, d, h, w); increasing within a voxel, points outside come last.
    points: Tensor
    #: (B * Z * Y * X + 1,) int32 position in ``points`` of the first point of each voxel.
    starts: Tensor


def bev_pool_v2(
    depth: Tensor,
    context: Tensor,
    cell_index: Tensor,
    grid_size: tuple[int, int, int],
    *,
    order: PoolOrder | None = None,
) -> Tensor:
    """Sum depth-weighted image features into the voxels they fall in.

    ``out[b, :, z, y, x]`` is the sum of ``depth[b, n, d, h, w] * context[b, n, h, w, :]`` over the points with
    ``cell_index[b, n, d, h, w] == (z * Y + y) * X + x``, added one after the other in increasing flat index of
    (b, n, d, h, w), in float32 (float64 for float64 inputs). The compiled versions give the same bits in every run,
    forward and backward.

    Args:
        depth: (B, N, D, H, W) probability of each depth bin; N cameras. float32 or float64; float16 and bfloat16 are
            computed in float32.
        context: (B, N, H, W, C) image features, same dtype and device.
        cell_index: (B, N, D, H, W) int32 or int64 flat index ``(z * Y + y) * X + x`` of the voxel that holds the
            frustum point, or -1 outside the grid. Any value outside [0, Z * Y * X) counts as outside; values are not
            checked otherwise, because that would wait for the GPU. Not differentiable.
        grid_size: (Z, Y, X) voxels along each axis of the ego grid.
        order: ``sort_by_cell(cell_index, grid_size)`` where the same ``cell_index`` is pooled more than once;
            sorted here if None. It must belong to ``cell_index``, which is not checked.

    Returns:
        (B, C, Z, Y, X) sums, contiguous, dtype of ``depth``. A voxel without points is exactly 0.

    Raises:
        TypeError: a dtype is not accepted. ValueError: shapes or devices disagree, or a size exceeds int32.
    """
    grid_size = _check_grid(grid_size)
    depth, context = full_precision_under_autocast(depth, context)
    _check_inputs(depth, context, cell_index, grid_size)
    if order is not None:
        _check_order(order, cell_index, grid_size)
    if not (_COMPILED and use_compiled(depth)):
        return bev_pool_v2_reference(depth, context, cell_index, grid_size)
    if order is None:
        order = sort_by_cell(cell_index, grid_size)
    if depth.device.type == "cpu" and depth.dtype in (torch.float16, torch.bfloat16):
        volume = _forward_op(depth.float(), context.float(), cell_index, order, grid_size)
        return volume.to(depth.dtype)
    return _forward_op(depth, context, cell_index, order, grid_size)


def bev_pool_v2_stacked(
    depth: Tensor,
    context: Tensor,
    cell_index: Tensor,
    grid_size: tuple[int, int, int],
    frames: int,
    *,
    order: PoolOrder | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`bev_pool_v2` of several frames of each sample, as the channels of one volume.

    Args:
        depth, context, cell_index: As for :func:`bev_pool_v2`, of F * B samples: frame after frame, B in each.
        grid_size, order: As for :func:`bev_pool_v2`.
        frames: F.
        dtype: Of the result, rounded to from the sums; default: that of ``depth``.

    Returns:
        (B, F * C, Z, Y, X), the channels of frame f from f * C on; channels last in memory where it comes from the
        fused CUDA kernel: for float32 ``depth`` while no gradient is recorded.

    Raises:
        TypeError, ValueError: as :func:`bev_pool_v2`, or the samples are not F frames of the same number.
    """
    if as_integer("frames", frames) < 1 or depth.shape[0] % frames:
        raise ValueError(f"frames must divide the {depth.shape[0]} samples, got {frames}")
    depth, context = full_precision_under_autocast(depth, context)
    dtype = depth.dtype if dtype is None else dtype
    recorded = torch.is_grad_enabled() and (depth.requires_grad or context.requires_grad)
    fused = _STACKED and depth.is_cuda and built_with_cuda() and not recorded and dtype in FLOAT_DTYPES
    if not (fused and depth.dtype == torch.float32 and dtype != torch.float64):
        volume = bev_pool_v2(depth, context, cell_index, grid_size, order=order)
        return volume.unflatten(0, (frames, -1)).transpose(0, 1).flatten(1, 2).to(dtype)
    grid_size = _check_grid(grid_size)
    _check_inputs(depth, context, cell_index, grid_size)
    if order is None:
        order = sort_by_cell(cell_index, grid_size)
    else:
        _check_order(order, cell_index, grid_size)
    rows = torch.ops.mmdet3d.bev_pool_v2_stacked(depth, context, order.points, order.starts, grid_size, frames, dtype)
    return rows.permute(0, 4, 1, 2, 3)


def sort_by_cell(cell_index: Tensor, grid_size: tuple[int, int, int]) -> PoolOrder:
    """Sort frustum points by (sample, voxel), stably, for ``bev_pool_v2(..., order=...)``.

    Args:
        cell_index: (B, N, D, H, W) int32 or int64, as for ``bev_pool_v2``.
        grid_size: (Z, Y, X).

    Returns:
        The order, on the device of ``cell_index``.

    Raises:
        TypeError: ``cell_index`` is not int32 or int64. ValueError: it has not five axes, or a size exceeds int32.
    """
    grid_size = _check_grid(grid_size)
    check_dtype("cell_index", cell_index, INDEX_DTYPES)
    check_dims("cell_index", cell_index, "B, N, D, H, W")
    num_cells = math.prod(grid_size)
    _check_int32("cell_index", cell_index, cell_index.shape[0] * num_cells)
    if _COMPILED and cell_index.device.type == "cpu":
        return PoolOrder(*torch.ops.mmdet3d.bev_pool_v2_sort(cell_index, num_cells))
    return PoolOrder(*sort_by_cell_reference(cell_index, num_cells))


def _check_grid(grid_size: tuple[int, int, int]) -> tuple[int, int, int]:
    grid_size = tuple(as_integer("grid_size", n) for n in grid_size)
    if len(grid_size) != 3 or any(n < 1 for n in grid_size):
        raise ValueError(f"grid_size must be three positive integers (Z, Y, X), got {grid_size}")
    return grid_size


def _check_inputs(depth: Tensor, context: Tensor, cell_index: Tensor, grid_size: tuple[int, int, int]) -> None:
    check_dtype("depth", depth, FLOAT_DTYPES)
    check_same_dtype("context", context, "depth", depth)
    check_dtype("cell_index", cell_index, INDEX_DTYPES)
    check_same_device("context", context, "depth", depth)
    check_same_device("cell_index", cell_index, "depth", depth)
    check_dims("depth", depth, "B, N, D, H, W")
    check_dims("context", context, "B, N, H, W, C")
    B, N, _, H, W = depth.shape
    check_shape("context", context, "B, N, H, W, C", (B, N, H, W, context.shape[-1]))
    check_shape("cell_index", cell_index, "B, N, D, H, W", depth.shape)
    _check_int32("cell_index", cell_index, B * math.prod(grid_size))


def _check_int32(name: str, cell_index: Tensor, num_voxels: int) -> None:
    if cell_index.numel() >= _MAX_INT32 or num_voxels >= _MAX_INT32:
        raise ValueError(
            f"{name} has {cell_index.numel()} points and the grids of the batch {num_voxels} voxels; "
            f"at most {_MAX_INT32 - 1} of each are supported"
        )


def _check_order(order: PoolOrder, cell_index: Tensor, grid_size: tuple[int, int, int]) -> None:
    if not isinstance(order, PoolOrder):
        raise TypeError(f"order must be a PoolOrder made by sort_by_cell, got {type(order).__name__}")
    voxels = cell_index.shape[0] * math.prod(grid_size)
    for name, tensor, axes, size in (
        ("order.points", order.points, "B * N * D * H * W,", cell_index.numel()),
        ("order.starts", order.starts, "B * Z * Y * X + 1,", voxels + 1),
    ):
        check_dtype(name, tensor, (torch.int32,))
        check_same_device(name, tensor, "cell_index", cell_index)
        check_shape(name, tensor, axes, (size,))


def _forward_op(
    depth: Tensor, context: Tensor, cell_index: Tensor, order: PoolOrder, grid_size: tuple[int, int, int]
) -> Tensor:
    return torch.ops.mmdet3d.bev_pool_v2_forward(depth, context, cell_index, order.points, order.starts, grid_size)


def _setup_context(ctx, inputs, output) -> None:
    depth, context, cell_index, _, _, _ = inputs
    ctx.save_for_backward(depth, context, cell_index)


def _backward(ctx, grad_volume: Tensor):
    depth, context, cell_index = ctx.saved_tensors
    grad_depth, grad_context = torch.ops.mmdet3d.bev_pool_v2_backward(grad_volume, depth, context, cell_index)
    return grad_depth, grad_context, None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("bev_pool_v2 has no second derivative")


def _forward_fake(depth, context, cell_index, points, starts, grid_size):
    return context.new_empty(context.shape[0], context.shape[-1], *grid_size)


def _backward_fake(grad_volume, depth, context, cell_index):
    return depth.new_empty(depth.shape), context.new_empty(context.shape)


def _sort_fake(cell_index, num_cells):
    options = {"dtype": torch.int32, "device": cell_index.device}
    starts = torch.empty(cell_index.shape[0] * num_cells + 1, **options)
    return torch.empty(cell_index.numel(), **options), starts


def _stacked_fake(depth, context, points, starts, grid_size, frames, dtype):
    size = (context.shape[0] // frames, *grid_size, frames * context.shape[-1])
    return context.new_empty(size, dtype=dtype)


def _register() -> None:
    library = torch.library
    if _STACKED:
        library.register_fake("mmdet3d::bev_pool_v2_stacked", _stacked_fake)
    library.register_fake("mmdet3d::bev_pool_v2_sort", _sort_fake)
    library.register_fake("mmdet3d::bev_pool_v2_forward", _forward_fake)
    library.register_fake("mmdet3d::bev_pool_v2_backward", _backward_fake)
    library.register_autograd("mmdet3d::bev_pool_v2_forward", _backward, setup_context=_setup_context)
    library.register_autograd("mmdet3d::bev_pool_v2_backward", _no_second_derivative)


if _COMPILED:
    _register()
