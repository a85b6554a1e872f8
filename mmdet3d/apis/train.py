"""Train the model of a config."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv import Config
from mmcv.runner import build_optimizer
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from mmdet3d.core.checkpoint_files import read_latest
from mmdet3d.core.parallel import DistributedModel
from mmdet3d.core.recipe import batch_warning, samples_per_gpu, scaled
from mmdet3d.core.runner import TrainRunner, check_workflow
from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.loader import build_dataloader
from mmdet3d.datasets.samplers.sequence import distributed_place
from mmdet3d.models import build_model
from mmdet3d.registry import ConfigError, check_keys
from mmdet3d.utils.allocator import keep_freed_memory
from mmdet3d.utils.checkpoint import CheckpointError
from mmdet3d.utils.compat import without_init_report
from mmdet3d.utils.determinism import set_deterministic
from mmdet3d.utils.env import collect_env, format_env
from mmdet3d.utils.files import atomic_write
from mmdet3d.utils.precision import PRECISIONS
from mmdet3d.utils.pretrained import load_initial_weights

logger = logging.getLogger(__name__)

LATEST = "latest"
"""Value of ``resume`` for the newest checkpoint of the work directory."""
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_LOADER_KEYS = ("samples_per_gpu", "workers_per_gpu", "persistent_workers", "pin_memory", "order")


def set_random_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and PyTorch.

    Args:
        seed: The seed.
        deterministic: Also call :func:`mmdet3d.utils.determinism.set_deterministic`.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is meant
    torch.manual_seed(seed)
    if deterministic:
        set_deterministic()


def work_dir_of(cfg: Config, given: str | os.PathLike | None = None) -> Path:
    """Folder of a run: ``given``, else ``work_dir`` of the config, else ``work_dirs/<name of the config file>``."""
    return Path(given or cfg.get("work_dir") or Path("work_dirs", Path(cfg.filename or "config").stem)).absolute()


def dump_config(cfg: Config, folder: str | os.PathLike) -> Path:
    """Write the resolved config into ``folder`` under the name of its file."""
    path = Path(folder) / Path(cfg.filename or "config.py").name
    with atomic_write(path) as file:
        file.write(cfg.pretty_text.encode())
    return path


def build_training_optimizer(model: nn.Module, cfg: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a config. On a GPU it is PyTorch's fused version where nothing speaks against it.

    Raises:
        ConfigError: the type is unknown or does not take what it is given.
    """
    options = dict(cfg)
    kind = getattr(torch.optim, str(options.get("type")), None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if (kind in _FUSED and not {"fused", "foreach", "capturable", "differentiable", "constructor"} & set(options)
            and trained and all(p.is_cuda and p.dtype == torch.float32 for p in trained)):
        options["fused"] = True
    try:
        return build_optimizer(model, options)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"optimizer: {error}") from error


def build_train_loader(cfg: Config, seed: int) -> DataLoader:
    """Data set and loader of ``data.train``.

    Args:
        cfg: The config. ``data.train_dataloader`` may set ``samples_per_gpu``, ``workers_per_gpu``,
            ``persistent_workers``, ``pin_memory`` and ``order`` ("exact" or "published", see
            :func:`mmdet3d.datasets.loader.build_dataloader`).
        seed: Of order and augmentation, the same in all processes.

    Raises:
        ConfigError: the config does not describe a data set, or an option is unknown.
    """
    if "train" not in cfg.get("data", {}):
        raise ConfigError("data.train is missing")
    options = {"workers_per_gpu": cfg.data.get("workers_per_gpu", 2), "persistent_workers": False,
               **cfg.data.get("train_dataloader", {})}
    options["samples_per_gpu"] = samples_per_gpu(cfg)
    check_keys(options, _LOADER_KEYS, "data.train_dataloader")
    dataset = build_dataset(cfg.data.train, place="data.train")
    try:
        return build_dataloader(dataset, training=True, seed=seed, start_method=cfg.get("mp_start_method"),
                                opencv_threads=cfg.get("opencv_num_threads", 0), **options)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def check_training_config(cfg: Config) -> None:
    """Refuse what this training cannot do, before anything is built.

    Raises:
        ConfigError: the runner or the workflow is another, or a part is missing.
    """
    for key in ("model", "data", "optimizer", "lr_config", "runner"):
        if key not in cfg:
            raise ConfigError(f"the config lacks {key!r}")
    if cfg.runner.get("type") != "IterBasedRunner":
        raise ConfigError(f"runner.type: expected IterBasedRunner, got {cfg.runner.get('type')!r}")
    check_keys(cfg.runner, ("type", "max_iters"), "runner")
    if not isinstance(cfg.runner.get("max_iters"), int) or cfg.runner.max_iters < 1:
        raise ConfigError(f"runner.max_iters: expected a positive whole number, got {cfg.runner.get('max_iters')!r}")
    if cfg.get("fp16"):
        raise ConfigError("fp16 is not supported; precision='bf16' trains in mixed precision and needs no loss scale")
    if cfg.get("precision", "fp32") not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {sorted(PRECISIONS)}, got {cfg.precision!r}")
    if cfg.get("revise_keys"):
        raise ConfigError(f"revise_keys is not supported, got {cfg.revise_keys!r}")
    check_workflow(cfg.get("workflow", [("train", 1)]))


def build_training_model(cfg: Config, device: torch.device, resumes: bool, allow_unsafe: bool = False) -> nn.Module:
    """The detector on its device, in training mode, with initial weights unless the training is to be resumed.

    Raises:
        ConfigError: the config does not describe a model, or initial weights are absent.
        CheckpointError: initial weights cannot be read.
    """
    model = build_model(cfg.model)
    with without_init_report():
        model.init_weights()
    if not resumes:
        load_initial_weights(model, cfg.get("load_from"), cfg.get("init_backbone"), allow_unsafe)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad is trained) / 1e6
              for trained in (True, False)]
    logger.info("parameters: %.2f M, of which %.2f M are trained and %.2f M are frozen", sum(counts), *counts)
    return model.to(device).train()


def _checkpoint_to_resume(cfg: Config, resume: str | os.PathLike | None, auto_resume: bool, work_dir: Path
                          ) -> tuple[Path | None, dict[str, Any] | None]:
    """The file, and what is in it if that had to be read to find it."""
    if resume is None:
        resume = cfg.get("resume_from")
    if resume not in (None, LATEST):
        return Path(resume), None
    if resume is None and not auto_resume:
        return None, None
    latest, content = read_latest(work_dir)
    if latest is None and resume == LATEST:
        raise CheckpointError(f"{work_dir} holds no checkpoint to resume from; start without --resume, or name a file")
    return latest, content


def _meta(cfg: Config, seed: int, environment: str, classes: Any) -> dict[str, Any]:
    return {"env_info": environment, "config": cfg.pretty_text, "seed": seed,
            "exp_name": Path(cfg.filename or "config.py").name, "CLASSES": classes, "PALETTE": None}


def train_model(cfg: Config, *, work_dir: str | os.PathLike | None = None, device: torch.device | str = "cpu",
                seed: int = 0, diff_seed: bool = False, deterministic: bool = False,
                resume: str | os.PathLike | None = None, auto_resume: bool = False, validate: bool = False,
                autoscale_lr: bool = False, allow_new_layout: bool = False, allow_unsafe: bool = False,
                timestamp: str | None = None) -> TrainRunner:
    """Train the model of a config, alone or as one process of a job that ``torch.distributed`` has joined.

    Besides the keys of the mmdet family the config may have ``precision`` ("fp32", "bf16"),
    ``optimizer_config.cumulative_iters``, ``auto_scale`` (see :func:`mmdet3d.core.recipe.scaled`), ``init_backbone``
    (see :func:`mmdet3d.utils.pretrained.load_backbone`), ``finite_loss`` (options of the hook of that name),
    ``cuda_graphs`` (see :class:`mmdet3d.core.runner.TrainRunner`), ``find_unused_parameters`` and ``cudnn_benchmark``.

    Args:
        cfg: Stays as it is.
        work_dir: Folder of logs and checkpoints, see :func:`work_dir_of`.
        device: Where the model goes, see :func:`mmdet3d.core.parallel.init_distributed`.
        seed: Of weights, order, augmentation and noise.
        diff_seed: Another seed in each process, for noise; the order of samples stays common.
        deterministic: See :func:`set_random_seed`.
        resume: Checkpoint to go on from, or :data:`LATEST`.
        auto_resume: Go on from the newest checkpoint of ``work_dir`` if there is one.
        validate: Evaluate at the intervals of ``evaluation``.
        autoscale_lr: Multiply the learning rate by processes / GPUs of the recipe.
        allow_new_layout: Resume with another number of processes or batch size.
        allow_unsafe: Read checkpoints that could run code.
        timestamp: Name of the logs; default: now.

    Returns:
        The runner after its last iteration.

    Raises:
        ConfigError: the config does not fit; the message says where.
        CheckpointError: weights or a checkpoint cannot be read, or one cannot be written.
        mmdet3d.core.interrupt.TrainingInterrupted: SIGINT or SIGTERM came; the state is saved.
    """
    check_training_config(cfg)
    rank, world_size = distributed_place()
    device, work_dir = torch.device(device), work_dir_of(cfg, work_dir)
    warning = batch_warning(cfg, world_size)
    cfg = scaled(cfg, world_size, autoscale_lr)
    if warning:
        logger.warning("%s", warning)
    environment = format_env(collect_env()) if rank == 0 else ""
    logger.info("environment:\n%s", environment)
    logger.info("seed %d, deterministic: %s, config:\n%s", seed, deterministic, cfg.pretty_text)
    set_random_seed(seed + rank if diff_seed else seed, deterministic)
    torch.backends.cudnn.benchmark = bool(cfg.get("cudnn_benchmark", False)) and not deterministic
    if device.type == "cpu":
        keep_freed_memory()
    checkpoint, content = _checkpoint_to_resume(cfg, resume, auto_resume, work_dir)
    model = build_training_model(cfg, device, checkpoint is not None, allow_unsafe)
    loader = build_train_loader(cfg, seed)
    if dist.is_available() and dist.is_initialized():
        model = DistributedModel(model, cfg.get("find_unused_parameters", False))
    meta = _meta(cfg, seed, environment, getattr(loader.sequence_dataset, "CLASSES", None))
    runner = TrainRunner(model, build_training_optimizer(model, cfg.optimizer), logger=logger, work_dir=work_dir,
                         max_iters=cfg.runner.max_iters, meta=meta, precision=cfg.get("precision", "fp32"),
                         train_sampler=loader.sequence_sampler, cuda_graphs=bool(cfg.get("cuda_graphs", False)))
    runner.timestamp = timestamp or time.strftime("%Y%m%d_%H%M%S")
    _register_hooks(runner, cfg, validate)
    if checkpoint is not None:
        runner.resume(checkpoint, content=content, allow_new_layout=allow_new_layout, allow_unsafe=allow_unsafe)
    del content  # weights, optimizer and averages, which are in the runner now
    runner.run([loader])
    return runner


def _register_hooks(runner: TrainRunner, cfg: Config, validate: bool) -> None:
    runner.register_training_hooks(
        cfg.lr_config, cfg.get("optimizer_config"), cfg.get("checkpoint_config"), cfg.get("log_config"),
        cfg.get("momentum_config"), custom_hooks_config=cfg.get("custom_hooks"), finite_loss=cfg.get("finite_loss"))
    if validate:
        from mmdet3d.core.hooks.evaluation import build_evaluation_hook

        runner.register_hook(build_evaluation_hook(cfg), priority="LOW")
