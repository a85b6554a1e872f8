"""The meta data of a batch as tensors, checked."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdet3d.utils.precision import full_precision

REQUIRED = ("sequence_group_idx", "start_of_sequence", "curr_to_prev_ego_rt", "can_bus", "lidar2img", "ego2lidar")
CAN_BUS_LENGTH = 18


@dataclass(frozen=True)
class FrameMeta:
    """What the model reads of ``img_metas``; all tensors are on the CPU.

    Attributes:
        sequence_ids: B sequence numbers.
        starts: Whether a sequence starts, per sample.
        previous_ego_from_ego: [B, 4, 4] float32 current to previous ego.
        ego_translation: [B, 3] float64 position in the global frame, metres.
        yaw: [B] float64 heading in radians.
        image_from_ego: [B, N, 4, 4] float32 ego to augmented pixels times depth.
        noise_seeds: [B] int32 seeds of the flow head's noise in evaluation; None where samples bring no ``noise_seed``.
        image_keys: For each sample, a key of the pictures of each frame, newest first, from ``image_keys``: equal keys
            promise equal pictures after augmentation. None where samples bring none.
    """

    sequence_ids: tuple[int, ...]
    starts: tuple[bool, ...]
    previous_ego_from_ego: Tensor
    ego_translation: Tensor
    yaw: Tensor
    image_from_ego: Tensor
    noise_seeds: Tensor | None = None
    image_keys: tuple[tuple[Hashable, ...], ...] | None = None

    @classmethod
    @full_precision
    def from_metas(cls, img_metas: Sequence[Mapping], num_cams: int | None = None) -> FrameMeta:
        """Stack the meta data of a batch; the dicts stay as they are.

        Args:
            img_metas: One dict per sample, with at least the keys :data:`REQUIRED`.
            num_cams: Cameras N; None takes any number that is the same for all samples.

        Raises:
            ValueError: there is no sample, a key is missing, a sequence number is negative, or a value has the wrong
                shape.
        """
        if not img_metas:
            raise ValueError("img_metas is empty; it needs one dict per sample")
        for position, meta in enumerate(img_metas):
            if missing := [key for key in REQUIRED if key not in meta]:
                raise ValueError(f"img_metas[{position}] lacks {missing}; it has {sorted(meta)}")
            if int(meta["sequence_group_idx"]) < 0:
                raise ValueError(f"img_metas[{position}]: sequence_group_idx must not be negative, "
                                 f"got {meta['sequence_group_idx']}")
        can_bus = _stack(img_metas, "can_bus", [(CAN_BUS_LENGTH,)], torch.float64)
        num_cams = len(img_metas[0]["lidar2img"]) if num_cams is None else num_cams
        image_from_lidar = _stack(img_metas, "lidar2img", [(num_cams, 4, 4)])
        lidar_from_ego = _stack(img_metas, "ego2lidar", [(1, 4, 4), (4, 4)])
        return cls(
            sequence_ids=tuple(int(meta["sequence_group_idx"]) for meta in img_metas),
            starts=tuple(bool(meta["start_of_sequence"]) for meta in img_metas),
            previous_ego_from_ego=_stack(img_metas, "curr_to_prev_ego_rt", [(4, 4)]),
            ego_translation=can_bus[:, :3],
            yaw=can_bus[:, -2],
            image_from_ego=image_from_lidar @ lidar_from_ego,  # [B, N, 4, 4] @ [B, 1, 4, 4]
            noise_seeds=_noise_seeds(img_metas),
            image_keys=_image_keys(img_metas))


def _image_keys(img_metas: Sequence[Mapping]) -> tuple[tuple[Hashable, ...], ...] | None:
    """``image_keys`` of the samples, None if one has none."""
    if any(meta.get("image_keys") is None for meta in img_metas):
        return None
    return tuple(tuple(meta["image_keys"]) for meta in img_metas)


def _noise_seeds(img_metas: Sequence[Mapping]) -> Tensor | None:
    """[B] int32 ``noise_seed`` of the samples, None if one has none."""
    if any(meta.get("noise_seed") is None for meta in img_metas):
        return None
    return torch.tensor([int(meta["noise_seed"]) for meta in img_metas], dtype=torch.int32)


def _stack(img_metas: Sequence[Mapping], key: str, shapes: Sequence[tuple[int, ...]],
           dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, *shapes[0]] values of ``key`` on the CPU; each must have one of ``shapes``, all of the same number."""
    values = []
    for position, meta in enumerate(img_metas):
        value = torch.as_tensor(np.asarray(meta[key]), dtype=dtype)
        if tuple(value.shape) not in shapes:
            raise ValueError(f"img_metas[{position}]: {key} must have the shape "
                             f"{' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
        values.append(value.reshape(shapes[0]))
    return torch.stack(values)
