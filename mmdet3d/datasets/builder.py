"""Data sets and pipelines from configs. Importing this module registers every data set and step."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet3d.datasets import nuscenes_occupancy
from mmdet3d.datasets.pipelines import annotations, bev_augment, collect, compose, depth, images, occupancy
from mmdet3d.registry import DATASETS, build_from_config, config_place

REGISTERED = (nuscenes_occupancy, annotations, bev_augment, collect, depth, images, occupancy)
"""Modules that register something when they are imported."""


def build_dataset(cfg: Mapping, default_args: Mapping | None = None, place: str = "data") -> Any:
    """Build the data set that ``cfg`` (``data.train``, ``data.val`` or ``data.test`` of a config) describes.

    Args:
        cfg: Stays as it is.
        default_args: Arguments used where ``cfg`` does not set them.
        place: Where ``cfg`` is in the config, for messages.

    Raises:
        mmdet3d.registry.ConfigError: the config names an unknown type or key, or a value does not fit; a file that is
            not there is one of those.
    """
    with config_place(place):
        return build_from_config(cfg, DATASETS, default_args)


def build_pipeline(transforms: Sequence[Mapping]) -> compose.Compose:
    """Build the steps of a pipeline.

    Raises:
        mmdet3d.registry.ConfigError: a step is unknown or does not take what it is given.
    """
    return compose.Compose(transforms)
