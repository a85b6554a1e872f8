"""The coarse label files of a whole info file: made, continued after an interruption, or checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mmdet3d.datasets.converters.label_files import (
    COARSE_ENTRIES,
    LABEL_FILE,
    coarse_name,
    label_folder,
    write_coarse_labels,
)
from mmdet3d.datasets.converters.multiscale_gt import FACTORS, downsample_scales
from mmdet3d.datasets.infos import DataError, resolve_path
from mmdet3d.datasets.npz import ArrayHeader, read_arrays, read_headers

WRITTEN, COMPLETE, EQUAL = "written", "complete", "equal"
MISSING, ABSENT, DIFFERENT, FAILED = "missing", "absent", "different", "failed"
GOOD = (WRITTEN, COMPLETE, EQUAL)
"""Outcomes that are no problem: written now, there already, and equal to the rule."""
BAD = (MISSING, ABSENT, DIFFERENT, FAILED)
"""Label file missing; when checking: coarse file missing or wrong; unreadable or unusable."""


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
        token: Sample token.
        status: One of ``GOOD`` or ``BAD``.
        detail: File and reason, empty if all is well.
    """

    token: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Job:
    """One sample to work on: its token, and its label folder as the info file leads to it."""

    token: str
    folder: str


def make_jobs(infos: Sequence[Mapping], dataset_name: str) -> list[Job]:
    """The samples of an info file with their label folders."""
    return [Job(info["token"], label_folder(info["occ_path"], dataset_name)) for info in infos]


def run_job(job: Job, *, free_index: int, info_file: str, overwrite: bool = False, check: bool = False) -> Outcome:
    """Make or check the coarse label files of one sample. Problems with files come back as outcomes.

    Args:
        job: The sample.
        free_index: Label of free space.
        info_file: Where the sample comes from; its folder is the second place where relative paths are looked up.
        overwrite: Write files that are there already, too.
        check: Write nothing; compare the files with the labels.
    """
    try:
        path = resolve_path(f"{job.folder}/{LABEL_FILE}", info_file)
    except DataError as error:
        return Outcome(job.token, MISSING, str(error))
    try:
        if check:
            return _check(job, path, free_index)
        if not overwrite and coarse_files_complete(path):
            return Outcome(job.token, COMPLETE)
        write_coarse_labels(path.parent, coarse_grids(path, free_index))
        return Outcome(job.token, WRITTEN)
    except (DataError, OSError) as error:
        return Outcome(job.token, FAILED, str(error))


def coarse_grids(path: Path, free_index: int) -> dict[int, np.ndarray]:
    """Coarse grids by factor, from the label file ``path``.

    Raises:
        DataError: the file is unreadable or its ``semantics`` is no grid that can be down-sampled.
    """
    labels = read_arrays(path, "semantics")["semantics"]
    try:
        return dict(zip(FACTORS, downsample_scales(labels, FACTORS, free_index), strict=True))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: semantics: {error}") from None


def coarse_files_complete(path: Path) -> bool:
    """Whether all coarse files beside the label file ``path`` can be opened and hold grids of the right size.

    Only their headers are read.
    """
    try:
        shape = read_headers(path)["semantics"].shape
        for factor in FACTORS:
            wanted = ArrayHeader(tuple(size // factor for size in shape), np.dtype(np.uint8))
            if read_headers(path.with_name(coarse_name(factor))) != dict.fromkeys(COARSE_ENTRIES, wanted):
                return False
    except (DataError, KeyError):
        return False
    return True


def compare_coarse_files(path: Path, free_index: int) -> str:
    """How the coarse files beside the label file ``path`` differ from the rule, empty if they do not.

    Raises:
        DataError: a file is missing or unreadable.
    """
    for factor, expected in coarse_grids(path, free_index).items():
        coarse = path.with_name(coarse_name(factor))
        for name, found in read_arrays(coarse, *COARSE_ENTRIES).items():
            if found.shape != expected.shape or found.dtype != np.uint8:
                return (f"{coarse}: {name}: expected uint8 {list(expected.shape)}, found {found.dtype} "
                        f"{list(found.shape)}")
            if count := int(np.count_nonzero(found != expected)):
                return f"{coarse}: {name}: {count} of {expected.size} voxels differ from the rule"
    return ""


def _check(job: Job, path: Path, free_index: int) -> Outcome:
    absent = [coarse_name(factor) for factor in FACTORS if not path.with_name(coarse_name(factor)).exists()]
    if absent:
        return Outcome(job.token, ABSENT, f"{path.parent}: {', '.join(absent)} not made yet")
    detail = compare_coarse_files(path, free_index)
    return Outcome(job.token, DIFFERENT if detail else EQUAL, detail)


def job_runner(free_index: int, info_file: str, overwrite: bool, check: bool) -> partial:
    """:func:`run_job` with its options set, in a form that worker processes can be given."""
    return partial(run_job, free_index=free_index, info_file=str(info_file), overwrite=overwrite, check=check)
