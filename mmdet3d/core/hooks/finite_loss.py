"""What happens when a loss is NaN or infinite: a report, and then stop or go on without that batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import Hook
from torch import Tensor

from mmdet3d.core.checkpointing import to_plain
from mmdet3d.core.hooks.builder import HOOKS
from mmdet3d.core.parallel import unwrap
from mmdet3d.interfaces import KeepsMemory, offers
from mmdet3d.registry import ConfigError
from mmdet3d.utils.checkpoint import CheckpointError, save_checkpoint
from mmdet3d.utils.files import write_json

MODES = ("stop", "skip")
_LISTED = 20


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the message names the losses and the reports."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Looks at the logged losses after each forward pass, before the optimizer.

    They are averages over all processes, so a number that is not finite in one process is seen by all, which then do
    the same without asking each other. No transfer from the device is needed beyond that of the logged values.

    Every process writes ``<work_dir>/nonfinite/iter_<n>_rank_<k>.json`` (losses, samples, which inputs, weights and
    statistics are not finite); those whose own loss is not finite write the batch beside it as ``.pth``.

    An iteration that is skipped makes no optimizer step and no update of averaged weights, drops gradients accumulated
    for that step, restores the running statistics and empties the temporal memory. It counts as an iteration.

    Args:
        on_nonfinite: "stop" or "skip".
        max_skips: Skipped iterations of a whole training after which it stops.
        max_reports: Skipped iterations for which reports are written.
        max_batch_mb: Largest total size of the batch in a report; the largest entries beyond it are left out.

    Raises:
        ConfigError: an argument is out of range.
    """

    state_key = "finite_loss"

    def __init__(self, on_nonfinite: str = "stop", max_skips: int = 10, max_reports: int = 3,
                 max_batch_mb: float = 256.0) -> None:
        if on_nonfinite not in MODES:
            raise ConfigError(f"on_nonfinite: expected one of {MODES}, got {on_nonfinite!r}")
        if max_skips < 0 or max_reports < 0 or max_batch_mb < 0:
            raise ConfigError("max_skips, max_reports and max_batch_mb must not be negative, got "
                              f"{max_skips}, {max_reports} and {max_batch_mb}")
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.max_reports, self.max_batch_mb = max_reports, max_batch_mb
        self.skipped = 0
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []

    def before_run(self, runner: Any) -> None:
        """Go on counting where a checkpoint left off."""
        saved = runner.resumed and runner.resumed.hook_states.get(self.state_key)
        self.skipped = saved["skipped"] if saved else 0
        if self.on_nonfinite == "skip":
            statistics = unwrap(runner.model).state_dict(keep_vars=True).values()
            self._buffers = [value for value in statistics if not isinstance(value, torch.nn.Parameter)]
            self._before = [value.clone() for value in self._buffers]

    def training_state(self, runner: Any, finished: int) -> dict[str, int]:
        """What a checkpoint holds."""
        return {"skipped": self.skipped}

    @torch.no_grad()
    def before_train_iter(self, runner: Any) -> None:
        """Keep the running statistics, which a forward pass changes."""
        runner.skip_step = False
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def after_train_iter(self, runner: Any) -> None:
        """Stop or skip if a loss is not finite.

        Raises:
            NonFiniteLossError: a loss is not finite, and the training is to stop or has skipped often enough.
        """
        wrong = [name for name, value in runner.outputs["log_vars"].items() if not math.isfinite(value)]
        if not wrong:
            return
        stops = self.on_nonfinite == "stop" or self.skipped >= self.max_skips
        report = None
        if stops or self.skipped < self.max_reports:
            report = self._write_report(runner, wrong)
        message = f"iteration {runner.iter}: not finite: {', '.join(wrong)}" + (f"; see {report}" if report else "")
        if stops:
            raise NonFiniteLossError(message + (f" (after {self.skipped} skipped iterations, max_skips="
                                                f"{self.max_skips})" if self.on_nonfinite == "skip" else ""))
        self._skip(runner)
        runner.logger.warning("%s; skipped (%d of at most %d)", message, self.skipped, self.max_skips)

    @torch.no_grad()
    def _skip(self, runner: Any) -> None:
        self.skipped += 1
        runner.skip_step = True
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        model = unwrap(runner.model)
        if offers(model, KeepsMemory):
            model.reset_memory()

    # ---- report -----------------------------------------------------------------------------------------------------

    def _write_report(self, runner: Any, wrong: list[str]) -> Path | None:
        """Write what explains the loss; a report that cannot be written must not hide the reason for it."""
        folder = Path(runner.work_dir) / "nonfinite"
        name = f"iter_{runner.iter}_rank_{runner.rank}"
        own_loss = float(runner.outputs["loss"].detach())
        metas = runner.data_batch.get("img_metas", [])
        content = {
            "iteration": runner.iter, "rank": runner.rank, "nonfinite_losses": wrong,
            "losses": {key: repr(value) for key, value in runner.outputs["log_vars"].items()},
            "own_loss": repr(own_loss),
            "samples": [{key: str(meta[key]) for key in ("sample_idx", "scene_name", "index") if key in meta}
                        for meta in metas],
            "nonfinite_inputs": _nonfinite(_tensors("", runner.data_batch)),
            "nonfinite_weights": _nonfinite(unwrap(runner.model).state_dict().items()),
        }
        try:
            write_json(folder / f"{name}.json", content)
            if not math.isfinite(own_loss):
                batch, left_out = _limited(to_plain(runner.data_batch, unknown=repr), self.max_batch_mb * 2**20)
                save_checkpoint({**content, "batch": batch, "left_out": left_out}, folder / f"{name}.pth")
        except (OSError, CheckpointError) as error:
            runner.logger.error("no report of the loss: %s", error)
            return None
        return folder / f"{name}.json"


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers with their place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _tensors(f"{name}[{index}]", entry)


def _nonfinite(entries: Any) -> list[str]:
    """Names of the first tensors that hold NaN or infinity."""
    found = [name for name, value in entries
             if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())]
    return found[:_LISTED] + ([f"and {len(found) - _LISTED} more"] if len(found) > _LISTED else [])


def _limited(batch: Any, limit: float) -> tuple[Any, list[str]]:
    """The batch without its largest tensors, so that the rest is at most ``limit`` bytes; and what was left out."""
    sizes = sorted(((value.numel() * value.element_size(), name) for name, value in _tensors("", batch)), reverse=True)
    left_out, total = [], sum(size for size, _ in sizes)
    for size, name in sizes:
        if total <= limit:
            break
        left_out.append(name)
        total -= size
    return _without("", batch, set(left_out)), left_out


def _without(name: str, value: Any, left_out: set[str]) -> Any:
    if isinstance(value, Tensor):
        return f"left out: {tuple(value.shape)} {value.dtype}" if name in left_out else value
    if isinstance(value, Mapping):
        return {key: _without(f"{name}.{key}" if name else str(key), entry, left_out) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without(f"{name}[{index}]", entry, left_out) for index, entry in enumerate(value)]
    return value
