"""Scores of all processes, brought together."""

from __future__ import annotations

import datetime
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import distributed as dist

from mmdet3d.datasets.scoring import SampleScore, first_of_each, in_order

_PATIENCE = datetime.timedelta(days=7)
"""Processes may finish hours apart, and one that dies takes the others with it anyway."""

_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""By the default group they belong to, and gone with it."""


def _patient_group() -> Any:
    """A group of all processes that talks over the CPU."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[world]


def gather(value: Any) -> list[Any]:
    """What each process passed, by rank, in all of them. To be called by all; takes plain objects."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def exact_collection(ranks: Sequence[Sequence[Sequence[SampleScore]]]) -> list[SampleScore]:
    """Scores of all processes in the order of the data set.

    Args:
        ranks: For each process, for each of its batches, the scores.

    Raises:
        CoverageError: a sample was evaluated twice.
    """
    return in_order(score for batches in ranks for batch in batches for score in batch)


def published_collection(ranks: Sequence[Sequence[Sequence[SampleScore]]], num_samples: int) -> list[SampleScore]:
    """Scores as the published evaluation collects them.

    The first batch of each process, then the second, and so on; if there are several processes, cut after
    ``num_samples`` **batches**; of several scores of a sample the first.
    """
    def batches() -> Iterator[Sequence[SampleScore]]:
        for step in zip(*ranks, strict=False):
            yield from step

    kept = itertools.islice(batches(), num_samples if len(ranks) > 1 else None)
    return first_of_each(score for batch in kept for score in batch)
