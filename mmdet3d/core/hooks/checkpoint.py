"""Checkpoints at intervals."""

from __future__ import annotations

from typing import Any

from mmcv.runner import Hook

from mmdet3d.core.checkpoint_files import remove_leftovers, remove_old_checkpoints
from mmdet3d.core.checkpointing import between_steps
from mmdet3d.core.hooks.builder import HOOKS
from mmdet3d.registry import ConfigError


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Writes ``<work_dir>/iter_<n>.pth`` after every ``interval`` iterations and after the last one.

    What is saved holds the averaged weights **after** the update of the iteration, although their hook has its turn
    later. Where gradients of several iterations make one step, a checkpoint that falls amid them waits for the step.

    Args:
        interval: Iterations from one checkpoint to the next; -1 for the last one only.
        max_keep_ckpts: Checkpoints to keep; -1 keeps all. Files of averaged weights are not counted and stay.
        save_last: Save after the last iteration.
        save_optimizer: Save the state of the optimizer.
        save_memory: Save the temporal memory, see :func:`mmdet3d.core.checkpointing.save_training_state`.
        by_epoch: False; accepted as the mmcv runner has it.

    Raises:
        ConfigError: a number is out of range, or ``by_epoch`` is True.
    """

    def __init__(self, interval: int = -1, max_keep_ckpts: int = -1, save_last: bool = True,
                 save_optimizer: bool = True, save_memory: bool = True, by_epoch: bool = False) -> None:
        for name, value in (("interval", interval), ("max_keep_ckpts", max_keep_ckpts)):
            if not isinstance(value, int) or (value < 1 and value != -1):
                raise ConfigError(f"checkpoint_config.{name}: expected a positive whole number or -1, got {value!r}")
        if by_epoch:
            raise ConfigError("checkpoint_config.by_epoch: training counts iterations; expected False, got True")
        self.interval, self.max_keep_ckpts, self.save_last = interval, max_keep_ckpts, save_last
        self.save_optimizer, self.save_memory = save_optimizer, save_memory
        self._due = False

    def before_run(self, runner: Any) -> None:
        """Remove what a killed process left behind."""
        if runner.rank == 0:
            remove_leftovers(runner.work_dir, runner.resumed)

    def after_train_iter(self, runner: Any) -> None:
        """Save when it is time.

        Raises:
            CheckpointError: the checkpoint cannot be written; the previous one is unharmed.
        """
        last = runner.iter + 1 == runner.max_iters
        self._due |= self.every_n_iters(runner, self.interval) or (self.save_last and last)
        if not self._due or not between_steps(runner):
            return
        self._due = False
        path = runner.save_checkpoint(runner.work_dir, save_memory=self.save_memory,
                                      save_optimizer=self.save_optimizer)
        runner.logger.info("saved checkpoint %s", path)
        if runner.rank == 0 and self.max_keep_ckpts > 0:
            remove_old_checkpoints(path, self.max_keep_ckpts)
