"""The training loop: mmcv's iteration-based runner with plain batches, mixed precision and a way to stop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import IterBasedRunner, IterTimerHook
from mmcv.runner.utils import get_host_info
from torch.utils.data import DataLoader

from mmdet3d.core.checkpoint_files import Resumed
from mmdet3d.core.checkpointing import between_steps, resume_training_state, save_training_state
from mmdet3d.core.cuda_graphs.steps import StepGraph
from mmdet3d.core.hooks.builder import build_hook
from mmdet3d.core.interrupt import StopRequest, TrainingInterrupted
from mmdet3d.datasets.loader import to_device
from mmdet3d.registry import ConfigError, check_keys
from mmdet3d.utils.compat import BoundedLogBuffer
from mmdet3d.utils.precision import PRECISIONS


class TrainRunner(IterBasedRunner):
    """Trains for a number of iterations.

    One iteration is one forward pass. Its order is zero_grad, forward, backward, clip, step (by the optimizer hook),
    then checkpoint, averaged weights, timer and logs.

    Args:
        model: The detector, or :class:`mmdet3d.core.parallel.DistributedModel` around it; on its device.
        optimizer: Of all its parameters.
        logger: Where progress goes.
        work_dir: Folder of logs and checkpoints.
        max_iters: Iterations of the whole training.
        meta: What is known about the run; it goes into checkpoints and the JSON log.
        precision: "fp32", or "bf16": the forward pass uses bfloat16 where that is safe; parameters, gradients,
            optimizer and losses stay in float32.
        train_sampler: Sampler of the loader that :meth:`run` will be given; its position is saved and restored.
        cuda_graphs: Replay CUDA graphs in iterations in which no sequence starts, see
            :class:`mmdet3d.core.cuda_graphs.steps.StepGraph`: in a single process, on a GPU, without accumulation of
            gradients.

    Attributes:
        device: Device of the model.
        step_graph: What replays, or None.
        resumed: What is known of the checkpoint that the training goes on from, or None.

    Raises:
        ConfigError: ``precision`` is unknown, or ``cuda_graphs`` is not possible.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, *, logger: Any,
                 work_dir: str | os.PathLike, max_iters: int, meta: dict | None = None, precision: str = "fp32",
                 train_sampler: Any = None, cuda_graphs: bool = False) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: expected one of {sorted(PRECISIONS)}, got {precision!r}")
        super().__init__(model, optimizer=optimizer, work_dir=str(work_dir), logger=logger,
                         meta={} if meta is None else meta, max_iters=max_iters)
        self.precision = precision
        self.device = next(model.parameters()).device
        self.train_sampler = train_sampler
        self.step_graph = StepGraph(model, precision) if cuda_graphs else None
        self.log_buffer = BoundedLogBuffer()
        self.stop = StopRequest()
        self.stopped_by = 0
        self.resumed: Resumed | None = None
        self._saved_at: int | None = None

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def register_training_hooks(self, lr_config: Mapping, optimizer_config: Mapping | None = None,
                                checkpoint_config: Mapping | None = None, log_config: Mapping | None = None,
                                momentum_config: Mapping | None = None, timer_config: Any = None,
                                custom_hooks_config: Sequence[Mapping] | None = None,
                                finite_loss: Mapping | None = None) -> None:
        """Register what a config asks for, in mmcv's order; the configs stay as they are.

        Learning rate (VERY_HIGH), momentum (HIGH), check of the losses and optimizer step (ABOVE_NORMAL), checkpoint
        (NORMAL), timer (LOW), logs (VERY_LOW); others as their ``priority`` says (NORMAL), after the former.

        Raises:
            ConfigError: a hook is unknown or does not take what it is given.
        """
        self.register_hook(_updater(lr_config, "lr_config", "LrUpdaterHook"), "VERY_HIGH")
        if momentum_config is not None:
            self.register_hook(_updater(momentum_config, "momentum_config", "MomentumUpdaterHook"), "HIGH")
        self.register_hook(build_hook({"type": "FiniteLossHook", **(finite_loss or {})}, "finite_loss"), "ABOVE_NORMAL")
        self.register_hook(build_hook({"type": "OptimizerHook", **(optimizer_config or {})}, "optimizer_config"),
                           "ABOVE_NORMAL")
        if checkpoint_config is not None:
            self.register_hook(build_hook({"type": "CheckpointHook", "by_epoch": False, **checkpoint_config},
                                          "checkpoint_config"), "NORMAL")
        self.register_hook(timer_config or IterTimerHook(), "LOW")
        self._register_loggers(log_config)
        for index, cfg in enumerate(custom_hooks_config or ()):
            self.register_hook(build_hook(cfg, f"custom_hooks[{index}]"), cfg.get("priority", "NORMAL"))

    def _register_loggers(self, log_config: Mapping | None) -> None:
        if log_config is None:
            return
        check_keys(log_config, ("interval", "hooks"), "log_config")
        interval = log_config.get("interval", 10)
        self.log_buffer.keep = max(self.log_buffer.keep, interval)
        for index, cfg in enumerate(log_config.get("hooks", ())):
            hook = build_hook(cfg, f"log_config.hooks[{index}]", interval=interval, by_epoch=False)
            self.register_hook(hook, "VERY_LOW")

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, data_loaders: Sequence[DataLoader], workflow: Sequence[tuple[str, int]] = (("train", 1),)) -> None:
        """Train until ``max_iters`` iterations are finished.

        Args:
            data_loaders: One endless loader, see :func:`mmdet3d.datasets.loader.build_dataloader`.
            workflow: ``[("train", 1)]``, as published configs have it.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM came; the state after the last finished iteration is saved.
            ConfigError: ``workflow`` asks for something else.
        """
        check_workflow(workflow)
        (self.data_loader,) = data_loaders
        self.logger.info("host: %s, work_dir: %s, %d processes on %s, %s, iteration %d to %d", get_host_info(),
                         self.work_dir, self.world_size, self.device, self.precision, self.iter, self.max_iters)
        self.logger.info("hooks in the order in which they are called:\n%s", self.get_hook_info())
        with self.stop.listening():
            self.call_hook("before_run")
            if self.resumed:
                self.resumed.hook_states.clear()  # as large as the weights
            self.call_hook("before_epoch")
            batches = iter(self.data_loader) if self.iter < self.max_iters else None
            while self.iter < self.max_iters and not self.stopped_by:
                self.train(batches)
            del batches  # ends the workers of the loader
            if self.stopped_by and self.iter < self.max_iters:
                raise TrainingInterrupted(self.stopped_by)
            self.call_hook("after_epoch")
            self.call_hook("after_run")

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One iteration with the next batch of the iterator ``data_loader``."""
        if not self.model.training:  # to walk through all modules every time takes milliseconds
            self.model.train()
        self.mode = "train"
        self.data_batch = to_device(next(data_loader), self.device)
        self.call_hook("before_train_iter")
        self.outputs = self.train_step(self.data_batch, **kwargs)
        self.log_buffer.update(self.outputs["log_vars"], self.outputs["num_samples"])
        self.call_hook("after_train_iter")
        self._stop_if_asked()
        self.data_batch = self.outputs = None
        self._inner_iter += 1
        self._iter += 1

    def train_step(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Forward pass and losses of a batch on the device: ``loss``, ``log_vars`` and ``num_samples``.

        With CUDA graphs the backward pass, too, as ``backward_done`` says.

        Raises:
            TypeError: the model's ``train_step`` returned something else.
        """
        if self.step_graph is not None:
            return self.step_graph.step(batch)
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = self.model.train_step(batch, self.optimizer, **kwargs)
        if not isinstance(outputs, dict) or not {"loss", "log_vars", "num_samples"} <= outputs.keys():
            raise TypeError("train_step of the model must return a dict with loss, log_vars and num_samples, got "
                            f"{sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__}")
        return outputs

    def _stop_if_asked(self) -> None:
        """Between two steps of the optimizer, which is where a checkpoint can be made."""
        if not between_steps(self):
            return
        self.stopped_by = self.stop.agreed()
        if self.stopped_by and self._saved_at != self.iter:
            path = self.save_checkpoint(self.work_dir)
            self.logger.warning("saved %s; go on with --resume", path)

    def val(self, data_loader: Any, **kwargs: Any) -> None:
        """Not there: evaluation in training keeps a memory of its own, see the evaluation hook.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("evaluation in training is done by a hook: --validate")

    # ---- state ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, out_dir: str | os.PathLike, filename_tmpl: str = "iter_{}.pth", **options: Any) -> Path:
        """Write the complete state after the current iteration; to be called by all processes, in a hook.

        Args:
            out_dir: Folder.
            filename_tmpl: Name; ``{}`` becomes the number of finished iterations.
            **options: Of :func:`mmdet3d.core.checkpointing.save_training_state`.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are as they were.
        """
        path = Path(out_dir) / filename_tmpl.format(self.iter + 1)
        save_training_state(self, path, **options)
        self._saved_at = self.iter
        return path

    def resume(self, checkpoint: str | os.PathLike, **options: Any) -> None:
        """Go on from a checkpoint; to be called by all processes before :meth:`run`.

        Args:
            checkpoint: The file.
            **options: Of :func:`mmdet3d.core.checkpointing.resume_training_state`.

        Raises:
            CheckpointError: it cannot be read or does not belong to this training.
        """
        kinds = [{key: group.get(key) for key in _KINDS} for group in self.optimizer.param_groups]
        resume_training_state(self, checkpoint, **options)
        _restore_kinds(self.optimizer, kinds)


_KINDS = ("fused", "foreach", "capturable", "differentiable")


def _restore_kinds(optimizer: torch.optim.Optimizer, kinds: Sequence[Mapping[str, Any]]) -> None:
    """How a step is computed depends on this machine, not on the one that wrote the checkpoint."""
    for group, kind in zip(optimizer.param_groups, kinds, strict=True):
        group.update({key: value for key, value in kind.items() if key in group})
        on_device = bool(kind["fused"] or kind["capturable"])
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, torch.Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device if on_device else "cpu")


def _updater(cfg: Mapping, place: str, suffix: str) -> Any:
    """The hook of a policy such as ``step``: ``StepLrUpdaterHook``."""
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("policy"), str):
        raise ConfigError(f"{place}: expected a dict with a 'policy' such as 'step', got {cfg!r}")
    policy = cfg["policy"]
    kind = f"{policy.title() if policy.islower() else policy}{suffix}"
    return build_hook({"by_epoch": False, **{k: v for k, v in cfg.items() if k != "policy"}, "type": kind}, place)


def check_workflow(workflow: Sequence[Sequence]) -> None:
    """Refuse other workflows than training alone.

    Raises:
        ConfigError: there is another one.
    """
    if [tuple(flow)[:1] for flow in workflow] != [("train",)]:
        raise ConfigError(f"workflow: only [('train', 1)] is supported, got {list(workflow)!r}; to evaluate in "
                          "training use --validate")
