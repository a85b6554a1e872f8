"""Coarse label grids for the losses at 1/2, 1/4 and 1/8 of the resolution, from the full-resolution grid.

A block of ``factor`` voxels a side becomes free space if more than 95 % of its voxels are free, otherwise the most
frequent class in it. Every scale is computed from the full resolution, not from the next finer scale.

How it is fast: on a street nine voxels out of ten are free, so work is only done where something is. The grid is cut
into 2x2x2 cells (when the factors are even), cells that are wholly free are skipped by comparing whole words, and the
votes of all remaining cells are counted by one ``bincount`` per scale. The cells are shared by the scales.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from mmdet3d.datasets.labels import GRID_SIZE, IGNORE_LABEL

FACTORS = (2, 4, 8)
"""Down-sampling factors of the label files ``labels_1_2.npz``, ``labels_1_4.npz`` and ``labels_1_8.npz``."""

FREE_SHARE = 0.95
"""A block is free space if more than this share of its voxels is."""


Factor = int | Sequence[int]
"""Side of a block in voxels: one number, or one for each of x, y and z."""


def block_shape(factor: Factor) -> tuple[int, int, int]:
    """(x, y, z) voxels of a block.

    Raises:
        ValueError: ``factor`` is not one or three positive whole numbers.
    """
    sides = (factor,) * 3 if isinstance(factor, int | np.integer) else tuple(factor)
    if len(sides) != 3 or any(not isinstance(side, int | np.integer) or side < 1 for side in sides):
        raise ValueError(f"factor {factor!r}: expected one or three positive whole numbers")
    return tuple(int(side) for side in sides)


def downsample_labels(labels: np.ndarray, factor: Factor, free_index: int) -> np.ndarray:
    """Label grid at ``1 / factor`` of the resolution.

    For every block of ``factor``³ voxels, or of x times y times z voxels if ``factor`` is three numbers:

    1. If more than 95 % of them are ``free_index``, the block is free.
    2. Otherwise it gets the most frequent label in [0, ``free_index`` - 1], the smallest one of several equally
       frequent ones. Other values (255, anything above ``free_index``, negative numbers) have no vote, but do not
       count as free either.
    3. A block that is not free and has no vote gets 255 (ignored).

    Args:
        labels: [X, Y, Z] of any integer dtype.
        factor: Block side in voxels, or (x, y, z) sides; must divide X, Y and Z.
        free_index: Label of free space, 1..254.

    Returns:
        uint8 [X / factor, Y / factor, Z / factor]: 0..free_index, or 255.

    Raises:
        TypeError: ``labels`` are not integers. ValueError: not three axes, ``factor`` does not divide them, or
            ``free_index`` is out of range.
    """
    return downsample_scales(labels, (factor,), free_index)[0]


def downsample_scales(labels: np.ndarray, factors: Sequence[Factor], free_index: int) -> list[np.ndarray]:
    """What :func:`downsample_labels` gives for each of ``factors``, faster together than one by one."""
    if not 1 <= free_index <= 254:
        raise ValueError(f"free_index: expected 1..254, got {free_index}")
    _settle_allocator()
    blocks = [block_shape(factor) for factor in factors]
    grid = _as_bytes(labels, blocks)
    even = all(side % 2 == 0 for block in blocks for side in block)
    cells = _cells_of_eight(grid, free_index) if even else _cells_of_one(grid, free_index)
    return [_vote(cells, block, free_index) for block in blocks]


def blocks_of(size_xyz: Sequence[int]) -> tuple[int, int, int]:
    """Voxels of the labels as released that a voxel of a coarser grid with the same bounds spans along x, y and z.

    Raises:
        ValueError: the ``size_xyz`` voxels are no whole blocks.
    """
    size = tuple(size_xyz)
    if len(size) != 3 or any(n < 1 or whole % n for n, whole in zip(size, GRID_SIZE, strict=True)):
        raise ValueError(f"semantics must have shape (X, Y, Z) = {GRID_SIZE}, or that of a grid of whole blocks of "
                         f"these; {size} voxels cannot be compared")
    return tuple(whole // n for n, whole in zip(size, GRID_SIZE, strict=True))


def coarsen_mask(mask: np.ndarray, labels: np.ndarray, coarse_labels: np.ndarray) -> np.ndarray:
    """Which voxels of a coarser grid count as observed.

    A coarse voxel is observed if at least one of its fine voxels is observed and has the label of the coarse voxel:
    what the label says was then seen somewhere in it, and is not only known from lidar.

    Args:
        mask: (X, Y, Z), not zero where a voxel is observed.
        labels: (X, Y, Z) labels.
        coarse_labels: (X / a, Y / b, Z / c) labels of blocks of a x b x c voxels.

    Returns:
        (X / a, Y / b, Z / c) uint8, 0 or 1.
    """
    if coarse_labels is labels:
        return (mask != 0).astype(np.uint8)
    blocks = _blocks(labels.shape, coarse_labels.shape)
    seen = (labels.reshape(blocks) == coarse_labels[:, None, :, None, :, None]) & (mask.reshape(blocks) != 0)
    return seen.any(axis=(1, 3, 5)).astype(np.uint8)


def coarsen_flow(flow: np.ndarray, labels: np.ndarray, coarse_labels: np.ndarray) -> np.ndarray:
    """Flow of a coarser grid: the mean over those fine voxels of a block that have the label of the coarse voxel.

    The value 255, which stands for "unknown", does not enter the mean; where nothing else is there, it stays. A coarse
    voxel whose label none of its fine voxels has gets 0.

    Args:
        flow: (X, Y, Z, 2) velocity along x and y in m/s.
        labels: (X, Y, Z) labels.
        coarse_labels: (X / a, Y / b, Z / c) labels of blocks of a x b x c voxels.

    Returns:
        (X / a, Y / b, Z / c, 2) in the type of ``flow``, float32 for whole numbers; ``flow`` itself if
        ``coarse_labels`` is ``labels``.
    """
    if coarse_labels is labels:
        return flow
    blocks = _blocks(labels.shape, coarse_labels.shape)
    values = flow.reshape(*blocks, 2)
    busy = np.nonzero((values != 0).any(axis=(1, 3, 5, 6)))  # K of the coarse voxels: where nothing moves, all is 0
    x, y, z = busy
    values = values[x, :, y, :, z]  # (K, a, b, c, 2)
    same = (labels.reshape(blocks)[x, :, y, :, z] == coarse_labels[busy][:, None, None, None])[..., None]
    known = same & (values != IGNORE_LABEL)
    inside = (1, 2, 3)
    count = known.sum(axis=inside)
    mean = np.where(known, values, 0).sum(axis=inside, dtype=np.float64) / np.maximum(count, 1)
    result = np.zeros((*coarse_labels.shape, 2), flow.dtype if flow.dtype.kind == "f" else np.float32)
    result[busy] = np.where((count == 0) & same.any(axis=inside), IGNORE_LABEL, mean)
    return result


def _blocks(fine: Sequence[int], coarse: Sequence[int]) -> list[int]:
    """Shape that gives every block of a fine grid axes of its own: (X / a, a, Y / b, b, Z / c, c)."""
    return [size for n, whole in zip(coarse, fine, strict=True) for size in (n, whole // n)]


@functools.cache
def _settle_allocator() -> None:
    """Free one large array, once in a process.

    The C library of Linux hands freed memory back to the system, to be asked for again page by page, unless the
    process has freed something larger before. For the arrays of this module that would take half of the time.
    """
    np.empty(1 << 23, np.uint8)


def _as_bytes(labels: np.ndarray, blocks: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The grid as contiguous uint8; what does not fit has no vote anyway and becomes 255."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels: expected whole numbers, got {labels.dtype}")
    if labels.ndim != 3 or 0 in labels.shape:
        raise ValueError(f"labels: expected a grid [X, Y, Z], got shape {labels.shape}")
    for block in blocks:
        if any(size % side for size, side in zip(labels.shape, block, strict=True)):
            name = block[0] if len(set(block)) == 1 else block
            raise ValueError(f"factor {name} does not divide the grid {labels.shape}")
    if labels.dtype != np.uint8:
        inside = (labels >= 0) & (labels <= 255)
        labels = np.where(inside, labels.astype(np.uint8), np.uint8(IGNORE_LABEL))
    return np.ascontiguousarray(labels)


class _Cells:
    """The cells of a grid that are not wholly free, and the votes in them.

    A cell whose voxels agree casts one vote with their number as weight; in a mixed cell each voxel has its own.

    Attributes:
        shape: Shape of the grid in voxels.
        side: Cell side in voxels, 1 or 2.
        position: Three (M,) arrays, the cell's coordinates in cells.
        filled: (M,) number of voxels that are not free.
        winner: (M,) uint8 result of the cell taken as a block: its most frequent class, 255 without any vote.
        voters: (V,) index of the cell of each vote.
        votes: (V,) uint8 label of each vote.
        weights: (V,) uint8 how often it counts.
    """

    def __init__(self, shape: tuple[int, ...], side: int, index: np.ndarray, labels: np.ndarray, free: int) -> None:
        self.shape, self.side = shape, side
        x, yz = _divmod(index, (shape[1] // side) * (shape[2] // side))
        self.position = x, *_divmod(yz, shape[2] // side)
        self.filled = _count(labels != free)
        valid = labels < free  # (side³, M)
        smallest = labels.min(axis=0)
        largest = (labels * valid).max(axis=0)
        self.winner = np.where(smallest < free, smallest, np.uint8(IGNORE_LABEL))
        uniform, mixed = np.flatnonzero(smallest == largest), np.flatnonzero(smallest < largest)
        some = labels.take(mixed, axis=1)  # (side³, K)
        valid_some = some < free
        self.winner[mixed] = _most_frequent(some, valid_some)
        self.voters = np.concatenate([uniform, np.broadcast_to(mixed, some.shape)[valid_some]])
        self.votes = np.concatenate([smallest[uniform], some[valid_some]])
        self.weights = np.ones(len(self.votes), np.uint8)
        self.weights[: len(uniform)] = _count(valid)[uniform]


def _count(mask: np.ndarray) -> np.ndarray:
    """(n, M) bool, n < 256, to (M,) uint8 number of true entries."""
    return np.add.reduce(mask.view(np.uint8), axis=0, dtype=np.uint8)


def _most_frequent(labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Most frequent label of each column of (n, K) uint8, of equals the smallest; at least one must be ``valid``."""
    equal = (labels[:, None] == labels).view(np.uint8)  # (n, n, K)
    score = np.add.reduce(equal, axis=0, dtype=np.uint8).astype(np.uint16) << 8 | (IGNORE_LABEL - labels)
    return (IGNORE_LABEL - (score * valid).max(axis=0) % 256).astype(np.uint8)


def _divmod(value: np.ndarray, divisor: int) -> tuple[np.ndarray, np.ndarray]:
    """``np.divmod`` for non-negative numbers; NumPy's own does not use vector instructions."""
    quotient = value // divisor
    return quotient, value - quotient * divisor


def _widest(array: np.ndarray) -> np.ndarray:
    """The same bytes in the widest words that the last axis allows: few large items instead of many small ones."""
    length = array.shape[-1] * array.itemsize
    return array.view(f"u{next(width for width in (8, 4, 2, 1) if length % width == 0)}")


def _cells_of_one(grid: np.ndarray, free: int) -> _Cells:
    """Every voxel a cell of its own."""
    index = np.flatnonzero(grid != free)
    return _Cells(grid.shape, 1, index, grid.reshape(1, -1)[:, index], free)


def _cells_of_eight(grid: np.ndarray, free: int) -> _Cells:
    """Cells of 2x2x2 voxels."""
    X, Y, Z = grid.shape
    pairs = grid.view(np.uint16)  # [X, Y, Z / 2] neighbours in z; below, byte order does not matter
    busy = _widest((pairs != free * 0x0101).reshape(X // 2, 2, Y // 2, 2, Z // 2))
    busy = busy[:, 0] | busy[:, 1]
    busy = np.ascontiguousarray(busy[:, :, 0] | busy[:, :, 1]).view(bool)
    index = np.flatnonzero(busy)
    x, yz = _divmod(index, (Y // 2) * (Z // 2))
    y, z = _divmod(yz, Z // 2)
    corner = (x * (2 * Y) + y * 2) * (Z // 2) + z
    labels = np.empty((8, len(index)), np.uint8)
    for row, offset in enumerate((0, Z // 2, Y * (Z // 2), (Y + 1) * (Z // 2))):
        column = pairs.reshape(-1)[offset:].take(corner)
        np.bitwise_and(column, 0xFF, out=labels[row], casting="unsafe")
        np.right_shift(column, 8, out=labels[row + 4], casting="unsafe")
    return _Cells(grid.shape, 2, index, labels, free)


def _vote(cells: _Cells, sides: tuple[int, int, int], free: int) -> np.ndarray:
    """Count the votes of all blocks of ``sides`` voxels, which are multiples of the cell side."""
    shape = tuple(size // side for size, side in zip(cells.shape, sides, strict=True))
    x, y, z = (coordinate // (side // cells.side) for coordinate, side in zip(cells.position, sides, strict=True))
    block = (x * shape[1] + y) * shape[2] + z  # (M,)
    out = np.full(shape[0] * shape[1] * shape[2], free, np.uint8)
    if sides == (cells.side,) * 3:
        out[block] = cells.winner
        return out.reshape(shape)
    size = math.prod(sides)
    filled = np.bincount(block, weights=cells.filled, minlength=len(out))
    counted = np.flatnonzero(size - filled <= FREE_SHARE * size)
    row = np.full(len(out), len(counted))  # votes in free blocks go to one row more, which is not read
    row[counted] = np.arange(len(counted))
    ballot = (row[block] * free)[cells.voters] + cells.votes
    counts = np.bincount(ballot, weights=cells.weights, minlength=(len(counted) + 1) * free).reshape(-1, free)[:-1]
    winner = counts.argmax(axis=1)
    winner[counts[np.arange(len(counted)), winner] == 0] = IGNORE_LABEL
    out[counted] = winner
    return out.reshape(shape)
