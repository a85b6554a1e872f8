"""Camera geometry of the view transform: relative poses, frustum points, and the stereo pair.

Matrices are named ``target_from_source``. The 4x4 ``post_aug`` of an image augmentation acts on (u * d, v * d, d, 1):
its 2x2 linear part is in rows and columns 0-1, its translation in **column 2**. Its upper-left 3x3 block is therefore
the homography of homogeneous pixels (u, v, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from mmdet3d.ops.plane_sweep import SweepGeometry
from mmdet3d.structures import CameraInputs
from mmdet3d.utils.remember import remembered


@dataclass(frozen=True)
class CameraFrame:
    """Calibration and poses of the N cameras at one of the frames of a sample.

    Attributes:
        key_ego_from_camera: [B, N, 4, 4] camera to the key frame's ego, float32.
        older_camera_from_camera: [B, N, 4, 4] camera to the same camera one frame earlier; None for the oldest frame.
        intrinsics: [B, N, 4, 4] pinhole matrix of the original image, in pixels.
        post_aug: [B, N, 4, 4] image augmentation.
    """

    key_ego_from_camera: Tensor
    older_camera_from_camera: Tensor | None
    intrinsics: Tensor
    post_aug: Tensor

    @classmethod
    def stack(cls, frames: Sequence[CameraFrame]) -> CameraFrame:
        """Several frames as one with B' = (number of frames) * B samples, frame after frame."""
        return cls(*(torch.cat([getattr(frame, field.name) for frame in frames]) for field in fields(cls)))


class LiftGeometry(NamedTuple):
    """What lifting one frame needs of its cameras, float32.

    Attributes:
        camera_vector: [B, N, 27], see :func:`camera_vector`.
        rays: [B, N, h, w, 3] direction of each pixel's ray in the augmented key-ego frame, for a depth of 1 m.
        origins: [B, N, 3] camera centres in that frame, metres.
        sweep: Cameras of the plane sweep to the frame before, B * N entries; None without stereo.
    """

    camera_vector: Tensor
    rays: Tensor
    origins: Tensor
    sweep: SweepGeometry | None

    def select(self, start: int, count: int) -> LiftGeometry:
        """``count`` of the samples, from ``start`` on."""
        cams = self.camera_vector.shape[1]
        sweep = self.sweep
        if sweep is not None:
            part = slice(start * cams, (start + count) * cams)
            sweep = sweep._replace(**{name: tensor[part] for name, tensor in sweep.tensors.items()})
        return LiftGeometry(*(tensor[start : start + count] for tensor in self[:3]), sweep)


def camera_frames(inputs: CameraInputs) -> list[CameraFrame]:
    """Cameras of each of the F frames, newest first.

    Relative poses are formed in float64, because global translations are large, and returned as float32. The key ego
    is the ego frame at the time of camera 0 of the newest frame.
    """
    global_from_ego = inputs.global_from_ego.double()
    global_from_camera = global_from_ego @ inputs.ego_from_sensor.double()  # [B, F, N, 4, 4]
    key_ego_from_global = torch.linalg.inv(global_from_ego[:, 0, :1])  # [B, 1, 4, 4]
    key_ego_from_camera = (key_ego_from_global[:, None] @ global_from_camera).float()
    older_from_newer = (torch.linalg.inv(global_from_camera[:, 1:]) @ global_from_camera[:, :-1]).float()
    num_frames = global_from_ego.shape[1]
    return [
        CameraFrame(
            key_ego_from_camera=key_ego_from_camera[:, f],
            older_camera_from_camera=older_from_newer[:, f] if f + 1 < num_frames else None,
            intrinsics=inputs.intrinsics[:, f],
            post_aug=inputs.post_aug[:, f],
        )
        for f in range(num_frames)
    ]


def camera_vector(camera: CameraFrame, key_ego_from_camera: Tensor, bda: Tensor) -> Tensor:
    """The 27 numbers per camera that condition the depth net: [B, N, 27].

    Intrinsics (fx, fy, cx, cy), image augmentation (two rows of linear part and translation), BEV augmentation
    (its 2x2 part and the z scale), and the first three rows of ``key_ego_from_camera``.
    """
    numbers = _calibration_numbers(camera.intrinsics, camera.post_aug, bda)
    return torch.cat([numbers, key_ego_from_camera[..., :3, :].flatten(-2)], -1)


@remembered
def _calibration_numbers(k: Tensor, post: Tensor, bda: Tensor) -> Tensor:
    """[B, N, 15] all of :func:`camera_vector` but the pose."""
    bda = bda[:, None].expand(-1, k.shape[1], -1, -1)
    entries = [k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2],
               post[..., 0, 0], post[..., 0, 1], post[..., 0, 2],
               post[..., 1, 0], post[..., 1, 1], post[..., 1, 2],
               bda[..., 0, 0], bda[..., 0, 1], bda[..., 1, 0], bda[..., 1, 1], bda[..., 2, 2]]
    return torch.stack(entries, -1)


def pixel_homography(post_aug: Tensor) -> Tensor:
    """[..., 3, 3] float64 homography original pixel -> augmented pixel of a [..., 4, 4] image augmentation."""
    homography = torch.zeros(*post_aug.shape[:-2], 3, 3, dtype=torch.float64, device=post_aug.device)
    homography[..., :2, :] = post_aug[..., :2, :3].double()
    homography[..., 2, 2] = 1
    return homography


@remembered
def _pixel_grid(image_size: tuple[int, int], feature_size: tuple[int, int], device: torch.device) -> Tensor:
    """[h, w, 3] homogeneous image pixels (u, v, 1) of a feature map whose corners sit on the image's corner pixels."""
    (height, width), (h, w) = image_size, feature_size
    v = torch.linspace(0, height - 1, h, dtype=torch.float64, device=device)
    u = torch.linspace(0, width - 1, w, dtype=torch.float64, device=device)
    v, u = torch.meshgrid(v, u, indexing="ij")
    return torch.stack([u, v, torch.ones_like(u)], -1)


def frustum_rays(camera: CameraFrame, bda: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int]
                 ) -> tuple[Tensor, Tensor]:
    """Rays of every pixel in the augmented key-ego frame.

    Args:
        camera: Cameras of the frame.
        bda: [B, 4, 4] BEV augmentation.
        image_size: (H, W) of the network image.
        feature_size: (h, w) of the feature map.

    Returns:
        Rays [B, N, h, w, 3] and origins [B, N, 3], formed in float64, rounded to float32.
    """
    pixels = _pixel_grid(image_size, feature_size, bda.device)  # [h, w, 3]
    ego_from_camera = bda.double()[:, None] @ camera.key_ego_from_camera.double()  # [B, N, 4, 4]
    ego_from_pixel = ego_from_camera[..., :3, :3] @ _camera_from_pixel(camera.post_aug, camera.intrinsics)
    return torch.einsum("bnij,hwj->bnhwi", ego_from_pixel, pixels).float(), ego_from_camera[..., :3, 3].float()


def frustum_points(rays: Tensor, origins: Tensor, depths: Tensor) -> Tensor:
    """Points of every pixel and depth in the augmented key-ego frame, metres: ``depth * ray + origin``.

    Args:
        rays: [B, N, h, w, 3] of :func:`frustum_rays`.
        origins: [B, N, 3].
        depths: [D] metres.

    Returns:
        [B, N, D, h, w, 3] float32.
    """
    return rays[:, :, None] * depths.view(-1, 1, 1, 1) + origins[:, :, None, None, None]


@remembered
def _camera_from_pixel(post_aug: Tensor, intrinsics: Tensor) -> Tensor:
    """[B, N, 3, 3] float64 matrix: homogeneous augmented pixel -> point of its ray at a depth of 1 m."""
    return torch.linalg.inv(pixel_homography(post_aug) @ intrinsics[..., :3, :3].double())


def sweep_geometry(camera: CameraFrame, image_size: tuple[int, int]) -> SweepGeometry:
    """Cameras of a plane sweep from a frame to the one before it, for :func:`mmdet3d.ops.plane_sweep`.

    Intrinsics and augmentation of the newer frame serve both images, as in the reference implementation. Inverses and
    products are formed in float32, and the matrices are left apart for the operator to apply one by one, because
    released weights expect these roundings: see ``docs/parity.md``.

    Args:
        camera: Cameras of the newer frame; ``older_camera_from_camera`` must be there.
        image_size: (H, W) of the network image.

    Returns:
        Tensors of B * N cameras, float32.
    """
    post, older, intrinsics = (matrix.flatten(0, 1).float() for matrix in (
        camera.post_aug, camera.older_camera_from_camera, camera.intrinsics))
    pixel_from_camera = intrinsics[:, :3, :3]
    pixel_from_augmented, camera_from_pixel = _sweep_inverses(post, pixel_from_camera)
    rotation = older[:, :3, :3]
    # Element by element, because autocast and TF32 would take a matrix product in fewer bits.
    older_from_pixel = sum(rotation[:, :, k, None] * camera_from_pixel[:, None, k] for k in range(3))
    return SweepGeometry(
        pixel_from_augmented=pixel_from_augmented.clone(), augmentation=post[:, :2, :2], offset=post[:, :2, 2],
        older_from_pixel=older_from_pixel, translation=older[:, :3, 3], intrinsics=pixel_from_camera,
        image_size=tuple(image_size))


@remembered
def _sweep_inverses(post_aug: Tensor, pixel_from_camera: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses [M, 2, 2] of the augmentations' linear parts and [M, 3, 3] of the calibration matrices."""
    linear = torch.zeros_like(post_aug[:, :3, :3])
    linear[:, :2, :2] = post_aug[:, :2, :2]
    linear[:, 2, 2] = 1
    return torch.linalg.inv(linear)[:, :2, :2], torch.linalg.inv(pixel_from_camera)
