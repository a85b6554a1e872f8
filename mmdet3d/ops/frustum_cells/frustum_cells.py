"""Voxels of frustum points: contract, checks and choice of implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmdet3d.structures import VoxelGrid

from .._checks import check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, built_with_cuda
from .reference import frustum_cells_reference

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "frustum_cells")

#: Types of device that the compiled operator serves; asked once, since a tracer cannot ask the library.
_SERVED = (("cpu", "meta", "cuda") if built_with_cuda() else ("cpu", "meta")) if _COMPILED else ()

_MAX_INT32 = 2**31 - 1


class FrustumGeometry(NamedTuple):
    """N cameras of each of B samples, float32; pixels are those of the network's image.

    That image was made from the original one by an augmentation ``p -> linear @ p + offset``.
    """

    #: (B, N, 2, 2) inverse of ``linear``, from augmented to original pixels (x, y).
    pixel_from_augmented: Tensor
    #: (B, N, 2) translation of the image augmentation (x, y) in pixels of the augmented image.
    offset: Tensor
    #: (B, N, 3, 3) rotation from the camera to the ego frame times the inverse of the intrinsics.
    ego_from_pixel: Tensor
    #: (B, N, 3) the camera's centre in the ego frame, metres.
    translation: Tensor
    #: (B, 4, 4) BEV augmentation, from the ego to the augmented ego frame; its last row is not read.
    bda: Tensor


def frustum_cells(cameras: FrustumGeometry, columns: Tensor, rows: Tensor, depths: Tensor, grid: VoxelGrid, *,
                  truncate_toward_zero: bool = True) -> Tensor:
    """Voxel that each pixel of each camera falls in at each depth.

    For the pixel (u, v) at depth d, with the names of :class:`FrustumGeometry`:

    1. ``(x, y) = pixel_from_augmented @ ((u, v) - offset)``, in the original image
    2. ``(X, Y, Z) = (x * d, y * d, d)``
    3. ``P = ego_from_pixel @ (X, Y, Z) + translation``, metres in the ego frame
    4. ``P = bda[:3, :3] @ P + bda[:3, 3]``, metres in the augmented ego frame
    5. ``c = (P - low) / cell``, the voxel coordinates, which are cut to integers

    **Rounding.** Each step is taken in float32 for each point, and each product and sum of it is rounded, in the order
    of the columns; all versions give the same bits. Composing the matrices before would be more accurate but not the
    same: points within rounding of a voxel's border would fall in the neighbour. See ``docs/parity.md``.

    Args:
        cameras: The cameras, float32.
        columns: (w,) float32 pixels u.
        rows: (h,) float32 pixels v.
        depths: (D,) float32 depths along the optical axis, metres.
        grid: The voxels, in the augmented ego frame.
        truncate_toward_zero: Voxel coordinates are truncated, so that points up to one voxel below the lower bounds
            fall into the border voxels, as the released weights expect. False: floor.

    Returns:
        (B, N, D, h, w) int32 flat index ``(z * Y + y) * X + x``, -1 for points outside of the grid or not finite. No
        gradient flows through it.

    Raises:
        TypeError: ``cameras`` is not a :class:`FrustumGeometry`, or a tensor is not float32.
        ValueError: shapes or devices disagree, or the grid has 2^31 voxels or more.
    """
    _check(cameras, columns, rows, depths, grid)
    with torch.no_grad():
        if depths.device.type in _SERVED:
            return torch.ops.mmdet3d.frustum_cells(
                *cameras, columns, rows, depths, grid.low, grid.cell, grid.size_xyz, truncate_toward_zero)
        return frustum_cells_reference(cameras, columns, rows, depths, grid, truncate_toward_zero=truncate_toward_zero)


def _check(cameras: FrustumGeometry, columns: Tensor, rows: Tensor, depths: Tensor, grid: VoxelGrid) -> None:
    if not isinstance(cameras, FrustumGeometry):
        raise TypeError(f"cameras must be a FrustumGeometry, got {type(cameras).__name__}")
    tensors = {f"cameras.{name}": tensor for name, tensor in cameras._asdict().items()}
    tensors |= {"columns": columns, "rows": rows, "depths": depths}
    for name, tensor in tensors.items():
        check_dtype(name, tensor, (torch.float32,))
        check_same_device(name, tensor, "depths", depths)
    check_dims("cameras.offset", cameras.offset, "B, N, 2")
    B, N = cameras.offset.shape[:2]
    for name, shape in (("pixel_from_augmented", (2, 2)), ("offset", (2,)), ("ego_from_pixel", (3, 3)),
                        ("translation", (3,))):
        check_shape(f"cameras.{name}", getattr(cameras, name), ", ".join(["B, N", *map(str, shape)]), (B, N, *shape))
    check_shape("cameras.bda", cameras.bda, "B, 4, 4", (B, 4, 4))
    for name, tensor, axes in (("columns", columns, "w"), ("rows", rows, "h"), ("depths", depths, "D")):
        check_dims(name, tensor, axes)
    if grid.num_voxels > _MAX_INT32:
        raise ValueError(f"grid must have at most {_MAX_INT32} voxels, got {grid.size_xyz} (X, Y, Z)")


if _COMPILED:

    @torch.library.register_fake("mmdet3d::frustum_cells")
    def _(pixel_from_augmented, offset, ego_from_pixel, translation, bda, columns, rows, depths, *others):
        shape = (*offset.shape[:2], depths.shape[0], rows.shape[0], columns.shape[0])
        return offset.new_empty(shape, dtype=torch.int32)
