"""Evaluation during training, and pictures of predictions beside the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from mmcv import Config
from mmcv.runner import Hook, LogBuffer, LoggerHook
from torch import Tensor, nn
from torch import distributed as dist

from mmdet3d.core.evaluation import Evaluation, Evaluator, EvaluatorOptions
from mmdet3d.core.evaluation.settings import evaluation_settings, loader_settings
from mmdet3d.core.hooks.ema import MEGVIIEMAHook
from mmdet3d.core.hooks.pictures import PictureDrawer
from mmdet3d.core.parallel import unwrap
from mmdet3d.core.predictor import Predictor
from mmdet3d.core.random_state import preserved_random_state
from mmdet3d.datasets import build_dataset
from mmdet3d.models import build_model
from mmdet3d.registry import ConfigError, check_keys

_OPTIONS = tuple(field.name for field in fields(EvaluatorOptions) if field.name not in ("score", "out"))
_KEYS = ("interval", "use_ema", "pictures", "pipeline", *_OPTIONS)


class EvaluationHook(Hook):
    """Evaluates every ``interval`` iterations and after the last one, and draws pictures at their own interval.

    A copy of the model is evaluated, with the weights and running statistics of process 0 in all processes, so that
    the score does not depend on where a sample is evaluated. Nothing of the training is touched: weights, statistics,
    modes, temporal memory, gradients and random generators stay as they are. The scores go to the loggers, with the
    mode ``val``.

    To be registered after the hook that averages weights (priority LOW), before the loggers.

    Args:
        model_config: ``model`` of the config.
        evaluator: Evaluator of the validation data.
        interval: Iterations from one evaluation to the next; 0 evaluates nothing.
        use_ema: Evaluate the averaged weights.
        pictures: Draws samples; None draws none.
        picture_interval: Iterations from one set of pictures to the next.
    """

    def __init__(self, model_config: Mapping, evaluator: Evaluator, interval: int, use_ema: bool = False,
                 pictures: PictureDrawer | None = None, picture_interval: int = 0) -> None:
        self.model_config, self.evaluator, self.interval, self.use_ema = model_config, evaluator, interval, use_ema
        self.pictures, self.picture_interval = pictures, picture_interval
        self.latest: Evaluation | None = None

    def before_run(self, runner: Any) -> None:
        """Make sure that there are averaged weights if they are wanted.

        Raises:
            ConfigError: there are none.
        """
        if self.use_ema and self._average(runner) is None:
            raise ConfigError("evaluation.use_ema: the config has no hook that averages weights (MEGVIIEMAHook)")

    def after_train_iter(self, runner: Any) -> None:
        """Evaluate and draw when it is time."""
        scores, draws = self._due(runner, self.interval), self._due(runner, self.picture_interval)
        if not scores and not (draws and self.pictures is not None):
            return
        device = next(unwrap(runner.model).parameters()).device
        with preserved_random_state(device):
            predictor = self.evaluator.predictor(self._copy(runner, device), inplace=True)
            if scores:
                self._evaluate(runner, predictor)
            if draws and self.pictures is not None and runner.rank == 0:
                folder = Path(runner.work_dir) / "pictures" / f"iter_{runner.iter + 1}"
                self.pictures.draw(predictor, folder, f"iteration {runner.iter + 1}")

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _due(self, runner: Any, interval: int) -> bool:
        return interval > 0 and (self.every_n_iters(runner, interval) or runner.iter + 1 == runner.max_iters)

    @staticmethod
    def _average(runner: Any) -> MEGVIIEMAHook | None:
        return next((hook for hook in runner.hooks if isinstance(hook, MEGVIIEMAHook)), None)

    def _copy(self, runner: Any, device: torch.device) -> nn.Module:
        """A model of its own with the weights of process 0."""
        model = build_model(self.model_config)
        source: Mapping[str, Tensor] = unwrap(runner.model).state_dict()
        if self.use_ema and runner.rank == 0:
            source = self._average(runner).state_dict()
        model.load_state_dict(source)
        model.to(device).eval()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)
        return model

    def _evaluate(self, runner: Any, predictor: Predictor) -> None:
        runner.logger.info("evaluating %d samples", len(self.evaluator.dataset))
        self.latest = self.evaluator.run(predictor)
        runner.logger.info("evaluation after %d iterations, %.1f s:\n%s", runner.iter + 1, self.latest.seconds,
                           self.latest.summary.table())
        _log(runner, self._values(self.latest))

    def _values(self, evaluation: Evaluation) -> dict[str, float]:
        rays = evaluation.summary.rays
        names = ("RayIoU", "RayIoU@1", "RayIoU@2", "RayIoU@4", "mAVE", "occ_score")
        return {**{name: rays[name] for name in names}, "voxel_mIoU": evaluation.summary.voxels["miou"],
                "samples": evaluation.samples, "seconds": round(evaluation.seconds, 1)}


def _log(runner: Any, values: Mapping[str, float]) -> None:
    """Hand values to the loggers without disturbing what they gather of the training."""
    training, runner.log_buffer = runner.log_buffer, LogBuffer()
    mode, runner.mode = runner.mode, "val"
    try:
        runner.log_buffer.output.update(values)
        for hook in runner.hooks:
            if isinstance(hook, LoggerHook):
                hook.log(runner)
    finally:
        runner.log_buffer, runner.mode = training, mode


def build_evaluation_hook(cfg: Config) -> EvaluationHook:
    """The hook that ``evaluation`` of a config describes; the config stays as it is.

    ``evaluation`` may have ``interval`` (iterations; default: that of the checkpoints), ``use_ema``, ``pictures``
    (``interval``, ``samples``, ``history``, ``width``: see :class:`~mmdet3d.core.hooks.pictures.PictureDrawer`), and
    the options of :class:`~mmdet3d.core.evaluation.EvaluatorOptions`. The data are ``data.val``. A ``pipeline``, which
    published base configs have beside an interval that counts epochs, is not read, and neither is that interval.

    The hook finds the device by the model. Register it with the priority LOW.

    Raises:
        ConfigError: an option is unknown or does not fit.
        DataError: the validation data cannot be read.
    """
    options = dict(cfg.get("evaluation") or {})
    check_keys(options, _KEYS, "evaluation")
    if "pipeline" in options:
        options = {key: value for key, value in options.items() if key not in ("pipeline", "interval")}
    dataset_config, loader = evaluation_settings(cfg, "val")
    dataset = build_dataset(dataset_config, place="data.val")
    given = {key: options[key] for key in _OPTIONS if key in options}
    try:
        evaluator = Evaluator(dataset, EvaluatorOptions(**{"graphs": False, **loader, **given}), loader_settings(cfg))
    except ValueError as error:
        raise ConfigError(f"evaluation: {error}") from error
    interval = _interval(options, (cfg.get("checkpoint_config") or {}).get("interval", -1))
    pictures, picture_interval = _pictures(options.get("pictures"), dataset, interval)
    return EvaluationHook(cfg.model, evaluator, interval, bool(options.get("use_ema", False)), pictures,
                          picture_interval)


def _interval(options: Mapping, default: int, place: str = "evaluation") -> int:
    """``interval`` of ``options``; -1 as default means: after the last iteration only."""
    value = options.get("interval", default)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ConfigError(f"{place}.interval: expected a positive whole number, or -1 for the last iteration only, got "
                          f"{value!r}")
    return 2**62 if value == -1 else value


def _pictures(options: Mapping | None, dataset: Any, interval: int) -> tuple[PictureDrawer | None, int]:
    if options is None:
        return None, 0
    check_keys(options, ("interval", "samples", "history", "width"), "evaluation.pictures")
    samples: Sequence = options.get("samples", (0,))
    try:
        drawer = PictureDrawer(dataset, samples, options.get("history", 3), options.get("width", 1600))
    except ValueError as error:
        raise ConfigError(f"evaluation.pictures: {error}") from error
    return drawer, _interval(options, interval, "evaluation.pictures")
