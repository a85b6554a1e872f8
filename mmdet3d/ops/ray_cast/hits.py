"""What casting rays gives."""

from typing import NamedTuple

import torch
from torch import Tensor

#: Voxel borders that a ray crosses at most, that of the reference evaluation included. No ray that starts inside a
#: grid of 200 x 200 x 16 voxels crosses more than 416.
MAX_STEPS = 1001


class RayHits(NamedTuple):
    """Where rays end; N origins, R rays each.

    Attributes:
        voxel: (N, R) int32 flat index ``(x * Y + y) * Z + z`` of the first voxel that is not free, else of the last
            voxel that the ray passes, else (it passes none) 0.
        distance: (N, R) float32 metres from the origin to where the ray LEAVES that voxel; ``-cell_size`` if the ray
            passes no voxel.
        hit: (N, R) bool, whether the voxel is not free.
        entry: (N, R) float32 metres from the origin to where the ray enters that voxel: 0 if it starts in there,
            ``-cell_size`` if it passes none. None unless asked for.
        axis: (N, R) int8 axis, 0 = x, 1 = y, 2 = z, of the face through which the ray enters; it comes from the side
            that the sign of the ray's component says. -1 if it starts in the voxel or passes none. None unless asked
            for.
    """

    voxel: Tensor
    distance: Tensor
    hit: Tensor
    entry: Tensor | None = None
    axis: Tensor | None = None

    def cells(self, size_xyz: tuple[int, int, int]) -> Tensor:
        """(N, R, 3) int32 indices (x, y, z) of ``voxel`` in a grid of that size."""
        _, size_y, size_z = size_xyz
        column = self.voxel.div(size_z, rounding_mode="floor")
        x = column.div(size_y, rounding_mode="floor")
        return torch.stack([x, column - x * size_y, self.voxel - column * size_z], dim=-1)
