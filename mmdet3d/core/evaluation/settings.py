"""What configs say about the data of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet3d.registry import ConfigError

LOADER_KEYS = ("samples_per_gpu", "workers_per_gpu", "runner_type", "persistent_workers", "pin_memory")
"""What ``data.test_dataloader`` may hold."""


def evaluation_settings(cfg: Mapping, part: str = "test") -> tuple[dict[str, Any], dict[str, int]]:
    """What a config says about its test data.

    Args:
        cfg: Config; stays as it is.
        part: "test" or "val", the key of the data set in ``data``.

    Returns:
        Arguments of the data set, in test mode, and ``samples_per_gpu`` and ``workers_per_gpu``. Like the reference, a
        process has a batch size of 1 unless ``data.<part>_dataloader`` or ``data.<part>`` says otherwise, not that of
        the training.

    Raises:
        ConfigError: the config has no such data, or asks for something unknown.
    """
    data = cfg.get("data", {})
    if not isinstance(data.get(part), Mapping):
        raise ConfigError(f"data.{part}: expected the settings of a data set, found {type(data.get(part)).__name__}")
    dataset = {**data[part], "test_mode": True}
    loader = dict(data.get(f"{part}_dataloader", {}))
    if unknown := sorted(set(loader) - set(LOADER_KEYS)):
        raise ConfigError(f"data.{part}_dataloader: unknown {unknown}; accepted are {sorted(LOADER_KEYS)}")
    if loader.get("runner_type", "IterBasedRunnerEval") != "IterBasedRunnerEval":
        raise ConfigError(f"data.{part}_dataloader.runner_type: expected 'IterBasedRunnerEval', got "
                          f"{loader['runner_type']!r}")
    samples = dataset.pop("samples_per_gpu", 1)
    workers = dataset.pop("workers_per_gpu", data.get("workers_per_gpu", 2))
    return dataset, {"samples_per_gpu": loader.get("samples_per_gpu", samples),
                     "workers_per_gpu": loader.get("workers_per_gpu", workers)}


def loader_settings(cfg: Mapping) -> dict[str, Any]:
    """Arguments of the loader that a config sets at its top level."""
    return {"start_method": cfg.get("mp_start_method"), "opencv_threads": cfg.get("opencv_num_threads", 0)}
