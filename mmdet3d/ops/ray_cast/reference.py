"""Plain PyTorch version of ray casting: what the compiled versions are judged by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .hits import MAX_STEPS, RayHits

#: Stands for "never" where a ray is parallel to an axis.
_NEVER = torch.finfo(torch.float64).max

#: Origins this many voxels away from the corner or further pass no voxel; nearer ones have integer indices.
FAR = 2.0**30


def grid_units(points: Tensor, low: Sequence[float], cell_size: float) -> Tensor:
    """(..., 3) float64 positions in voxels from ``low``, rounded to float32, of ``points`` in metres, float64."""
    cell = torch.tensor(cell_size, dtype=torch.float32).double().to(points.device)
    return ((points - points.new_tensor(low)) / cell).float().double()


def ray_cast_reference(
    grids: Tensor,
    origins: Tensor,
    rays: Tensor,
    grid_index: Tensor,
    *,
    free_label: int,
    low: Sequence[float],
    cell_size: float,
    max_steps: int = MAX_STEPS,
    with_entry: bool = False,
) -> RayHits:
    """Same contract as :func:`mmdet3d.ops.ray_cast.ray_cast`, without its checks. All rays take a step at a time."""
    shape = (origins.shape[0], rays.shape[-2])
    if grid_index.numel() and not bool(((grid_index >= 0) & (grid_index < grids.shape[0])).all()):
        raise ValueError(f"grid_index must name one of the {grids.shape[0]} grids")
    start = grid_units(origins.double(), low, cell_size)[:, None]  # (N, 1, 3)
    ray = grid_units(rays.double() + origins.double()[:, None], low, cell_size) - start  # (N, R, 3)
    square = ray * ray
    length = (square[..., 0] + square[..., 1] + square[..., 2]).sqrt()
    valid = (length > 0) & length.isfinite() & (start.abs() < FAR).all(-1)
    result = _Result(shape, origins.device)
    rows = valid.flatten().nonzero()[:, 0]
    walk = _Walk(start.expand(*shape, 3).reshape(-1, 3)[rows], (ray / length[..., None]).reshape(-1, 3)[rows])
    walk.rows, walk.grid = rows, grid_index[:, None].expand(shape).reshape(-1)[rows]
    walk.run(grids, free_label, max_steps, result)
    return result.hits(shape, cell_size, with_entry)


class _Result:
    """Last voxel of every ray so far, distances in voxels."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        count = shape[0] * shape[1]
        self.voxel = torch.zeros(count, dtype=torch.int32, device=device)
        self.exit = torch.full((count,), -1.0, dtype=torch.float64, device=device)
        self.entry = self.exit.clone()
        self.axis = torch.full((count,), -1, dtype=torch.int8, device=device)
        self.hit = torch.zeros(count, dtype=torch.bool, device=device)

    def hits(self, shape: tuple[int, int], cell_size: float, with_entry: bool) -> RayHits:
        """In metres."""
        cell = torch.tensor(cell_size, dtype=torch.float32, device=self.exit.device)
        distance = (self.exit.float() * cell).view(shape)
        extra = ((self.entry.float() * cell).view(shape), self.axis.view(shape)) if with_entry else ()
        return RayHits(self.voxel.view(shape), distance, self.hit.view(shape), *extra)


class _Walk:
    """The rays that still go on."""

    def __init__(self, start: Tensor, direction: Tensor) -> None:
        self.cell = start.long()  # cuts off towards zero
        self.step = torch.where(direction >= 0, 1, -1)
        parallel = direction == 0
        border = (self.cell + (self.step > 0)).double()
        self.next = torch.where(parallel, _NEVER, (border - start) / direction)
        self.period = torch.where(parallel, _NEVER, self.step / direction)
        self.entry = torch.zeros_like(self.next[:, 0])
        self.axis = torch.full_like(self.cell[:, 0], -1)
        self.entered = torch.zeros_like(self.axis, dtype=torch.bool)

    def keep(self, which: Tensor) -> None:
        """Forget the rays that are not among ``which``."""
        for name, value in vars(self).items():
            setattr(self, name, value[which])

    def run(self, grids: Tensor, free_label: int, max_steps: int, result: _Result) -> None:
        """Walk all rays to their ends."""
        size = torch.tensor(grids.shape[1:], device=grids.device)
        labels = grids.reshape(grids.shape[0], -1)
        for _ in range(max_steps):
            inside = ((self.cell >= 0) & (self.cell < size)).all(dim=1)
            self.keep(inside | ~self.entered)
            if len(self.rows) == 0:
                return
            inside = ((self.cell >= 0) & (self.cell < size)).all(dim=1)
            self.entered = inside
            axis = self._next_axis()
            time = self.next.gather(1, axis[:, None])[:, 0]
            voxel = (self.cell[:, 0] * size[1] + self.cell[:, 1]) * size[2] + self.cell[:, 2]
            blocked = labels[self.grid, voxel.where(inside, 0)] != free_label
            rows = self.rows[inside]
            result.voxel[rows], result.exit[rows] = voxel[inside].int(), time[inside]
            result.entry[rows], result.axis[rows] = self.entry[inside], self.axis[inside].to(torch.int8)
            result.hit[rows] = blocked[inside]
            chosen = axis[:, None] == torch.arange(3, device=axis.device)
            self.cell = self.cell + self.step * chosen
            self.next = torch.where(chosen, self.next + self.period, self.next)
            self.entry, self.axis = time, axis
            self.keep(~(blocked & inside))

    def _next_axis(self) -> Tensor:
        """(rays,) axis of the nearest border."""
        x, y, z = self.next.unbind(dim=1)
        first = torch.where(x < y, 0, 1)
        return torch.where(torch.where(x < y, x, y) < z, first, 2)
