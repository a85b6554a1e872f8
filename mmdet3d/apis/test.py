"""Evaluate the checkpoint of a config on its test data."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from mmcv import Config
from torch import nn

from mmdet3d.core.checkpointing import versions
from mmdet3d.core.evaluation import Evaluation, Evaluator, EvaluatorOptions
from mmdet3d.core.evaluation.settings import evaluation_settings, loader_settings
from mmdet3d.datasets import build_dataset
from mmdet3d.utils.files import without_nan, write_json

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


def write_record(path: str | os.PathLike, evaluation: Evaluation, **about: Any) -> Path:
    """Write everything about an evaluation that another person needs to compare with it.

    Args:
        path: JSON file.
        evaluation: What came of it.
        **about: Further entries, such as config and checkpoint.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {**about, **evaluation.record(), "versions": {**versions(), "gpu": gpu}}
    write_json(path, without_nan(record), allow_nan=False)
    return Path(path)
