"""One function over many items in several processes, results as they come."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_unordered(function: Callable[[Item], Result], items: Sequence[Item], workers: int, chunk: int = 16
                  ) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in the order in which they are done.

    Args:
        function: A function that a worker process can import; a ``functools.partial`` of one too.
        items: The items; only a few chunks at a time are on their way to the workers.
        workers: Number of processes. With 0 or 1 the work is done in this process.
        chunk: Items handed over at once.

    Raises:
        ValueError: ``workers`` or ``chunk`` is out of range. BrokenProcessPool: a worker process died. What
            ``function`` raises ends the iteration.
    """
    if workers < 0 or chunk < 1:
        raise ValueError(f"workers must not be negative and chunk at least 1, got {workers} and {chunk}")
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    starts = iter(range(0, len(items), chunk))
    # A fresh interpreter for each worker: forking a process that has threads can leave locks taken for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        pending = {pool.submit(_run_chunk, function, items[start:start + chunk])
                   for start in islice(starts, 2 * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(_run_chunk, function, items[start:start + chunk])
                        for start in islice(starts, len(done))}
            for future in done:
                yield from future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches all processes of a terminal; the parent alone decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_chunk(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]
