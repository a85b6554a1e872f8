"""A data set whose samples carry their ground truth and what an evaluation wants to know of them."""

from __future__ import annotations

from typing import Any

from mmcv.parallel import DataContainer
from torch.utils.data import Dataset

from mmdet3d.datasets.scoring import GroundTruth, GroundTruthSource


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
        """The sample, with ``ground_truth``, a list of one container, if there is one."""
        sample = dict(self.dataset[index])
        if self.truth is not None:
            sample["ground_truth"] = [DataContainer(self.truth[index], cpu_only=True)]
        return sample

    def seed(self, seed: int) -> None:
        """Passed on to the data set."""
        self.dataset.seed(seed)

    def remember_samples(self, samples_per_batch: int) -> None:
        """Passed on to the data set."""
        self.dataset.remember_samples(samples_per_batch)


def take_ground_truth(batch: dict[str, Any]) -> list[GroundTruth] | None:
    """Remove the ground truth from a collated batch and return it, one for each sample."""
    wrapped = batch.pop("ground_truth", None)
    return None if wrapped is None else wrapped[0]
