"""Ctrl-C and SIGTERM: the current iteration is finished, the state is saved, then training ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(Exception):
    """Training ended because it was asked to; its state is saved.

    Args:
        number: The signal.

    Attributes:
        exit_status: 128 + number of the signal: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class StopRequest:
    """Whether a signal asked any process of the job to stop. All processes hear of it in the same iteration."""

    def __init__(self) -> None:
        self._received = 0
        self._group: Any = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Within this context signals are noted instead of ending the process; a second one ends it at once.

        Does nothing outside the main thread, where Python allows no handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._received = 0
        self._group = _host_group()
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._received:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self._received = number
        logger.warning("%s: finishing this iteration and saving; once more ends at once", signal.Signals(number).name)

    def agreed(self) -> int:
        """The signal that any process received, 0 for none; to be called by all processes."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self._received
        flag = torch.tensor([self._received])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return int(flag)


def _host_group() -> Any:
    """A group of all processes that exchanges numbers without the GPU, which would have to wait for its work."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")
