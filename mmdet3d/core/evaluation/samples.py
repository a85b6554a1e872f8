"""Samples for evaluation: those of a test pipeline without their nesting, with their ground truth."""

from __future__ import annotations

from typing import Any

from mmcv.parallel import DataContainer
from torch.utils.data import Dataset

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.scoring import GroundTruthSource


class EvaluationSamples(Dataset):
    """Samples of a test pipeline with their ground truth beside them, both read in loader workers.

    Args:
        dataset: Data set in test mode.
        truth: Its ground truth, or None for samples without.

    Attributes:
        flag: Sequence of every sample, as of ``dataset``.
    """

    def __init__(self, dataset: Dataset, truth: GroundTruthSource | None) -> None:
        self.dataset, self.truth = dataset, truth
        self.flag = dataset.flag

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample without the lists of one test-time augmentation, and with ``ground_truth`` if there is one.

        Raises:
            DataError: there are several test-time augmentations.
        """
        sample = dict(self.dataset[index])
        if isinstance(sample["img_metas"], list):
            if len(sample["img_metas"]) != 1:
                raise DataError(f"sample {index}: the test pipeline gives {len(sample['img_metas'])} augmentations, "
                                "expected one")
            sample = {key: value[0] for key, value in sample.items()}
        if self.truth is not None:
            sample["ground_truth"] = DataContainer(self.truth[index], cpu_only=True)
        return sample

    def seed(self, seed: int) -> None:
        """Passed on to the data set."""
        self.dataset.seed(seed)

    def remember_samples(self, samples_per_batch: int) -> None:
        """Passed on to the data set."""
        self.dataset.remember_samples(samples_per_batch)
