"""Data sets and pipelines from configs. Importing this module registers every data set and step."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet3d import datasets
from mmdet3d.datasets import pipelines
from mmdet3d.datasets.pipelines.compose import Compose
from mmdet3d.interfaces import RemembersSamples, SeededDataset, SequenceDataset
from mmdet3d.registry import DATASETS, build_from_config, check_contract, config_place, import_modules

for _folder in (pipelines, datasets):
    import_modules(_folder)


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
        dataset = build_from_config(cfg, DATASETS, default_args)
        check_contract(dataset, SequenceDataset, SeededDataset, RemembersSamples)
    return dataset


def build_pipeline(transforms: Sequence[Mapping]) -> Compose:
    """Build the steps of a pipeline.

    Raises:
        mmdet3d.registry.ConfigError: a step is unknown or does not take what it is given.
    """
    return Compose(transforms)
