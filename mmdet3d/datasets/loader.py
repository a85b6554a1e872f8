"""Batches of a data set: which samples, in which worker process, collated how, and the way to the device."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.parallel import DataContainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mmdet3d.datasets.samplers.sequence import TrainSequenceSampler, build_batch_sampler, distributed_place
from mmdet3d.interfaces import RemembersSamples, SeededDataset, offers

ORDERS = ("exact", "published")
ON_THE_HOST = frozenset({"img_metas", "points", "gt_bboxes_3d", "gt_labels_3d"})
"""Entries of a batch that the model reads on the CPU, or not at all."""


def build_dataloader(dataset: Dataset, samples_per_gpu: int, workers_per_gpu: int, *, training: bool, seed: int = 0,
                     rank: int | None = None, world_size: int | None = None, order: str = "exact",
                     pin_memory: bool | None = None, start_method: str | None = None, opencv_threads: int | None = 0,
                     persistent_workers: bool = True) -> DataLoader:
    """Loader of one process: sequences in step with the temporal memory, endless in training.

    ``loader.sequence_sampler`` is the sampler of :mod:`mmdet3d.datasets.samplers.sequence` that chooses the samples,
    ``loader.sequence_dataset`` is ``dataset``.

    In training each sample has a generator of its own, seeded with ``seed``, the process, the batch and the place in
    it. So the augmentation is the same for any number of workers, and goes on where it was after a restored position.

    Args:
        dataset: Has ``flag``, the sequence of every sample.
        samples_per_gpu: Batch size of this process.
        workers_per_gpu: Worker processes; 0 loads in this one.
        training: Endless, in random order of sequences; otherwise for evaluation.
        seed: Of order and augmentation; the same in all processes.
        rank: This process; default: what ``torch.distributed`` says.
        world_size: Number of processes; default likewise.
        order: "exact": as described; in evaluation every frame comes once. "published": the random numbers of the
            published training, one stream per worker, and the published order of evaluation with the default seed,
            in which frames come twice or never.
        pin_memory: Copy batches to page-locked memory; default: where there is a CUDA device.
        start_method: How workers are started (``fork``, ``spawn``, ``forkserver``); default: the system's.
        opencv_threads: Threads of OpenCV in a worker, 0 for none besides the worker's own; None leaves them alone.
        persistent_workers: Keep the workers from one iteration over the loader to the next.

    Raises:
        ValueError: a number or name is out of range, or there are fewer sequences than batch slots in training.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if workers_per_gpu < 0:
        raise ValueError(f"workers_per_gpu: expected 0 or more, got {workers_per_gpu}")
    own_rank, own_world = distributed_place()
    rank = own_rank if rank is None else rank
    sampler = build_batch_sampler(
        "IterBasedRunner" if training else "IterBasedRunnerEval", dataset.flag, samples_per_gpu, rank=rank,
        world_size=own_world if world_size is None else world_size, seed=seed if training else None,
        legacy_order=order == "published")
    if offers(dataset, RemembersSamples):
        dataset.remember_samples(samples_per_gpu)
    batches, samples = sampler, dataset
    if training and order == "exact" and offers(dataset, SeededDataset):
        batches, samples = _NumberedBatches(sampler), _SeededSamples(dataset, seed, rank)
    loader = DataLoader(
        samples, batch_sampler=batches, num_workers=workers_per_gpu, collate_fn=collate,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=persistent_workers and workers_per_gpu > 0,
        multiprocessing_context=start_method if workers_per_gpu else None,
        worker_init_fn=functools.partial(_start_worker, dataset, seed, rank, workers_per_gpu, opencv_threads))
    loader.sequence_sampler, loader.sequence_dataset = sampler, dataset
    return loader


class _NumberedBatches:
    """Batches of a training sampler with each index as (number of the batch, place in the batch, index)."""

    def __init__(self, sampler: TrainSequenceSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for batch in self.sampler:
            number = self.sampler.batches_given
            yield [(number, place, index) for place, index in enumerate(batch)]


class _SeededSamples(Dataset):
    """Samples whose random draws follow from their place in the training, not from what a worker did before."""

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset, self.seed, self.rank = dataset, seed, rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        number, place, index = key
        state = np.random.SeedSequence((self.seed, self.rank, number, place)).generate_state(1)
        self.dataset.seed(int(state[0]))
        return self.dataset[index]


def _start_worker(dataset: Dataset, seed: int, rank: int, workers: int, opencv_threads: int | None,
                  worker: int) -> None:
    """Seed the generators of a worker as the published training does, and keep it from starting threads."""
    _leave_signals_to_parent()
    own = (workers * rank + worker + seed) % 2**32
    np.random.seed(own)  # noqa: NPY002 - pipelines of the mmdet family draw from the global generator
    random.seed(own)
    torch.manual_seed(own)
    if offers(dataset, SeededDataset):
        dataset.seed(own)
    if opencv_threads is not None:
        import cv2

        cv2.setNumThreads(opencv_threads)


def _leave_signals_to_parent() -> None:
    """In a worker: Ctrl-C and SIGTERM often reach all processes of a job, but the loop decides when to end.

    A worker ends with the process that it serves, or when that one tells it to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of plain tensors, lists and dicts; containers of the pipeline are opened.

    Args:
        samples: B samples of a train or test pipeline.

    Returns:
        A dict with the keys of a sample. Tensors, arrays and numbers are stacked along a new first axis; tuples and
        lists are collated entry by entry, so ``img_inputs`` is a list of six tensors; what the pipeline wrapped in a
        container that is not to be stacked becomes a list of B entries: ``img_metas`` B dicts, ``points`` B tensors.
        Of the test pipeline, whose values are lists of length 1, each value is a list of length 1.

    Raises:
        ValueError: samples differ in their keys or shapes; the message names the entry.
    """
    first = samples[0]
    if wrong := next((sample for sample in samples if sample.keys() != first.keys()), None):
        raise ValueError(f"samples of a batch differ in their keys: {sorted(first)} and {sorted(wrong)}")
    return {key: _collate_entry(key, [sample[key] for sample in samples]) for key in first}


def _collate_entry(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, DataContainer):
        opened = [value.data for value in values]
        return _collate_entry(name, opened) if first.stack else opened
    if isinstance(first, list | tuple):
        if len({len(value) for value in values}) != 1:
            raise ValueError(f"{name}: cannot collate lists of lengths {[len(value) for value in values]}")
        return [_collate_entry(name, list(entries)) for entries in zip(*values, strict=True)]
    if isinstance(first, Tensor | np.ndarray) and len({tuple(value.shape) for value in values}) != 1:
        raise ValueError(f"{name}: cannot stack shapes {[tuple(value.shape) for value in values]}")
    return default_collate(values)


def to_device(batch: MutableMapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch of :func:`collate` where training takes it; ``batch`` stays as it is.

    Images and targets go to ``device`` without waiting for the copy. The small matrices of ``img_inputs`` and
    :data:`ON_THE_HOST` stay on the CPU: the model multiplies matrices there and uploads the products.
    """
    images, *matrices = batch["img_inputs"]
    moved = {key: value if key in ON_THE_HOST else _move(value, device) for key, value in batch.items()
             if key != "img_inputs"}
    return {**moved, "img_inputs": [images.to(device, non_blocking=True), *matrices]}


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_move(entry, device) for entry in value]
    return value
