"""Predictions on their way to files, written beside the evaluation."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torch import Tensor

from mmdet3d.utils.files import prediction_path, save_prediction


class PredictionFiles:
    """Writes ``<folder>/<scene>/<token>.npz`` in threads; a context that ends when everything is written.

    Args:
        folder: Where.
        threads: Threads that compress and write.
        waiting: Predictions that may wait; with more, :meth:`add` waits.
    """

    def __init__(self, folder: str | os.PathLike, threads: int = 2, waiting: int = 8) -> None:
        self.folder = Path(folder)
        self._waiting = waiting
        self._jobs: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predictions")

    def __enter__(self) -> PredictionFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self._wait_for(len(self._jobs))

    def add(self, scene: str, token: str, semantics: Tensor, flow: Tensor) -> None:
        """Write one prediction, ``semantics`` uint8 [X, Y, Z] and ``flow`` float16 [X, Y, Z, 2], soon.

        Raises:
            OSError: an earlier one could not be written.
            ValueError: a name cannot be used as a file name.
        """
        path = prediction_path(self.folder, scene, token)
        self._wait_for(len(self._jobs) - self._waiting)
        self._jobs.append(self._pool.submit(save_prediction, path, semantics.cpu().numpy(), flow.cpu().numpy()))

    def _wait_for(self, count: int) -> None:
        for _ in range(count):
            self._jobs.popleft().result()
