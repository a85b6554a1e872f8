"""Camera geometry of the view transform: relative poses, the frustum, and the stereo pair.

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

from mmdet3d.ops.frustum_cells import FrustumGeometry
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
        frustum: Cameras of the frustum points, which end in the augmented key-ego frame.
        sweep: Cameras of the plane sweep to the frame before, B * N entries; None without stereo.
    """

    camera_vector: Tensor
    frustum: FrustumGeometry
    sweep: SweepGeometry | None

    def select(self, start: int, count: int) -> LiftGeometry:
        """``count`` of the samples, from ``start`` on."""
        part, cams, sweep = slice(start, start + count), self.camera_vector.shape[1], self.sweep
        if sweep is not None:
            entries = slice(start * cams, (start + count) * cams)
            sweep = sweep._replace(**{name: tensor[entries] for name, tensor in sweep.tensors.items()})
        return LiftGeometry(self.camera_vector[part], FrustumGeometry(*(tensor[part] for tensor in self.frustum)),
                            sweep)


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


def frustum_geometry(camera: CameraFrame, bda: Tensor) -> FrustumGeometry:
    """Cameras of the frustum points of a frame, for :func:`mmdet3d.ops.frustum_cells`.

    As in :func:`sweep_geometry`, inverses and products are formed in float32 and the matrices are left apart.

    Args:
        camera: Cameras of the frame.
        bda: [B, 4, 4] BEV augmentation.

    Returns:
        Tensors of B samples of N cameras, float32.
    """
    post, pose = camera.post_aug.float(), camera.key_ego_from_camera.float()
    pixel_from_augmented, camera_from_pixel = _inverses(post, camera.intrinsics.float())
    return FrustumGeometry(
        pixel_from_augmented=pixel_from_augmented.clone(), offset=post[..., :2, 2],
        ego_from_pixel=_product(pose[..., :3, :3], camera_from_pixel), translation=pose[..., :3, 3], bda=bda.float())


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
    post, older, intrinsics = (matrix.float() for matrix in (
        camera.post_aug, camera.older_camera_from_camera, camera.intrinsics))
    pixel_from_augmented, camera_from_pixel = _inverses(post, intrinsics)
    tensors = {
        "pixel_from_augmented": pixel_from_augmented.clone(), "augmentation": post[..., :2, :2],
        "offset": post[..., :2, 2], "older_from_pixel": _product(older[..., :3, :3], camera_from_pixel),
        "translation": older[..., :3, 3], "intrinsics": intrinsics[..., :3, :3]}
    return SweepGeometry(**{name: tensor.flatten(0, 1) for name, tensor in tensors.items()},
                         image_size=tuple(image_size))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[..., 3, 3] matrix product, each product and sum rounded: autocast and TF32 would take fewer bits."""
    return sum(a[..., k, None] * b[..., None, k, :] for k in range(3))


@remembered
def _inverses(post_aug: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses [B, N, 2, 2] of the augmentations' linear parts and [B, N, 3, 3] of the calibration matrices."""
    linear = torch.zeros_like(post_aug[..., :3, :3])
    linear[..., :2, :2] = post_aug[..., :2, :2]
    linear[..., 2, 2] = 1
    return torch.linalg.inv(linear)[..., :2, :2], torch.linalg.inv(intrinsics[..., :3, :3])
