"""The end of a pipeline: wrap what cannot be stacked, and keep what the model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.parallel import DataContainer

from mmdet3d.datasets.pipelines.compose import Compose, require
from mmdet3d.registry import PIPELINES

META_KEYS = (
    "filename", "ori_shape", "img_shape", "lidar2img", "ego2img", "ego2lidar", "sensor2sensorego", "sensorego2global",
    "sensorego2sensor", "global2sensorego", "cam2img", "depth2img", "pad_shape", "scale_factor", "flip",
    "pcd_horizontal_flip", "pcd_vertical_flip", "box_mode_3d", "box_type_3d", "img_norm_cfg", "pcd_trans", "sample_idx",
    "pcd_scale_factor", "pcd_rotation", "pcd_rotation_angle", "pts_filename", "transformation_3d_flow", "trans_mat",
    "index", "sequence_group_idx", "curr_to_prev_lidar_rt", "curr_to_prev_ego_rt", "start_of_sequence", "can_bus",
    "scene_name", "affine_aug", "image_keys",
)
"""Entries of a sample that go into ``img_metas``, where they exist."""


@PIPELINES.register_module()
class DefaultFormatBundle3D:
    """Pipeline step: wrap points, boxes and their labels, whose number differs from sample to sample.

    Args:
        class_names: Accepted as published configs have it; not read.
        with_label: Wrap boxes and labels, too.
    """

    def __init__(self, class_names: Sequence[str] | None = None, with_label: bool = True) -> None:
        self.with_label = with_label

    def __call__(self, results: dict) -> dict:
        """``results`` with ``points``, ``gt_labels_3d`` and ``gt_bboxes_3d`` in containers, as far as they exist."""
        if "points" in results:
            results["points"] = DataContainer(results["points"], stack=False)
        if self.with_label and "gt_labels_3d" in results:
            results["gt_labels_3d"] = DataContainer(torch.as_tensor(results["gt_labels_3d"]), stack=False)
        if self.with_label and "gt_bboxes_3d" in results:
            results["gt_bboxes_3d"] = DataContainer(results["gt_bboxes_3d"], cpu_only=True)
        return results


@PIPELINES.register_module()
class Collect3D:
    """Pipeline step: a new dict with ``keys`` and ``img_metas``, a container that stays on the CPU.

    Args:
        keys: What the model takes.
        meta_keys: What goes into ``img_metas``, where it exists.
    """

    def __init__(self, keys: Sequence[str], meta_keys: Sequence[str] = META_KEYS) -> None:
        self.keys, self.meta_keys = tuple(keys), tuple(meta_keys)

    def __call__(self, results: dict) -> dict:
        """Keep what is wanted.

        Raises:
            DataError: no step before gave one of the keys.
        """
        require(self, results, *self.keys)
        metas = {key: results[key] for key in self.meta_keys if key in results}
        return {"img_metas": DataContainer(metas, cpu_only=True), **{key: results[key] for key in self.keys}}


@PIPELINES.register_module()
class MultiScaleFlipAug3D:
    """Pipeline step: the form that test-time augmentation has, with the one augmentation there is, none.

    Args:
        transforms: Inner steps.
        img_scale: Passed on as ``scale``; nothing reads it.
        pts_scale_ratio: 1.
        flip: False.

    Raises:
        ValueError: an augmentation is asked for, which the temporal model could not follow.
        mmdet3d.registry.ConfigError: an inner step does not fit.
    """

    def __init__(self, transforms: Sequence[Mapping], img_scale: Any = None, pts_scale_ratio: float = 1,
                 flip: bool = False) -> None:
        if flip or pts_scale_ratio != 1:
            raise ValueError(f"test-time augmentation is not supported: expected flip=False and pts_scale_ratio=1, got "
                             f"flip={flip!r} and pts_scale_ratio={pts_scale_ratio!r}")
        self.img_scale = img_scale
        self.compose = Compose(transforms, "transforms")

    @property
    def transforms(self) -> list:
        """The inner steps."""
        return self.compose.transforms

    def __call__(self, results: dict) -> dict[str, list]:
        """What the inner steps make of ``results``, every value in a list of length 1."""
        augmented = {**results, "scale": self.img_scale, "flip": False, "pcd_scale_factor": 1.0,
                     "flip_direction": "horizontal", "pcd_horizontal_flip": False, "pcd_vertical_flip": False}
        return {key: [value] for key, value in self.compose(augmented).items()}
