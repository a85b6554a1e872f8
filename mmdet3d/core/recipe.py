"""What a config says about the size of a training: batch, iterations, learning rate, and how they go together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmcv import Config

from mmdet3d.registry import ConfigError, check_keys

RECIPE_GPUS = 8
"""Number of GPUs of published configs that do not name one."""


def samples_per_gpu(cfg: Mapping) -> int:
    """Batch size of one process in training.

    Raises:
        ConfigError: it is missing or no positive whole number.
    """
    data = cfg.get("data", {})
    value = data.get("train_dataloader", {}).get("samples_per_gpu", data.get("samples_per_gpu"))
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"data.samples_per_gpu: expected a positive whole number, got {value!r}")
    return value


def cumulative_iters(cfg: Mapping) -> int:
    """Iterations that make one step of the optimizer."""
    return (cfg.get("optimizer_config") or {}).get("cumulative_iters", 1)


def effective_batch(cfg: Mapping, world_size: int) -> int:
    """Samples that one step of the optimizer sees: processes x samples per GPU x accumulated iterations."""
    return world_size * samples_per_gpu(cfg) * cumulative_iters(cfg)


def recipe_batch(cfg: Mapping) -> int | None:
    """Samples per step that the schedule was made for, ``num_gpus * samples_per_gpu``; None if the config is silent."""
    if not isinstance(cfg.get("num_gpus"), int):
        return None
    return cfg["num_gpus"] * cfg.get("samples_per_gpu", samples_per_gpu(cfg))


def batch_warning(cfg: Mapping, world_size: int) -> str | None:
    """What to tell a user whose effective batch is not the recipe's; None if it is."""
    effective, wanted = effective_batch(cfg, world_size), recipe_batch(cfg)
    if wanted is None or effective == wanted:
        return None
    product = f"{world_size} processes x {samples_per_gpu(cfg)} samples x {cumulative_iters(cfg)} iterations per step"
    accumulate = max(wanted * cumulative_iters(cfg) // effective, 1)
    advice = ("learning rate and iterations follow it, as auto_scale asks" if cfg.get("auto_scale") else
              "learning rate and iterations stay as the config has them. With --cfg-options auto_scale=True they "
              f"follow the batch; with optimizer_config.cumulative_iters={accumulate} as well, the batch stays about "
              "that of the recipe")
    return f"the effective batch is {effective} ({product}), the recipe is made for {wanted}: {advice}"


def scaled(cfg: Config, world_size: int, autoscale_lr: bool = False) -> Config:
    """The config with learning rate and lengths that follow the batch, as far as it asks for that.

    ``auto_scale=True`` or ``auto_scale=dict(base_batch=16)`` (default: the recipe's batch): the learning rate is
    multiplied by effective batch / base batch, and iterations (``runner.max_iters``, steps of ``lr_config``, intervals
    of checkpoints, evaluation and averaged weights) are multiplied by base batch / samples of one iteration, so that
    the training sees as many samples as the recipe. The warm-up keeps its number of iterations.

    Args:
        cfg: Stays as it is.
        world_size: Number of processes.
        autoscale_lr: Multiply the learning rate by processes / GPUs of the recipe, and change nothing else.

    Raises:
        ConfigError: ``auto_scale`` has an unknown key, or the base batch is unknown.
    """
    result = copy.deepcopy(cfg)
    wish = cfg.get("auto_scale")
    if autoscale_lr:
        if wish:
            raise ConfigError("auto_scale and --autoscale-lr both change the learning rate: use one of them")
        result.optimizer["lr"] = cfg.optimizer["lr"] * world_size / cfg.get("num_gpus", RECIPE_GPUS)
        return result
    if not wish:
        return result
    base = _base_batch(cfg, wish)
    result.optimizer["lr"] = cfg.optimizer["lr"] * effective_batch(cfg, world_size) / base
    _scale_lengths(result, base / (world_size * samples_per_gpu(cfg)), cumulative_iters(cfg))
    return result


def _base_batch(cfg: Config, wish: Any) -> int:
    if wish is not True:
        check_keys(wish, ("base_batch",), "auto_scale")
    base = wish.get("base_batch") if wish is not True else None
    base = recipe_batch(cfg) if base is None else base
    if not isinstance(base, int) or base < 1:
        raise ConfigError(f"auto_scale.base_batch: expected the batch that the schedule was made for, got {base!r}")
    return base


def _scale_lengths(cfg: Config, factor: float, group: int) -> None:
    """Multiply numbers of iterations, in place; whole groups of accumulated iterations."""
    def length(value: int) -> int:
        return max(round(value * factor / group), 1) * group

    cfg.runner["max_iters"] = length(cfg.runner["max_iters"])
    if "step" in cfg.lr_config:
        step = cfg.lr_config["step"]
        cfg.lr_config["step"] = length(step) if isinstance(step, int) else [length(value) for value in step]
    evaluation = cfg.get("evaluation") or {}
    parts = [cfg.get("checkpoint_config"), evaluation, evaluation.get("pictures"), *(cfg.get("custom_hooks") or ())]
    for part in parts:
        if part and isinstance(part.get("interval"), int) and part["interval"] > 0:
            part["interval"] = length(part["interval"])
