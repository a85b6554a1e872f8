"""Progress in text, in JSON lines and in TensorBoard."""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from mmcv.runner import LoggerHook

from mmdet3d.core.hooks.builder import HOOKS
from mmdet3d.utils.compat import peak_memory_mb, summary_writer

_IN_FRONT = ("mode", "epoch", "iter", "lr", "eta", "time", "data_time", "memory")


class _IntervalLogger(LoggerHook):
    """Logs after every ``interval`` iterations; there are no epochs whose end mmcv's hooks would look for."""

    def after_train_iter(self, runner: Any) -> None:
        """Average and log when it is time."""
        if self.every_n_iters(runner, self.interval):
            runner.log_buffer.average(self.interval)
        elif runner.iter + 1 == runner.max_iters and not self.ignore_last:
            runner.log_buffer.average(runner.max_iters % self.interval)
        if runner.log_buffer.ready:
            self.log(runner)
            if self.reset_flag:
                runner.log_buffer.clear_output()


@HOOKS.register_module()
class TextLoggerHook(_IntervalLogger):
    """A line in the log and one in ``<work_dir>/<timestamp>.log.json`` every ``interval`` iterations.

    ``time`` is the mean of an iteration, ``data_time`` the part of it spent waiting for the loader, both in seconds;
    ``memory`` is the peak of GPU memory over all processes in MiB; ``eta`` follows from the time since the start.

    Args:
        interval: Iterations from one line to the next; values are means over them.
        by_epoch: False; accepted as published configs have it.
        ignore_last: Leave out the iterations after the last full interval.
        reset_flag: Forget the values after logging; the last hook of the list always does.
    """

    def __init__(self, interval: int = 10, by_epoch: bool = False, ignore_last: bool = True,
                 reset_flag: bool = False) -> None:
        super().__init__(interval, ignore_last, reset_flag, by_epoch=False)

    def before_run(self, runner: Any) -> None:
        """Begin the JSON file with what is known about the run."""
        super().before_run(runner)
        self._start = (runner.iter, time.monotonic())
        self.json_path = os.path.join(runner.work_dir, f"{runner.timestamp}.log.json")
        self._append(runner, runner.meta or {})

    def log(self, runner: Any) -> None:
        """Write the averaged values of the log buffer."""
        values = dict(runner.log_buffer.output)
        line: dict[str, Any] = {"mode": self.get_mode(runner), "epoch": self.get_epoch(runner),
                                "iter": values.pop("eval_iter_num", self.get_iter(runner)),
                                "lr": runner.current_lr()[0]}
        if "time" in values:
            line["eta"] = self._seconds_left(runner)
            memory = peak_memory_mb(runner.device)
            if memory is not None:
                line["memory"] = runner.log_buffer.output["memory"] = memory  # for the hooks after this one
        line.update(values)
        self._append(runner, line)
        runner.logger.info(self._text(runner, line))

    def _seconds_left(self, runner: Any) -> int:
        first, start = self._start
        mean = (time.monotonic() - start) / (runner.iter + 1 - first)
        return round(mean * (runner.max_iters - runner.iter - 1))

    @staticmethod
    def _text(runner: Any, line: Mapping[str, Any]) -> str:
        parts = [f"lr: {line['lr']:.3e}"]
        if "time" in line:
            parts += [f"eta: {datetime.timedelta(seconds=line['eta'])}", f"time: {line['time']:.3f}",
                      f"data_time: {line['data_time']:.3f}"]
            parts += [f"memory: {line['memory']}"] if "memory" in line else []
        parts += [f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
                  for name, value in line.items() if name not in _IN_FRONT]
        place = f"[{line['iter']}/{runner.max_iters}]"
        if line["mode"] != "train":
            place = f"({line['mode']}) [{line['iter']}]"
        return f"Iter {place}\t" + ", ".join(parts)

    def _append(self, runner: Any, line: Mapping[str, Any]) -> None:
        if runner.rank == 0:
            with open(self.json_path, "a", encoding="utf-8") as file:
                finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                          for name, value in line.items()}  # JSON has neither NaN nor infinity
                file.write(json.dumps(finite, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """Numbers of NumPy and tensors as numbers, anything else as text."""
    return value.item() if getattr(value, "ndim", 1) == 0 else str(value)


@HOOKS.register_module()
class TensorboardLoggerHook(_IntervalLogger):
    """Scalars for TensorBoard in ``<work_dir>/tf_logs``, by rank 0; a warning where the package is missing.

    Args:
        log_dir: Another folder.
        interval: Iterations from one point to the next; values are means over them.
        by_epoch: False; accepted as published configs have it.
        ignore_last: Leave out the iterations after the last full interval.
        reset_flag: Forget the values after logging; the last hook of the list always does.
    """

    def __init__(self, log_dir: str | None = None, interval: int = 10, by_epoch: bool = False,
                 ignore_last: bool = True, reset_flag: bool = False) -> None:
        super().__init__(interval, ignore_last, reset_flag, by_epoch=False)
        self.log_dir = log_dir
        self.writer = None

    def before_run(self, runner: Any) -> None:
        """Open the folder."""
        super().before_run(runner)
        if runner.rank != 0:
            return
        self.writer = summary_writer(self.log_dir or os.path.join(runner.work_dir, "tf_logs"))
        if self.writer is None:
            runner.logger.warning("no TensorBoard logs, because the package tensorboard is not installed "
                                  "(pip install tensorboard)")

    def log(self, runner: Any) -> None:
        """Write the averaged values of the log buffer."""
        if self.writer is None:
            return
        step = self.get_iter(runner)
        for name, value in self.get_loggable_tags(runner, allow_text=True, tags_to_skip=()).items():
            (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value, step)

    def after_run(self, runner: Any) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()
