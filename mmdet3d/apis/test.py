"""Evaluate the checkpoint of a config on its test data."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv import Config
from torch import nn

import mmdet3d
from mmdet3d.core.evaluation import Evaluation, Evaluator, EvaluatorOptions
from mmdet3d.core.evaluation.settings import evaluation_settings, loader_settings
from mmdet3d.datasets import build_dataset
from mmdet3d.utils.files import write_json

logger = logging.getLogger(__name__)


def evaluate_model(cfg: Config, model: nn.Module, options: EvaluatorOptions) -> Evaluation:
    """Evaluate a model on the test data of its config; to be called by all processes.

    Args:
        cfg: Config.
        model: On the device of this process.
        options: How.

    Raises:
        ConfigError: the config does not describe test data.
        DataError: a file is missing or damaged.
        CoverageError: samples are missing or came twice.
    """
    dataset = build_dataset(evaluation_settings(cfg)[0], place="data.test")
    logger.info("evaluating %d samples of %s", len(dataset), dataset.ann_file)
    return Evaluator(dataset, options, loader_settings(cfg)).run(model)


def evaluation_record(evaluation: Evaluation, **about: Any) -> dict[str, Any]:
    """Everything about an evaluation that another person needs to compare with it, as JSON can hold it.

    Args:
        evaluation: What came of it.
        **about: Further entries, such as config and checkpoint.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "mmcv": mmcv.__version__, "mmdet3d": mmdet3d.__version__, "gpu": gpu}
    return without_nan({**about, **evaluation.record(), "versions": versions})


def without_nan(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(path: str | os.PathLike, record: Mapping[str, Any]) -> Path:
    """Write what :func:`evaluation_record` gave."""
    write_json(path, record, allow_nan=False)
    return Path(path)
