"""One sample as the model takes it at test time."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.infos import resolve_path, sample_record, sequence_flags
from mmdet3d.datasets.pipelines.images import PrepareImageInputs

META_KEYS = (
    "sequence_group_idx", "start_of_sequence", "curr_to_prev_ego_rt", "can_bus", "lidar2img", "ego2lidar", "index",
    "sample_idx", "scene_name", "image_keys",
)
"""What the model reads of a sample besides its tensors."""


@dataclass(frozen=True)
class Frame:
    """One sample with a batch dimension of 1.

    Attributes:
        img_inputs: Six float32 tensors: images [1, N * F, 3, H, W], camera-major; sensor2ego, ego2global, intrinsics
            and image augmentation [1, F * N, 4, 4], frame-major; BEV augmentation [1, 4, 4], the identity.
        img_metas: List of one dict with :data:`META_KEYS`.
        info: The info record it was made of.
        image_files: Image file of every camera, by name, for pictures.
    """

    img_inputs: tuple[Tensor, ...]
    img_metas: list[dict]
    info: Mapping
    image_files: dict[str, str]

    @property
    def token(self) -> str:
        """Sample token."""
        return self.img_metas[0]["sample_idx"]

    @property
    def scene(self) -> str:
        """Scene name."""
        return self.img_metas[0]["scene_name"]


class FrameSource(Sequence):
    """The frames of an info file by position, in time order. Images of neighbouring frames are decoded once.

    Args:
        infos: Records of :func:`mmdet3d.datasets.infos.load_infos`.
        data_config: ``data_config`` of the config file.
        info_file: Where the records came from, for relative file names.
        offsets: How many frames back the adjacent frames lie.
    """

    def __init__(self, infos: Sequence[Mapping], data_config: Mapping,
                 info_file: str | os.PathLike | None = None, offsets: Sequence[int] = (1, 2)) -> None:
        self.infos = infos
        self.info_file = info_file
        self.offsets = tuple(offsets)
        self.prepare = PrepareImageInputs(data_config=data_config)
        self.flags = sequence_flags(infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, index: int) -> Frame:
        """Frame of sample ``index``.

        Raises:
            IndexError: there is no such sample.
            DataError: an image or a camera is missing or damaged.
        """
        if not 0 <= index < len(self.infos):
            raise IndexError(f"sample index {index} is not in 0..{len(self.infos) - 1}")
        results = self.prepare(sample_record(self.infos, index, self.flags, self.offsets, self.info_file))
        identity = torch.eye(4)
        meta = {key: results[key] for key in META_KEYS}
        meta["sequence_group_idx"] = np.int64(meta["sequence_group_idx"])
        cams = results["curr"]["cams"]
        return Frame(
            img_inputs=tuple(tensor.unsqueeze(0) for tensor in (*results["img_inputs"], identity)),
            img_metas=[meta],
            info=results["curr"],
            image_files={name: str(resolve_path(cams[name]["data_path"], self.info_file))
                         for name in results["cam_names"]},
        )


def frame_from_infos(infos: Sequence[Mapping], index: int, data_config: Mapping,
                     info_file: str | os.PathLike | None = None, offsets: Sequence[int] = (1, 2)) -> Frame:
    """One frame alone; to walk through many use :class:`FrameSource`, which decodes each image once.

    Args, returned value and errors are those of :class:`FrameSource` and its items.
    """
    return FrameSource(infos, data_config, info_file, offsets)[index]
