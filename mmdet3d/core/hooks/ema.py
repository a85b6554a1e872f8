"""Moving average of the weights, with a decay that grows with the number of updates."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import Hook
from torch import Tensor

from mmdet3d.core.checkpointing import between_steps, to_plain
from mmdet3d.core.hooks.builder import HOOKS
from mmdet3d.core.parallel import unwrap
from mmdet3d.registry import ConfigError
from mmdet3d.utils.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from mmdet3d.utils.text import listing


def ema_decay(updates: int, decay: float = 0.9990) -> float:
    """Decay of update number ``updates``: ``decay * (1 - exp(-updates / 2000))``, as in the YOLOX training."""
    return decay * (1 - math.exp(-updates / 2000))


@HOOKS.register_module()
class MEGVIIEMAHook(Hook):
    """Averages every floating entry of the state dict (parameters and running statistics) after each optimizer step.

    ``average <- d * average + (1 - d) * model`` with d of :func:`ema_decay`. Integer entries keep their value from the
    start. Process 0 keeps the average, on the device of the model; the weights are the same in all processes.
    An iteration that is skipped for a non-finite loss, or only accumulates gradients, is no update.

    Writes ``<work_dir>/iter_<it>_ema.pth`` = {iter, state_dict, updates} after iteration ``it`` (counted from 0) where
    ``it`` is a positive multiple of ``interval``, and ``iter_<max_iters>_ema.pth`` at the end of the run.

    Source: Z. Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv:2107.08430 (code), as used by BEVDet.

    Args:
        init_updates: Number of updates that count as done at the start.
        decay: Decay after many updates.
        interval: Iterations from one file to the next; -1 for the last one only.
        resume: File of averaged weights to start from; the number of updates comes from it too. A training that
            continues from a checkpoint with averaged weights takes those instead.
        restart_on_resume: Begin with the resumed weights and ``init_updates`` again when training continues, as the
            published training did. Default: go on with what the checkpoint holds.

    Raises:
        ConfigError: a number is out of range.
    """

    state_key = "ema"

    def __init__(self, init_updates: int = 0, decay: float = 0.9990, interval: int = -1,
                 resume: str | os.PathLike | None = None, restart_on_resume: bool = False) -> None:
        if not isinstance(interval, int) or (interval < 1 and interval != -1):
            raise ConfigError(f"interval: expected a positive whole number or -1, got {interval!r}")
        if init_updates < 0 or not 0 <= decay <= 1:
            raise ConfigError(f"expected init_updates of at least 0 and a decay within [0, 1], got {init_updates} and "
                              f"{decay}")
        self.init_updates, self.decay, self.interval, self.resume = init_updates, decay, interval, resume
        self.restart_on_resume = restart_on_resume
        self.updates = init_updates
        self._average: dict[str, Tensor] = {}
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._finished = 0

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the names of the model; empty before the run and in other processes than 0.

        The tensors are those that the next update changes.
        """
        return dict(self._average)

    # ---- hook -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_run(self, runner: Any) -> None:
        """Begin with a copy of the model, or with what was saved.

        Raises:
            CheckpointError: the saved average does not fit the model.
        """
        if runner.rank != 0:
            return
        saved, place = runner.resumed and runner.resumed.hook_states.get(self.state_key), "the checkpoint's averages"
        source = unwrap(runner.model).state_dict(keep_vars=True)
        self._average = {name: value.detach().clone() for name, value in source.items()}
        self.updates, self._finished = self.init_updates, runner.iter
        if self.restart_on_resume:
            saved = None
        if saved is None and self.resume is not None:
            saved, place = read_checkpoint(self.resume), str(self.resume)
        elif saved is None and runner.resumed:
            runner.logger.warning("averaged weights begin anew with the resumed weights and %d updates", self.updates)
        if saved is not None:
            self._load(saved, place)
        floating = [name for name, value in source.items() if value.is_floating_point()]
        self._pairs = [self._average[name] for name in floating], [source[name] for name in floating]

    def after_train_iter(self, runner: Any) -> None:
        """Update, and write a file when it is time."""
        if runner.rank != 0:
            return
        self._finish(runner, runner.iter + 1)
        if self.interval > 0 and runner.iter > 0 and runner.iter % self.interval == 0:
            self._save(runner, runner.iter)

    def after_run(self, runner: Any) -> None:
        """Write the last file."""
        if runner.rank == 0 and runner.iter >= runner.max_iters:
            self._save(runner, runner.iter)

    def training_state(self, runner: Any, finished: int) -> dict[str, Any]:
        """What a checkpoint after ``finished`` iterations holds, including the update of the last of them."""
        self._finish(runner, finished)
        return {"state_dict": to_plain(self._average), "updates": self.updates}

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _finish(self, runner: Any, finished: int) -> None:
        """The update of the current iteration, unless it is done already or there was no optimizer step."""
        if finished <= self._finished:
            return
        self._finished = finished
        if between_steps(runner) and not getattr(runner, "skip_step", False):
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        self.updates += 1
        decay = ema_decay(self.updates, self.decay)
        averages, values = self._pairs
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, values, alpha=1 - decay)

    def _load(self, saved: Mapping[str, Any], place: str) -> None:
        entries, updates = saved.get("state_dict", {}), saved.get("updates")
        shapes = [{name: tuple(value.shape) for name, value in group.items()} for group in (entries, self._average)]
        if shapes[0] != shapes[1] or not isinstance(updates, int):
            wrong = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
            raise CheckpointError(f"{place}: expected the entries of the model and the number of updates; updates is "
                                  f"{updates!r}, {len(wrong)} entries differ: {listing(wrong)}")
        for name, value in self._average.items():
            value.copy_(entries[name])
        self.updates = updates

    def _save(self, runner: Any, iteration: int) -> None:
        state = {"iter": iteration, "state_dict": to_plain(self._average), "updates": self.updates}
        save_checkpoint(state, Path(runner.work_dir) / f"iter_{iteration}_ema.pth")
