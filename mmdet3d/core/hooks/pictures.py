"""Predictions of a few samples, drawn beside the ground truth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdet3d.core.evaluation.samples import EvaluationSamples
from mmdet3d.core.predictor import Predictor
from mmdet3d.core.visualization.compare import compose_comparison
from mmdet3d.core.visualization.occupancy import save_png
from mmdet3d.datasets.infos import resolve_path, scene_name
from mmdet3d.datasets.labels import CAMERAS
from mmdet3d.datasets.loader import collate
from mmdet3d.utils.files import prediction_path
from mmdet3d.utils.transfer import to_numpy


class PictureDrawer:
    """Draws some samples of a data set as a model sees them.

    Args:
        dataset: Data set in test mode.
        samples: Numbers or tokens of samples.
        history: Frames of the same sequence before each sample that the model sees first.
        width: Width of the pictures in pixels.

    Raises:
        ValueError: a sample does not exist, or a number is out of range.
    """

    def __init__(self, dataset: Any, samples: Sequence[int | str], history: int = 3, width: int = 1600) -> None:
        if history < 0 or not 320 <= width <= 8192:
            raise ValueError(f"expected history of at least 0 and width 320 to 8192, got {history} and {width}")
        if isinstance(samples, str) or not samples:
            raise ValueError(f"samples: expected a list of numbers or tokens, got {samples!r}")
        self.dataset, self.history, self.width = dataset, history, width
        tokens = {dataset.data_infos[index]["token"]: index for index in range(len(dataset))}
        numbers = [tokens.get(sample, -1) if isinstance(sample, str) else sample for sample in samples]
        wrong = [sample for sample, number in zip(samples, numbers, strict=True) if not 0 <= number < len(dataset)]
        if wrong:
            raise ValueError(f"samples: {wrong} are not among the {len(dataset)} samples of {dataset.ann_file}")
        self.samples = tuple(int(number) for number in numbers)

    def draw(self, predictor: Predictor, folder: str | os.PathLike, title: str = "") -> list[Path]:
        """Write ``<folder>/<scene>/<token>.png`` for every sample.

        Args:
            predictor: What predicts.
            folder: Where.
            title: First line of the pictures, before scene and token.

        Returns:
            The files.
        """
        return [self._draw_one(predictor, index, Path(folder), title) for index in self.samples]

    def _draw_one(self, predictor: Predictor, index: int, folder: Path, title: str) -> Path:
        info = self.dataset.data_infos[index]
        semantics, flow = self._predict(predictor, index)
        truth = self.dataset.ground_truth(index)
        true_flow = truth["flow"]
        path = prediction_path(folder, scene_name(info), info["token"]).with_suffix(".png")
        images = {name: Image.open(resolve_path(camera["data_path"], self.dataset.ann_file))
                  for name, camera in info["cams"].items() if name in CAMERAS}
        words = " ".join(part for part in (title, scene_name(info), info["token"]) if part)
        moving = None if true_flow is None else flow.astype(np.float32)
        picture = compose_comparison(
            images, (truth["semantics"], None if true_flow is None else true_flow.astype(np.float32)),
            (semantics, moving), self.dataset.labels, words, width=self.width)
        save_png(picture, path)
        return path

    def _predict(self, predictor: Predictor, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and flow of a sample, after the frames before it."""
        flags = self.dataset.flag
        first = max(index - self.history, int(np.flatnonzero(flags == flags[index])[0]))
        samples, memory = EvaluationSamples(self.dataset, None), None
        for number in range(first, index + 1):
            batch = collate([samples[number]])
            semantics, flow, memory = predictor(batch["img_inputs"], batch["img_metas"], memory)
        return to_numpy(semantics[0], flow[0])
