"""Random camera rigs for the tests of the view transform."""

import math

import torch


def rotation(angles):
    """[3, 3] float64: turn about x, then y, then z."""
    result = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = torch.eye(3, dtype=torch.float64)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        result = turn @ result
    return result


def pose(generator, spread=1.0):
    """[4, 4] float64 rigid motion with a translation of about ``spread`` metres."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation((torch.rand(3, generator=generator) * 6).tolist())
    matrix[:3, 3] = torch.randn(3, generator=generator, dtype=torch.float64) * spread
    return matrix


def intrinsics(generator):
    """[4, 4] float64 pinhole matrix with different focal lengths."""
    matrix = torch.eye(4, dtype=torch.float64)
    fx, fy, cx, cy = (torch.rand(4, generator=generator) * 20 + torch.tensor([60.0, 70, 30, 15])).tolist()
    matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2] = fx, fy, cx, cy
    return matrix


def post_aug(generator, flip=False):
    """[4, 4] float64 image augmentation: rotation, scale, flip; translation in column 2."""
    matrix = torch.eye(4, dtype=torch.float64)
    angle, scale = (torch.rand(2, generator=generator) * torch.tensor([0.3, 0.4]) + torch.tensor([-0.15, 0.6])).tolist()
    linear = scale * rotation((0, 0, angle))[:2, :2] @ torch.diag(torch.tensor([-1.0 if flip else 1.0, 1.0]).double())
    matrix[:2, :2] = linear
    matrix[:2, 2] = torch.randn(2, generator=generator, dtype=torch.float64) * 9
    return matrix


def bda(generator, flips=(1, -1), angle=0.0, scale=1.0):
    """[4, 4] float64 BEV augmentation."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = scale * torch.diag(torch.tensor([*flips, 1.0], dtype=torch.float64)) @ rotation((0, 0, angle))
    return matrix


def stack(make, count, *shape):
    """``count`` matrices of ``make()``, viewed as [*shape, 4, 4]."""
    return torch.stack([make() for _ in range(count)]).view(*shape, 4, 4)
