"""Inputs of plane_sweep for its tests, and what is expected of them."""

import itertools
import math

import torch

from mmdet3d.ops.plane_sweep import SweepGeometry, plane_sweep_reference
from mmdet3d.ops.plane_sweep.geometry import sweep_positions

CASE_SIZE = (2, 7, 5, 4, 9)  # N, C, D, H, W


def make_geometry(cameras, map_size, steps, yaws):
    """Pinhole cameras that drove a step (3,) metres and turned by a yaw, radians; float64.

    The image is four times the map. It was made from a larger one by scaling, turning a little and cropping.
    """
    image_size = (4 * map_size[0] + 1, 4 * map_size[1] + 3)
    augmentation, offset, intrinsics, rotation = [], [], [], []
    for n, yaw in zip(range(cameras), yaws, strict=True):
        cos, sin = 0.45 * math.cos(0.05 * n), 0.45 * math.sin(0.05 * n)
        augmentation.append([[cos, -sin], [sin, cos]])
        offset.append([0.7 - 1.5 * n, -2.1 + n])
        focal = 0.8 * image_size[1] / 0.45
        intrinsics.append([[focal, 0, image_size[1] / 0.9 + n], [0, focal + 1, image_size[0] / 0.9], [0, 0, 1]])
        rotation.append([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    augmentation, offset, intrinsics, rotation, translation = (
        torch.tensor(values, dtype=torch.float64) for values in (augmentation, offset, intrinsics, rotation, steps))
    return SweepGeometry(augmentation.inverse(), augmentation, offset, rotation @ intrinsics.inverse(), translation,
                         intrinsics, image_size)


def convert(geometry, *args):
    """``geometry`` with its tensors on another device or of another dtype."""
    return geometry._replace(**{name: tensor.to(*args) for name, tensor in geometry.tensors.items()})


def make_case(device="cpu", dtype=torch.float64, size=CASE_SIZE, signed=False):
    """Inputs with positions inside, at the border, outside and behind; a third of the features are exactly 0."""
    cameras, channels, num_depths, height, width = size
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, cameras, channels, height, width, generator=generator)
    current, reference = maps.mul(4).round().div(4) if signed else maps.add(0.4).relu()
    steps = [(0.3, 0.1, 1.5), (0.9, -0.1, -1.2), (-0.7, 0.05, 0.4), (0.4, 0.1, -0.6), (1.3, 0.2, 0.1), (-1.1, 0.0, 0.8)]
    geometry = make_geometry(cameras, (height, width), [steps[n % len(steps)] for n in range(cameras)],
                             [0.05 * n - 0.1 for n in range(cameras)])
    depths = torch.linspace(1.0, 1.0 + (num_depths - 1) * 0.5, num_depths, dtype=torch.float64)
    return current.to(device, dtype), reference.to(device, dtype), convert(geometry, device), depths.to(device)


def position(geometry, n, depth, column, row, map_size):
    """(x, y) in the older map and the depth there, in float64 and by matrices as they come."""
    scale = [(image - 1) / (count - 1) for image, count in zip(geometry.image_size, map_size, strict=True)]
    pixel = torch.tensor([column * scale[1], row * scale[0]], dtype=torch.float64)
    x, y = (geometry.pixel_from_augmented[n] @ (pixel - geometry.offset[n])).tolist()
    ray = torch.tensor([x, y, 1.0], dtype=torch.float64)
    point = depth * (geometry.older_from_pixel[n] @ ray) + geometry.translation[n]
    image = geometry.intrinsics[n] @ point
    older = geometry.augmentation[n] @ (image[:2] / image[2]) + geometry.offset[n]
    return float(older[0]) / scale[1], float(older[1]) / scale[0], float(point[2])


def expected_by_loops(current, reference, geometry, depths, *, invalid_channel, by_position=False):
    """The contract, one position at a time."""
    cameras, _, height, width = current.shape
    cost = torch.zeros(cameras, len(depths), height, width, dtype=torch.float64)
    seen = {"inside": 0, "border": 0, "outside": 0, "behind": 0}
    for n, d, y, x in itertools.product(*map(range, cost.shape)):
        px, py, pz = position(geometry, n, depths[d], x, y, (height, width))
        warped, taps = torch.zeros(current.shape[1], dtype=torch.float64), 0
        if pz >= 1e-3:
            for row, column in itertools.product(range(height), range(width)):
                weight = max(0.0, 1 - abs(px - column)) * max(0.0, 1 - abs(py - row))
                warped += weight * reference[n, :, row, column].double()
                taps += weight > 0
        kind = "behind" if pz < 1e-3 else {0: "outside", 4: "inside"}.get(taps, "border")
        seen[kind] += 1
        cost[n, d, y, x] = (current[n, :, y, x].double() - warped).abs().sum()
        if taps == 0 if by_position else (invalid_channel is not None and warped[invalid_channel] == 0):
            cost[n, d, y, x] += 5.0
    return cost, seen


def plain_cameras(device, map_size, cameras=2, image_scale=1):
    """Cameras at rest whose image, intrinsics and augmentation change nothing."""
    eye = [torch.eye(k, dtype=torch.float64, device=device).repeat(cameras, 1, 1) for k in (2, 2, 3, 3)]
    offset, translation = (torch.zeros(cameras, k, dtype=torch.float64, device=device) for k in (2, 3))
    image_size = tuple((length - 1) * image_scale + 1 for length in map_size)
    return SweepGeometry(eye[0], eye[1], offset, eye[2], translation, eye[3], image_size)


def at_rest(device, dtype=torch.float64, size=CASE_SIZE):
    """``make_case`` with cameras that did not move, so that a position is its own pixel."""
    current, reference, _, depths = make_case(device, dtype, size)
    return current, reference, plain_cameras(device, size[-2:], size[0], image_scale=4), depths


def far_from_pixel_borders(case, distance=1e-4):
    """(N, D, H, W) bool: no weight of the position can round to 0, whatever the order of the operations."""
    current, _, geometry, depths = case
    grid, _ = sweep_positions(geometry, depths, current.shape[-2:], 1e-3, torch.float64)
    at = (grid + 1) / 2 * torch.tensor([current.shape[3] - 1, current.shape[2] - 1], device=grid.device)
    return ~((at - at.round()).abs() <= distance).any(dim=-1)


def assert_same_cost(cost, expected, case, tolerance):
    """Equal, but for the zero test at the few positions where rounding decides which pixels have a weight."""
    clear = far_from_pixel_borders(case)
    penalty = torch.where(clear, 0.0, 5.0).double()
    difference = (cost.double() - expected.double()).abs()
    assert clear.double().mean() > 0.99
    assert (torch.minimum(difference, (difference - penalty).abs()) <= tolerance * (1 + expected.double())).all()


def half_rounding(case):
    """(N, D, H, W): how far float16 features on a GPU may take a cost from the one in float32.

    A channel goes through six roundings, each of at most 2^-11 of |current| + warped |reference|: one of the weights,
    four of the partial differences, one of a sum of two. Over some channels they partly cancel: emulated, 1.6 of the
    six are left for 6 channels and 0.5 for 72 or more.
    """
    current, reference, *others = case
    weights = plane_sweep_reference(torch.zeros_like(current), reference.abs(), *others, invalid_channel=None)
    return 2 * 2.0**-11 * (current.float().abs().sum(dim=1)[:, None] + weights)
