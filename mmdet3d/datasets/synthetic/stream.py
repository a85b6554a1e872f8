"""A drive without a data set: random pictures and labels under true geometry, in the form that the model takes.

For measurements of speed and for tests. Nothing can be learned from it; for that there is the synthetic world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.labels import CAMERAS, IGNORE_LABEL
from mmdet3d.datasets.synthetic.rig import LIDAR, make_rig

FRAME_METRES = 4.0
"""Distance that the vehicle drives from frame to frame."""
FRAME_RADIANS = 0.02
"""Angle that it turns by."""


@dataclass(frozen=True)
class Drive:
    """One sequence of samples.

    Args:
        input_size: (H, W) of the network image.
        batch: Samples B that drive side by side, each its own sequence.
        pictures: How many different pictures there are; the drive goes through them round and round.
        seed: Of the pictures, the vehicle and the labels.
    """

    input_size: tuple[int, int] = (256, 704)
    batch: int = 1
    pictures: int = 4
    seed: int = 0

    def sample(self, index: int) -> tuple[list[Tensor], list[dict]]:
        """Sample ``index`` of the drive: six ``img_inputs`` on the CPU, images uint8, and B ``img_metas``."""
        frames = [index, *(index - back if index >= back else index for back in (1, 2))]
        pictures = torch.stack([self._pictures()[f % self.pictures] for f in frames], 1)  # [N, F, 3, H, W]
        images = pictures.flatten(0, 1)[None].expand(self.batch, -1, -1, -1, -1)
        calibration = self._calibration()
        matrices = {name: torch.from_numpy(np.concatenate([calibration[name]] * 3)).float()
                    for name in ("sensor2ego", "intrinsics", "post_aug")}
        poses = np.concatenate([np.broadcast_to(ego_pose(f), (len(CAMERAS), 4, 4)) for f in frames])
        matrices["ego2global"] = torch.from_numpy(poses).float()
        matrices = {name: value[None].expand(self.batch, -1, -1, -1) for name, value in matrices.items()}
        inputs = [images, *(matrices[name] for name in ("sensor2ego", "ego2global", "intrinsics", "post_aug")),
                  torch.eye(4)[None].expand(self.batch, -1, -1)]
        return [tensor.contiguous() for tensor in inputs], [self._meta(index, b, frames) for b in range(self.batch)]

    def targets(self, size_xyz: tuple[int, int, int], scales: int, num_classes: int) -> dict[str, Tensor]:
        """What training compares with: a plane, some boxes and unlabelled space.

        Args:
            size_xyz: Voxels of the finest labels.
            scales: How often they are halved.
            num_classes: Classes K, free space last.

        Returns:
            ``gt_depth`` [B, N, H, W], ``voxel_semantics`` [B, X, Y, Z] uint8 and those of the coarser scales,
            ``voxel_flows`` [B, X, Y, Z, 2].
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        labels = torch.full((self.batch, *size_xyz), num_classes - 1, dtype=torch.uint8)
        labels[..., : max(1, size_xyz[2] // 8)] = num_classes - 6
        boxes = torch.rand(self.batch, 40, 3, generator=generator) * torch.tensor(size_xyz)
        for sample, corners in zip(labels, boxes.long().tolist(), strict=True):
            for x, y, z in corners:
                label = int(torch.randint(num_classes - 1, (1,), generator=generator))
                sample[x : x + 10, y : y + 5, : z + 1] = label
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_LABEL
        depth = torch.rand(self.batch, len(CAMERAS), *self.input_size, generator=generator) * 60 + 1
        depth[torch.rand(depth.shape, generator=generator) < 0.98] = 0
        targets = {"gt_depth": depth, "voxel_semantics": labels,
                   "voxel_flows": torch.randn(*labels.shape, 2, generator=generator)}
        for scale in range(1, scales + 1):
            step = 2**scale
            targets[f"voxel_semantics_1_{step}"] = labels[:, ::step, ::step, ::step].contiguous()
        return targets

    def _pictures(self) -> Tensor:
        """[P, N, 3, H, W] uint8."""
        generator = torch.Generator().manual_seed(self.seed)
        height, width = self.input_size
        coarse = torch.rand(self.pictures * len(CAMERAS), 3, height // 16, width // 16, generator=generator) * 255
        fine = torch.nn.functional.interpolate(coarse, self.input_size, mode="bilinear")
        return fine.to(torch.uint8).view(self.pictures, len(CAMERAS), 3, height, width)

    def _calibration(self) -> Mapping[str, np.ndarray]:
        """float64 matrices [N, 4, 4] of the cameras, and [4, 4] of the lidar."""
        height, width = self.input_size
        source = (1600, 900)
        rig = make_rig(source, np.random.default_rng(self.seed))
        intrinsics = np.tile(np.eye(4), (len(CAMERAS), 1, 1))
        intrinsics[:, :3, :3] = [rig[name].intrinsic for name in CAMERAS]
        post = np.tile(np.eye(4), (len(CAMERAS), 1, 1))
        scale = width / source[0]
        post[:, 0, 0] = post[:, 1, 1] = scale
        post[:, 1, 2] = height - scale * source[1]  # the bottom of the picture stays
        return {"sensor2ego": np.stack([rig[name].pose for name in CAMERAS]), "intrinsics": intrinsics,
                "post_aug": post, "ego2lidar": np.linalg.inv(rig[LIDAR].pose)}

    def _meta(self, index: int, slot: int, frames: Sequence[int]) -> dict:
        calibration, pose = self._calibration(), ego_pose(index)
        previous = ego_pose(frames[1])
        camera_from_ego = np.linalg.inv(calibration["sensor2ego"])
        image_from_ego = calibration["post_aug"] @ calibration["intrinsics"] @ camera_from_ego
        can_bus = np.zeros(18)
        can_bus[:3] = pose[:3, 3]
        can_bus[-2] = (index * FRAME_RADIANS) % (2 * np.pi)
        can_bus[-1] = np.degrees(can_bus[-2])
        return {"sequence_group_idx": np.int64(slot), "start_of_sequence": index == 0,
                "curr_to_prev_ego_rt": torch.from_numpy(np.linalg.inv(previous) @ pose).float(), "can_bus": can_bus,
                "lidar2img": torch.from_numpy(image_from_ego @ np.linalg.inv(calibration["ego2lidar"])).float(),
                "ego2lidar": torch.from_numpy(calibration["ego2lidar"])[None].float(), "index": index,
                "sample_idx": f"drive-{slot}-{index}", "scene_name": f"drive-{slot}",
                "noise_seed": 1000 * slot + index,  # as evaluation gives each sample one
                "image_keys": tuple((slot, frame) for frame in frames)}


def ego_pose(index: int) -> np.ndarray:
    """[4, 4] float64 ego to global at a frame: a wide curve."""
    angle = index * FRAME_RADIANS
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    radius = FRAME_METRES / FRAME_RADIANS
    pose[:2, 3] = 1000 + radius * np.sin(angle), 500 + radius * (1 - np.cos(angle))
    return pose
