"""Warping of remembered volumes against grid_sample, and where voxel indices stand."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.models.temporal.volume_warp import (
    gather_rows,
    metric_from_index,
    previous_index_from_index,
)
from mmdet3d.ops.history_warp import trilinear_taps
from mmdet3d.structures import VoxelGrid

SIZE = (3, 4, 6)  # (Z, Y, X)
GRID = VoxelGrid((-4, -5, -1), (8, 3, 2), (2, 2, 1))
PUBLISHED = VoxelGrid((-40, -40, -1), (40, 40, 5.4), (0.8, 0.8, 0.8))


def motion(x=0.0, y=0.0, z=0.0, yaw=0.0, pitch=0.0):
    matrix = torch.eye(4, dtype=torch.float64)
    c, s = math.cos(yaw), math.sin(yaw)
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]])
    tilt = torch.eye(4, dtype=torch.float64)
    tilt[0, 0] = tilt[2, 2] = math.cos(pitch)
    tilt[0, 2], tilt[2, 0] = math.sin(pitch), -math.sin(pitch)
    matrix = matrix @ tilt
    matrix[:3, 3] = torch.tensor([x, y, z])
    return matrix


def warped(matrix, volume):
    """[C, Z, Y, X] by the taps."""
    rows = volume.flatten(1).T
    return gather_rows(rows, trilinear_taps(matrix, volume.shape[1:])).T.reshape(volume.shape)


def by_grid_sample(matrix, volume):
    size_z, size_y, size_x = volume.shape[1:]
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in volume.shape[1:]), indexing="ij")
    source = torch.stack([x, y, z, torch.ones_like(x)], -1) @ matrix.T
    last = torch.tensor([size_x - 1, size_y - 1, size_z - 1], dtype=torch.float64)
    grid = source[..., :3] / last * 2 - 1
    return F.grid_sample(volume[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


@pytest.mark.parametrize("pose", [
    {"x": 0.6, "y": -1.3, "z": 0.45}, {"x": -2.5, "y": 0.2, "yaw": 0.4}, {"x": 3.1, "y": 1.7, "z": -0.3, "yaw": 1.3},
    {"x": 4.0, "y": -0.5, "z": 0.4, "yaw": -2.9, "pitch": 0.15}, {"y": 2.2, "z": 1.1, "pitch": -0.6}])
def test_taps_equal_grid_sample(pose):
    generator = torch.Generator().manual_seed(0)
    turn_about_the_centre = motion(2.5, 1.5, 1) @ motion(**pose) @ motion(-2.5, -1.5, -1)
    for matrix in (motion(**pose), turn_about_the_centre):
        compare_with_grid_sample(matrix, generator)


def compare_with_grid_sample(matrix, generator):
    volume = torch.randn(5, *SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = by_grid_sample(matrix, volume)
    assert expected.any() and (expected == 0).any()
    output = warped(matrix, volume)
    torch.testing.assert_close(output, expected)
    weight = torch.randn(5, *SIZE, generator=generator, dtype=torch.float64)
    (mine,), (theirs,) = (torch.autograd.grad((result * weight).sum(), volume) for result in (output, expected))
    torch.testing.assert_close(mine, theirs)


def test_taps_are_valid_indices_even_far_outside():
    index, weight = trilinear_taps(motion(1e5, -1e5, 7), SIZE)
    assert index.shape == weight.shape == (72, 8) and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() < 72 and not weight.any()


def test_identity_copies_exactly():
    volume = torch.randn(5, *SIZE)
    assert torch.equal(warped(torch.eye(4), volume), volume)


def test_whole_steps_move_voxels_along_their_axis():
    volume = torch.randn(2, *SIZE)
    for axis, dimension in (("x", 3), ("y", 2), ("z", 1)):
        moved = warped(motion(**{axis: 1.0}).float(), volume)
        count = volume.shape[dimension]
        assert torch.equal(moved.narrow(dimension, 0, count - 1), volume.narrow(dimension, 1, count - 1))
        assert not moved.select(dimension, count - 1).any()


def test_an_index_stands_for_the_lower_corner_or_the_centre():
    corner = metric_from_index(GRID, torch.device("cpu"))
    centre = metric_from_index(GRID, torch.device("cpu"), corner_origin=False)
    index = torch.tensor([1, 2, 1, 1.0], dtype=torch.float64)
    assert (corner @ index).tolist() == [-2, -1, 0, 1]
    assert (centre @ index).tolist() == [-1, 0, 0.5, 1]
    coarse = metric_from_index(PUBLISHED.coarsen(4), torch.device("cpu"))
    torch.testing.assert_close(coarse[:3, 3], torch.tensor([-40, -40, -1.0], dtype=torch.float64))
    torch.testing.assert_close(coarse.diagonal(), torch.tensor([3.2, 3.2, 3.2, 1], dtype=torch.float64))


def flips(x, y):
    return torch.diag(torch.tensor([x, y, 1.0, 1.0]))[None]


def test_a_flip_on_the_published_grid_maps_x_to_100_minus_x():
    matrix = previous_index_from_index([PUBLISHED], torch.eye(4)[None], torch.eye(4)[None], flips(-1, 1))[0]
    expected = torch.eye(4)
    expected[0, 0], expected[0, 3] = -1, 100
    torch.testing.assert_close(matrix[0], expected, atol=1e-4, rtol=0)
    centre, = previous_index_from_index([PUBLISHED], torch.eye(4)[None], torch.eye(4)[None], flips(-1, 1), False)
    expected[0, 3] = 99
    torch.testing.assert_close(centre[0], expected, atol=1e-4, rtol=0)


def test_a_flip_in_the_corner_convention_loses_a_column():
    grid = VoxelGrid((-6, -4, -1), (6, 4, 2), (2, 2, 1))  # X, Y, Z = 6, 4, 3
    volume = torch.randn(2, *SIZE)
    matrix, = previous_index_from_index([grid], torch.eye(4)[None], torch.eye(4)[None], flips(-1, 1))
    moved = warped(matrix[0], volume)
    assert not moved[..., 0].any()
    torch.testing.assert_close(moved[..., 1:], volume[..., 1:].flip(-1))
    exact, = previous_index_from_index([grid], flips(1, -1), torch.eye(4)[None], torch.eye(4)[None], False)
    torch.testing.assert_close(warped(exact[0], volume), volume.flip(-2))


def test_the_order_of_the_matrices():
    """A point in the augmented ego frame now, through ego now and ego before, into the augmented frame before."""
    generator = torch.Generator().manual_seed(0)
    previous_bda, bda = flips(-1, 1), flips(1, -1)
    previous_from_current = motion(1.5, -0.7, 0.2, yaw=0.3, pitch=0.1)[None].float()
    index = torch.rand(4, generator=generator, dtype=torch.float64) * 3
    index[3] = 1
    point = torch.tensor([index[i] * GRID.cell[i] + GRID.low[i] for i in range(3)] + [1], dtype=torch.float64)
    ego_now = torch.linalg.inv(bda[0].double()) @ point
    before = previous_bda[0].double() @ (previous_from_current[0].double() @ ego_now)
    expected = [(before[i].item() - GRID.low[i]) / GRID.cell[i] for i in range(3)]
    matrix, = previous_index_from_index([GRID], previous_bda, previous_from_current, bda)
    assert matrix.dtype == torch.float32
    assert (matrix[0].double() @ index)[:3].tolist() == pytest.approx(expected, abs=1e-5)
