"""The meta data of a batch as tensors, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdet3d.utils.precision import full_precision

REQUIRED = ("sequence_group_idx", "start_of_sequence", "curr_to_prev_ego_rt", "can_bus", "lidar2img", "ego2lidar")


@dataclass(frozen=True)
class FrameMeta:
    """What the model reads of ``img_metas``.

    Attributes:
        sequence_ids: B sequence numbers.
        starts: Whether a sequence starts, per sample.
        previous_ego_from_ego: [B, 4, 4] float32 current to previous ego.
        ego_translation: [B, 3] float64 on the CPU: position in the global frame, metres.
        yaw: [B] float64 on the CPU: heading in radians.
        image_from_ego: [B, N, 4, 4] float32 ego to augmented pixels times depth.
    """

    sequence_ids: tuple[int, ...]
    starts: tuple[bool, ...]
    previous_ego_from_ego: Tensor
    ego_translation: Tensor
    yaw: Tensor
    image_from_ego: Tensor

    @classmethod
    @full_precision
    def from_metas(cls, img_metas: Sequence[Mapping], device: torch.device) -> FrameMeta:
        """Stack the meta data of a batch; the dicts stay as they are.

        Raises:
            ValueError: a key is missing, or a sequence number is negative.
        """
        for position, meta in enumerate(img_metas):
            if missing := [key for key in REQUIRED if key not in meta]:
                raise ValueError(f"img_metas[{position}] lacks {missing}; it has {sorted(meta)}")
            if int(meta["sequence_group_idx"]) < 0:
                raise ValueError(f"img_metas[{position}]: sequence_group_idx must not be negative, "
                                 f"got {meta['sequence_group_idx']}")
        can_bus = torch.from_numpy(np.stack([np.asarray(meta["can_bus"], np.float64) for meta in img_metas]))
        image_from_lidar = _stack(img_metas, "lidar2img", device)  # [B, N, 4, 4]
        lidar_from_ego = _stack(img_metas, "ego2lidar", device).reshape(-1, 1, 4, 4)
        return cls(
            sequence_ids=tuple(int(meta["sequence_group_idx"]) for meta in img_metas),
            starts=tuple(bool(meta["start_of_sequence"]) for meta in img_metas),
            previous_ego_from_ego=_stack(img_metas, "curr_to_prev_ego_rt", device),
            ego_translation=can_bus[:, :3],
            yaw=can_bus[:, -2],
            image_from_ego=image_from_lidar @ lidar_from_ego)


def _stack(img_metas: Sequence[Mapping], key: str, device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(np.asarray(meta[key]), dtype=torch.float32) for meta in img_metas]).to(device)
