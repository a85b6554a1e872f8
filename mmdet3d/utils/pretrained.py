"""Weights to start a training from: a published file, or a ResNet trained on ImageNet."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmdet3d.registry import ConfigError
from mmdet3d.utils.checkpoint import CheckpointError, compare_weights, load_checkpoint, read_checkpoint

logger = logging.getLogger(__name__)

_PREFIXES = ("", "backbone.", "img_backbone.", "forward_projection.img_backbone.", "model.")
"""Of torchvision, of mmdet and mmcls checkpoints, of models of this family."""


def load_initial_weights(model: nn.Module, load_from: str | os.PathLike | None,
                         init_backbone: str | os.PathLike | None = None, allow_unsafe: bool = False) -> None:
    """Start from the weights that a config asks for, and log what was loaded and what was not.

    Args:
        model: The detector.
        load_from: Checkpoint whose entries are loaded where name and shape agree. It may be absent if
            ``init_backbone`` is given, because published configs always name one.
        init_backbone: Weights of the image backbone, see :func:`load_backbone`; loaded before ``load_from``.
        allow_unsafe: Read files that could run code.

    Raises:
        ConfigError: ``load_from`` is absent.
        CheckpointError: a file cannot be read or does not fit.
    """
    absent = load_from is not None and not Path(load_from).exists()
    if absent and init_backbone is None:
        raise ConfigError(
            f"load_from: {load_from} does not exist. Put the published initial weights there, or start without them: "
            "--cfg-options init_backbone=<file> with ImageNet weights of a ResNet-50 (from torchvision or mmdet), or "
            "--cfg-options load_from=None with random weights")
    if init_backbone is not None:
        count = load_backbone(model, init_backbone, allow_unsafe)
        logger.info("%s: loaded all %d entries of the image backbone", init_backbone, count)
    if absent:
        logger.warning("load_from: %s does not exist; starting with the weights of init_backbone alone", load_from)
    elif load_from is not None:
        report = load_checkpoint(model, load_from, strict=False, allow_unsafe=allow_unsafe)
        logger.log(logging.INFO if report.complete else logging.WARNING, report.summary())


def load_backbone(model: nn.Module, path: str | os.PathLike, allow_unsafe: bool = False) -> int:
    """Load ImageNet weights into ``model.forward_projection.img_backbone``.

    Names of torchvision (``layer1.0.conv1.weight``) and of mmdet and mmcls (the same, perhaps after ``backbone.``) are
    those of the backbone with ``style="pytorch"``, which both frameworks share. The classifier is left out.

    Args:
        model: The detector.
        path: The file.
        allow_unsafe: Read a file that could run code.

    Returns:
        Number of entries loaded: all of the backbone, perhaps without counters of batches.

    Raises:
        CheckpointError: the file cannot be read, or lacks an entry of the backbone, or its shape differs. The model
            is then as it was.
        ConfigError: the model has no such backbone, or its ``style`` is another.
    """
    backbone = getattr(getattr(model, "forward_projection", None), "img_backbone", None)
    if backbone is None:
        raise ConfigError(f"init_backbone: {type(model).__name__} has no forward_projection.img_backbone")
    if getattr(backbone, "style", "pytorch") != "pytorch":
        raise ConfigError(f"init_backbone: weights of torchvision and mmdet need img_backbone.style='pytorch', got "
                          f"{backbone.style!r}")
    entries, own = read_checkpoint(path, allow_unsafe)["state_dict"], backbone.state_dict()
    found = max((_below(entries, prefix, own) for prefix in _PREFIXES), key=len)
    fitting, report = compare_weights(Path(path), {"state_dict": found}, own)
    report = replace(report, missing=tuple(key for key in report.missing if not key.endswith("num_batches_tracked")))
    if not report.complete:
        raise CheckpointError(f"{path}: does not hold the weights of the image backbone, "
                              f"{'; '.join(report.differences('backbone'))}")
    backbone.load_state_dict(fitting, strict=False)
    return len(fitting)


def _below(entries: Mapping[str, Any], prefix: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: entries[prefix + key] for key in wanted if isinstance(entries.get(prefix + key), Tensor)}
