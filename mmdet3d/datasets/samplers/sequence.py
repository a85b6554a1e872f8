"""Batch samplers over sequences of frames.

The temporal memory of the model is kept per batch slot, so a slot has to see the frames of a sequence in order, from
its first frame on, and all of them before those of another one. Every sampler here yields the indices of one batch of
one rank; position b of all batches of a rank is one slot.

* :class:`TrainSequenceSampler`: endless, sequences in random order, position can be saved.
* :class:`EvalSequenceSampler`: every frame exactly once, whatever the number of ranks and the batch size.
* :class:`LegacyEvalSequenceSampler`: the order of published results, in which some frames come twice and, with some
  numbers of ranks, some never.

Nothing here communicates: rank and world size are arguments, :func:`distributed_place` finds them out.
"""

import hashlib
import heapq
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)


def distributed_place() -> tuple[int, int]:
    """(rank, world size) of this process as ``torch.distributed`` says; (0, 1) where it is not set up."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def sequence_groups(flags: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Frames of each sequence.

    Args:
        flags: (N,) sequence id of every frame, see :func:`mmdet3d.datasets.infos.sequence_flags`.

    Returns:
        One int64 array of ascending frame indices per sequence, by ascending id.

    Raises:
        ValueError: there are no frames, or ``flags`` is not one-dimensional.
    """
    flags = np.asarray(flags)
    if flags.ndim != 1 or flags.size == 0:
        raise ValueError(f"flags: expected one sequence id per frame, got shape {flags.shape}")
    order = np.argsort(flags, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(flags[order])) + 1)


def slot_groups(num_groups: int, seed: int, slots: int, slot: int) -> Iterator[int]:
    """Sequences that a slot walks through, without end.

    Of the concatenation of random permutations of all sequences, drawn one after the other from a generator seeded
    with ``seed``, the slot takes the entries ``slot``, ``slot + slots``, ``slot + 2 * slots`` ...
    """
    generator = torch.Generator().manual_seed(seed)
    position = slot
    while True:
        permutation = torch.randperm(num_groups, generator=generator).tolist()
        while position < num_groups:
            yield permutation[position]
            position += slots
        position -= num_groups


class _SlottedSampler(Sampler):
    """What the samplers have in common: the frames of each sequence and the slots of this rank."""

    def __init__(self, flags: Sequence[int] | np.ndarray, samples_per_gpu: int, world_size: int, rank: int) -> None:
        if samples_per_gpu < 1 or world_size < 1:
            raise ValueError(f"samples_per_gpu and world_size must be at least 1, got {samples_per_gpu} and "
                             f"{world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0..{world_size - 1}, got {rank}")
        self.groups = sequence_groups(flags)
        self.num_frames = sum(map(len, self.groups))
        self.samples_per_gpu, self.world_size, self.rank = samples_per_gpu, world_size, rank

    @property
    def slots(self) -> int:
        """Number of slots of all ranks together."""
        return self.world_size * self.samples_per_gpu

    @property
    def own_slots(self) -> range:
        """The slots of this rank: ``rank * samples_per_gpu`` and the following."""
        return range(self.rank * self.samples_per_gpu, (self.rank + 1) * self.samples_per_gpu)

    def _need_a_group_per_slot(self) -> None:
        if len(self.groups) < self.slots:
            raise ValueError(
                f"{len(self.groups)} sequences cannot fill {self.slots} batch slots ({self.world_size} processes x "
                f"batch {self.samples_per_gpu}); use fewer slots, or cut the sequences (sequences_split_num)")


class TrainSequenceSampler(_SlottedSampler):
    """Endless batches; each slot walks through sequences in random order, frames in order.

    The order is that of the reference implementation for the same seed, batch size and number of processes.

    Args:
        flags: (N,) sequence id of every frame.
        samples_per_gpu: Batch size B of one process.
        world_size: Number of processes.
        rank: This process.
        seed: Seed of the order of sequences; the same in all processes.

    Raises:
        ValueError: there are fewer sequences than slots, or a number is out of range.
    """

    def __init__(self, flags: Sequence[int] | np.ndarray, samples_per_gpu: int, world_size: int = 1, rank: int = 0,
                 seed: int = 0) -> None:
        super().__init__(flags, samples_per_gpu, world_size, rank)
        self._need_a_group_per_slot()
        self.seed = seed
        self._start = 0
        self._given = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from the restored position on (from the beginning without one), each a list of B indices."""
        self._given = self._start
        streams = [self._frames(slot, self._start) for slot in self.own_slots]
        while True:
            batch = [next(stream) for stream in streams]
            self._given += 1
            yield batch

    def _frames(self, slot: int, skip: int) -> Iterator[int]:
        for group in slot_groups(len(self.groups), self.seed, self.slots, slot):
            frames = self.groups[group]
            if skip < len(frames):
                yield from frames[skip:].tolist()
            skip = max(skip - len(frames), 0)

    def __len__(self) -> int:
        """Batches of one process that hold about as many frames as the data set; iteration does not end there."""
        return max(self.num_frames // self.slots, 1)

    @property
    def batches_given(self) -> int:
        """Batches handed out so far, those before a restored position included."""
        return self._given

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: there are no epochs. Runners call it."""

    def state_dict(self, batches: int | None = None) -> dict:
        """Position to continue from.

        Args:
            batches: Batches that training has finished. The default is those handed out, which with worker
                processes is more than those trained on: they fetch ahead. Training loops pass their iteration number.

        Returns:
            Plain numbers and strings, the same for all ranks.
        """
        return {"batches": self._given if batches is None else int(batches), **self._identity()}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue at a saved position with the next ``iter()``.

        Raises:
            ValueError: the position belongs to another data set, seed, batch size or number of processes, for which
                it has no meaning; the message says which.
        """
        own = self._identity()
        if missing := {"batches", *own} - set(state):
            raise ValueError(f"sampler position: {sorted(missing)} are missing; found {sorted(state)}")
        if wrong := [f"{key} {state[key]} (now {own[key]})" for key in own if state[key] != own[key]]:
            raise ValueError(f"the saved sampler position belongs to {', '.join(wrong)}; start without it, or continue "
                             "with what it was saved with")
        if state["batches"] < 0:
            raise ValueError(f"sampler position: batches must not be negative, got {state['batches']}")
        self._start = self._given = int(state["batches"])

    def _identity(self) -> dict:
        digest = hashlib.sha256(b"".join(group.astype("<i8").tobytes() + b"|" for group in self.groups))
        return {"seed": self.seed, "samples_per_gpu": self.samples_per_gpu, "world_size": self.world_size,
                "sequences": digest.hexdigest()[:16]}


class LegacyEvalSequenceSampler(_SlottedSampler):
    """Evaluation order of the reference implementation, for comparison with its logs.

    The order of training, cut after ``(N + 16 * world_size + 1) // world_size // samples_per_gpu`` batches. Some
    frames come twice. With most numbers of slots that do not divide the number of sequences, some never come: then a
    warning says how many. Iterating again goes on with the sequences after those begun, in another order.

    Args:
        flags: (N,) sequence id of every frame.
        samples_per_gpu: Batch size of one process.
        world_size: Number of processes.
        rank: This process.
        seed: Seed of the order; 209652396 is what the reference draws in a test run with its default ``--seed 0``.

    Raises:
        ValueError: there are fewer sequences than slots, or a number is out of range.
    """

    def __init__(self, flags: Sequence[int] | np.ndarray, samples_per_gpu: int, world_size: int = 1, rank: int = 0,
                 seed: int = 209652396) -> None:
        super().__init__(flags, samples_per_gpu, world_size, rank)
        self._need_a_group_per_slot()
        self.seed = seed
        self._sequences = [slot_groups(len(self.groups), seed, self.slots, slot) for slot in self.own_slots]
        if rank == 0 and (missing := self.num_frames - len(self.covered())):
            logger.warning("evaluation in the published order skips %d of %d frames with %d processes x batch %d",
                           missing, self.num_frames, world_size, samples_per_gpu)

    def __len__(self) -> int:
        """Batches per process."""
        return (self.num_frames + 16 * self.world_size + 1) // self.world_size // self.samples_per_gpu

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of ``samples_per_gpu`` indices."""
        streams = [self._frames(sequences) for sequences in self._sequences]
        for _ in range(len(self)):
            yield [next(stream) for stream in streams]

    def _frames(self, sequences: Iterator[int]) -> Iterator[int]:
        for group in sequences:
            yield from self.groups[group].tolist()

    def covered(self) -> set[int]:
        """Frames that the first pass of all processes together visits."""
        seen: set[int] = set()
        for slot in range(self.slots):
            left = len(self)
            for group in slot_groups(len(self.groups), self.seed, self.slots, slot):
                seen.update(self.groups[group][:left].tolist())
                left -= len(self.groups[group])
                if left <= 0:
                    break
        return seen


def balanced_slots(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Hand whole sequences to slots so that the slots get about equally many frames.

    Longest sequence first, each to the slot with the fewest frames so far (Graham, 1969: at most 4/3 of the best
    possible longest slot).

    Args:
        lengths: Frames of each sequence.
        slots: Number of slots.

    Returns:
        Sequences of each slot, ascending; slots by descending number of frames. Empty where there are fewer
        sequences than slots.
    """
    heap = [(0, slot) for slot in range(slots)]
    members: list[list[int]] = [[] for _ in range(slots)]
    for group in sorted(range(len(lengths)), key=lambda group: (-lengths[group], group)):
        frames, slot = heapq.heappop(heap)
        members[slot].append(group)
        heapq.heappush(heap, (frames + lengths[group], slot))
    totals = [sum(lengths[group] for group in groups) for groups in members]
    return [sorted(members[slot]) for slot in sorted(range(slots), key=lambda slot: (-totals[slot], slot))]


class EvalSequenceSampler(_SlottedSampler):
    """Every frame exactly once, sequence by sequence, for any number of processes and any batch size.

    Whole sequences are handed to slots by :func:`balanced_slots`, and slots to processes so that these get about
    equally many frames. Nothing is random: one process with batch 1 reads the data set from front to back.

    Where a slot has no sequence left, its process goes on with smaller batches. The slots of a process are in
    descending number of frames, so it is always the **last** position of the batch that disappears, at the end of a
    sequence, and the positions before it follow their sequences undisturbed; a memory of B slots is narrowed to its
    first slots. A process without any sequence yields nothing. Processes can differ in the number of batches: gather
    results after the loop, not in it.

    Args:
        flags: (N,) sequence id of every frame.
        samples_per_gpu: Largest batch size of one process.
        world_size: Number of processes.
        rank: This process.

    A warning tells if slots stay empty, or if the longest slot is more than a tenth longer than the mean: sequences
    are not cut, so no order can do much better, and fewer slots would be as fast.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, flags: Sequence[int] | np.ndarray, samples_per_gpu: int, world_size: int = 1,
                 rank: int = 0) -> None:
        super().__init__(flags, samples_per_gpu, world_size, rank)
        schedule = balanced_slots([len(group) for group in self.groups], self.slots)
        self._report(schedule)
        self._slots = [np.concatenate([self.groups[group] for group in schedule[slot]])
                       for slot in self._snake(rank) if schedule[slot]]

    def _snake(self, rank: int) -> list[int]:
        """Slots of a process: to and fro over the processes, from the longest slot to the shortest."""
        return [row * self.world_size + (rank if row % 2 == 0 else self.world_size - 1 - rank)
                for row in range(self.samples_per_gpu)]

    def _report(self, schedule: list[list[int]]) -> None:
        if self.rank != 0:
            return
        empty = sum(not groups for groups in schedule)
        longest = sum(len(self.groups[group]) for group in schedule[0])
        mean = self.num_frames / self.slots
        place = f"{self.world_size} processes x batch {self.samples_per_gpu}"
        if empty:
            logger.warning("%d sequences leave %d of %d batch slots (%s) without work", len(self.groups), empty,
                           self.slots, place)
        elif longest > 1.1 * mean:
            logger.warning("%s: the longest batch slot has %d frames, the mean is %.1f; whole sequences cannot be "
                           "shared out more evenly over %d slots", place, longest, mean, self.slots)
        else:
            logger.info("%s: every frame once, %d to %.1f frames a batch slot", place, longest, mean)

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._slots[0]) if self._slots else 0

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of at most ``samples_per_gpu`` indices, never empty."""
        for step in range(len(self)):
            yield [int(frames[step]) for frames in self._slots if step < len(frames)]


def build_batch_sampler(loader_type: str, flags: Sequence[int] | np.ndarray, samples_per_gpu: int, *,
                        world_size: int = 1, rank: int = 0, seed: int | None = None, legacy_order: bool = False
                        ) -> TrainSequenceSampler | EvalSequenceSampler | LegacyEvalSequenceSampler:
    """The sampler that a config names.

    Args:
        loader_type: ``IterBasedRunner`` (a config's ``runner.type``) for training or ``IterBasedRunnerEval`` (its
            ``data.test_dataloader.runner_type``) for evaluation.
        flags: (N,) sequence id of every frame.
        samples_per_gpu: Batch size of one process.
        world_size: Number of processes.
        rank: This process.
        seed: Seed of the samplers that draw an order; None for their default.
        legacy_order: Evaluate in the order of published results, see :class:`LegacyEvalSequenceSampler`.

    Raises:
        ValueError: ``loader_type`` is another name, or the sampler refuses its arguments.
    """
    kinds = {"IterBasedRunner": TrainSequenceSampler,
             "IterBasedRunnerEval": LegacyEvalSequenceSampler if legacy_order else EvalSequenceSampler}
    if loader_type not in kinds:
        raise ValueError(f"loader type: expected one of {sorted(kinds)}, got {loader_type!r}")
    kind = kinds[loader_type]
    options = {} if seed is None or kind is EvalSequenceSampler else {"seed": seed}
    return kind(flags, samples_per_gpu, world_size, rank, **options)
