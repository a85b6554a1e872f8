"""A pipeline: steps that pass one dict on, and how they report what is wrong with a sample."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmdet3d.datasets.infos import DataError
from mmdet3d.interfaces import PipelineStep, RemembersSamples
from mmdet3d.registry import PIPELINES, build_from_config, check_contract, config_place


class Compose:
    """Runs steps one after the other.

    Args:
        transforms: Configs of registered steps, or callables that take and return the dict of a sample. A list among
            them stands for its steps, so that a config can put steps between those of its base.
        place: Name of the list in the config, for messages.

    Raises:
        mmdet3d.registry.ConfigError: a step is unknown, does not take what it is given, or is no
            :class:`~mmdet3d.interfaces.PipelineStep`.
    """

    def __init__(self, transforms: Sequence[Mapping | Callable], place: str = "pipeline") -> None:
        self.transforms = []
        for position, transform in enumerate(transforms):
            here = f"{place}[{position}]"
            if isinstance(transform, list | tuple):
                self.transforms += Compose(transform, here).transforms
                continue
            with config_place(here):
                built = transform if callable(transform) else build_from_config(transform, PIPELINES)
                check_contract(built, PipelineStep, RemembersSamples)
            self.transforms.append(built)

    def __call__(self, results: dict) -> dict:
        """What the last step makes of ``results``."""
        for transform in self.transforms:
            results = transform(results)
        return results

    def __iter__(self):
        """The steps, and those inside of steps that hold others."""
        for transform in self.transforms:
            yield transform
            yield from getattr(transform, "transforms", ())


def sample_error(step: Any, results: Mapping, message: str) -> DataError:
    """Error of ``step`` that names the sample."""
    return DataError(f"{type(step).__name__}: sample {results.get('sample_idx', '(no token)')}: {message}")


def require(step: Any, results: Mapping, *keys: str) -> None:
    """Check that the steps before gave ``keys``.

    Raises:
        DataError: one is missing.
    """
    if missing := [key for key in keys if key not in results]:
        raise sample_error(step, results, f"needs {missing}, which no step before it gave; there is {sorted(results)}")


def generator(results: Mapping) -> np.random.RandomState:
    """Where the random draws of a sample come from: ``results["rng"]``, else NumPy's global legacy generator.

    Every loader worker has a global generator of its own, seeded by the loader.
    """
    rng = results.get("rng")
    return np.random.mtrand._rand if rng is None else rng
