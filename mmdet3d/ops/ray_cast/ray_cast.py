"""Ray casting: contract, checks and choice of implementation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, built_with_cuda
from .hits import MAX_STEPS, RayHits
from .reference import ray_cast_reference

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "ray_cast")

#: Types of device that the compiled operator serves; asked once, since a tracer cannot ask the library.
_SERVED = (("cpu", "meta", "cuda") if built_with_cuda() else ("cpu", "meta")) if _COMPILED else ()


def ray_cast(
    grids: Tensor,
    origins: Tensor,
    rays: Tensor,
    grid_index: Tensor | None = None,
    *,
    free_label: int,
    low: Sequence[float],
    cell_size: float,
    max_steps: int = MAX_STEPS,
    with_entry: bool = False,
) -> RayHits:
    """First voxel along each ray that is not free.

    Rays walk from voxel to voxel (Amanatides and Woo, "A Fast Voxel Traversal Algorithm for Ray Tracing", 1987), by
    the rules of the RayIoU metric (Liu et al., "Fully Sparse 3D Occupancy Prediction", arXiv 2312.17118), so that
    distances and voxels of every version of this operator are equal bit for bit:

    - Origin ``q`` and end point ``q + ray`` become grid units ``(p - low) / cell_size`` in float64, with
      ``cell_size`` rounded to float32 before, and are rounded to float32. All else is float64 without fused
      multiplication and addition; the border of each axis is reached after repeated addition of its period.
    - A ray starts in the voxel whose indices are the origin's, cut off towards zero: an origin less than one voxel
      below the grid starts in the grid, and may leave its voxel at a distance of zero or below.
    - Of borders that are equally far, that of y counts before that of x, and that of z before both.
    - An origin further outside sees nothing until its ray enters the grid; distances count from the origin.
    - Distances are rounded to float32 in voxels, then multiplied by ``cell_size`` in float32.

    The end point gives nothing but the direction: rays go on until they hit, leave the grid or have crossed
    ``max_steps`` borders. Rays without direction (zero, too short to show after rounding) or with coordinates that
    are not finite, and rays from an origin 2**30 or more voxels away from ``low``, pass no voxel.

    The operator has no gradient.

    Args:
        grids: (B, X, Y, Z) uint8 labels.
        origins: (N, 3) float64 or float32 start points (x, y, z) in metres, in the frame of the grids.
        rays: (R, 3) directions that all origins share, or (N, R, 3), float32 or float64 metres; any length.
        grid_index: (N,) int64 or int32 grid of each origin, 0 to B - 1; None if there is one grid only.
        free_label: Label through which rays pass; every other label blocks.
        low: Lower corner (x, y, z) of the grids in metres.
        cell_size: Edge length of the (cubic) voxels in metres.
        max_steps: Borders that a ray crosses at most, those outside the grid included.
        with_entry: Also return the distance and the face at which the voxel is entered.

    Returns:
        Voxels, distances and what was hit, (N, R) each.

    Raises:
        ValueError: shapes or devices disagree, an index names no grid, a grid has no voxel or 2**31 and more, or an
            option is out of its range.
        TypeError: a dtype is not accepted.
    """
    if grid_index is None:
        check_dims("grids", grids, "B, X, Y, Z")
        if grids.shape[0] != 1:
            raise ValueError(f"grid_index is needed to choose from {grids.shape[0]} grids")
        grid_index = torch.zeros(origins.shape[:1], dtype=torch.int64, device=grids.device)
    _check_tensors(grids, origins, rays, grid_index)
    _check_options(free_label, low, cell_size, max_steps)
    inputs = (grids, origins.double(), rays, grid_index.long())
    options = (free_label, [float(bound) for bound in low], float(cell_size), max_steps, with_entry)
    if grids.device.type not in _SERVED:
        return ray_cast_reference(*inputs, free_label=free_label, low=low, cell_size=cell_size, max_steps=max_steps,
                                  with_entry=with_entry)
    voxel, distance, hit, entry, axis = torch.ops.mmdet3d.ray_cast(*inputs, *options)
    return RayHits(voxel, distance, hit, *((entry, axis) if with_entry else ()))


def _check_tensors(grids: Tensor, origins: Tensor, rays: Tensor, grid_index: Tensor) -> None:
    check_dtype("grids", grids, (torch.uint8,))
    check_dims("grids", grids, "B, X, Y, Z")
    if not 0 < grids.shape[1:].numel() < 2**31:
        raise ValueError(f"grids must hold 1 to 2**31 - 1 voxels each, got shape {tuple(grids.shape)}")
    for name, tensor in (("origins", origins), ("rays", rays)):
        check_dtype(name, tensor, (torch.float32, torch.float64))
        check_same_device(name, tensor, "grids", grids)
    check_shape("origins", origins, "N, 3", (*origins.shape[:1], 3))
    leading = origins.shape[:1] if rays.dim() == 3 else ()
    axes = "N, R, 3" if rays.dim() == 3 else "R, 3"
    check_dims("rays", rays, axes)
    check_shape("rays", rays, axes, (*leading, rays.shape[-2], 3))
    check_dtype("grid_index", grid_index, (torch.int64, torch.int32))
    check_same_device("grid_index", grid_index, "grids", grids)
    check_shape("grid_index", grid_index, "N", origins.shape[:1])


def _check_options(free_label: int, low: Sequence[float], cell_size: float, max_steps: int) -> None:
    if not 0 <= free_label <= 255:
        raise ValueError(f"free_label must be 0 to 255, got {free_label}")
    if len(low) != 3 or not all(math.isfinite(bound) for bound in low):
        raise ValueError(f"low must be three finite numbers (x, y, z), got {low}")
    if not (math.isfinite(cell_size) and cell_size > 0):
        raise ValueError(f"cell_size must be positive, got {cell_size}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


if _COMPILED:

    @torch.library.register_fake("mmdet3d::ray_cast")
    def _(grids, origins, rays, grid_index, free_label, low, cell_size, max_steps, with_entry):
        shape = (origins.shape[0], rays.shape[-2])
        extra = shape if with_entry else (0,)
        return (
            grids.new_empty(shape, dtype=torch.int32), grids.new_empty(shape, dtype=torch.float32),
            grids.new_empty(shape, dtype=torch.bool), grids.new_empty(extra, dtype=torch.float32),
            grids.new_empty(extra, dtype=torch.int8),
        )
