"""What mmcv 1.7.2 gets wrong on current PyTorch, machines without a GPU or long runs, mended in one place.

Other broken parts of it are not used at all: its parallel wrappers and their scattering (see
:mod:`mmdet3d.core.parallel` and :func:`mmdet3d.datasets.loader.to_device`), its reading of checkpoints, which runs
code (see :mod:`mmdet3d.utils.checkpoint`), and its start of process groups, which divides by the number of GPUs.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmcv.runner import LogBuffer
from torch import distributed as dist


class BoundedLogBuffer(LogBuffer):
    """Values to log of the latest iterations. mmcv's buffer keeps those of a whole run and grows with it.

    Args:
        keep: Values of each name that are kept at least; intervals of averaging may not be longer.
    """

    def __init__(self, keep: int = 1000) -> None:
        super().__init__()
        self.keep = keep

    def update(self, vars: Mapping[str, Any], count: int = 1) -> None:
        """Add one value of each name, which ``count`` samples have in common."""
        super().update(dict(vars), count)
        for history in (self.val_history, self.n_history):
            for name in vars:
                if len(history[name]) >= 2 * self.keep:
                    del history[name][:-self.keep]


def peak_memory_mb(device: torch.device) -> int | None:
    """Largest GPU memory that any process of this job has held so far, in MiB; None on a CPU.

    All processes call it. mmcv reduces with an operation that gloo does not have for GPU tensors, and asks the current
    GPU, not that of the model.
    """
    if device.type != "cuda":
        return None
    own = torch.cuda.max_memory_allocated(device) // 2**20
    if not (dist.is_available() and dist.is_initialized()):
        return own
    largest = torch.tensor([own], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def summary_writer(folder: str) -> Any | None:
    """A TensorBoard writer; None where the ``tensorboard`` package is missing, for which mmcv ends the run."""
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except (ImportError, AttributeError):  # the latter from releases that do not fit NumPy or setuptools
        return None
    return module.SummaryWriter(folder)


@contextlib.contextmanager
def without_init_report() -> Iterator[None]:
    """Within this context ``init_weights`` of mmcv modules does not log a paragraph for each parameter."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)
