"""From counted rays to scores, and to the table that is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mmdet3d.datasets.labels import LabelSet

if TYPE_CHECKING:
    from .ray_iou import RayCounts

_DISTANCES = ("1", "2", "4")


def _mean(values: np.ndarray) -> float:
    """Mean of the numbers among ``values``; NaN if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def scores(counts: RayCounts, labels: LabelSet, samples: int) -> dict:
    """Scores of counted rays.

    Args:
        counts: The counts.
        labels: Their label set.
        samples: Number of samples that were counted.

    Returns:
        Fractions from 0 to 1: ``RayIoU``, ``RayIoU@1``, ``RayIoU@2``, ``RayIoU@4`` and ``occ_score``; ``mAVE`` in m/s;
        ``miou`` and ``mave``, the names under which the reference evaluation prints RayIoU and mAVE; whole numbers
        ``samples``, ``rays`` (whose ground truth is not free) and ``flow_rays`` (which mAVE averages over); and
        ``classes``, by name, each with ``IoU@1``, ``IoU@2``, ``IoU@4``, ``AVE`` and its counts ``gt_rays``,
        ``pred_rays``, ``tp@1``, ``tp@2``, ``tp@4``, ``flow_rays``. What nothing was counted for is NaN.
    """
    solid = [index for index in range(labels.num_classes) if index != labels.free_index]
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = counts.tp / (counts.gt + counts.pred - counts.tp)
        ave = counts.flow_error / counts.flow_rays
    ray_iou, mean_ave = _mean(iou[:, solid]), _mean(ave[list(labels.flow_classes)])
    moving = math.nan if math.isnan(mean_ave) else max(1 - mean_ave, 0.0)
    result = {"RayIoU": ray_iou}
    result |= {f"RayIoU@{name}": _mean(row[solid]) for name, row in zip(_DISTANCES, iou, strict=True)}
    result |= {"mAVE": mean_ave, "occ_score": 0.9 * ray_iou + 0.1 * moving, "miou": ray_iou, "mave": mean_ave,
               "samples": samples, "rays": int(counts.gt[solid].sum()), "flow_rays": int(counts.flow_rays.sum())}
    result["classes"] = {}
    for index in solid:
        row = {f"IoU@{name}": float(iou[i, index]) for i, name in enumerate(_DISTANCES)}
        row |= {"AVE": float(ave[index]), "gt_rays": int(counts.gt[index]), "pred_rays": int(counts.pred[index])}
        row |= {f"tp@{name}": int(counts.tp[i, index]) for i, name in enumerate(_DISTANCES)}
        result["classes"][labels.classes[index]] = row | {"flow_rays": int(counts.flow_rays[index])}
    return result


def _centred(text: str, width: int) -> str:
    """An odd blank goes to the right of texts of odd length, to the left of others."""
    left = (width - len(text) + (len(text) + 1) % 2) // 2
    return " " * left + text + " " * (width - len(text) - left)


def format_table(result: Mapping) -> str:
    """The table of the reference evaluation, and below it its three numbers in full.

    Args:
        result: What :func:`scores` returned.

    Returns:
        Lines, without a line break at the end.
    """
    keys = [f"IoU@{name}" for name in _DISTANCES]
    header = ["Class Names", *keys, "AVE"]
    rows = [[name, *(f"{row[key]:.3f}" for key in (*keys, "AVE"))] for name, row in result["classes"].items()]
    mean = ["MEAN", *(f"{result[f'Ray{key}']:.3f}" for key in keys), f"{result['mAVE']:.3f}"]
    widths = [max(map(len, column)) for column in zip(header, *rows, mean, strict=True)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    lines = ["| " + " | ".join(map(_centred, line, widths)) + " |" for line in (header, *rows, mean)]
    return "\n".join([rule, lines[0], rule, *lines[1:-1], rule, lines[-1], rule, f"MIOU: {result['miou']!r}",
                      f"MAVE: {result['mave']!r}", f"Occ score: {result['occ_score']!r}"])
