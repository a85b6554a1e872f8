"""The temporal memory of a batch whose slots follow one sequence after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mmdet3d.structures import TemporalMemory


def forget_slots(memory: TemporalMemory, starts: Sequence[bool]) -> TemporalMemory:
    """A memory without what the slots that start a sequence remember: their histories are zero.

    Args:
        memory: Of B slots; stays as it is.
        starts: B times whether the slot starts a sequence.
    """
    kept = torch.tensor([not start for start in starts])
    histories = tuple(torch.where(kept.to(history.device)[:, None, None], history, 0) for history in memory.histories)
    return replace(memory, histories=histories)


class SlotMemory:
    """Hands every batch the memory that its slots should have.

    By default a sequence knows nothing of the one before it in its slot, so that its result does not depend on how
    sequences are shared out: where all slots of a batch start (always so with batch size 1), the model gets no memory,
    and where some do, theirs is zero. The published evaluation carries the memory over: the model then sees, at the
    first frame of a sequence, the last bird's-eye view of the sequence before, one that has nothing to do with it.

    Slots that have disappeared from the end of the batch are dropped.

    Args:
        carry_over: Do as the published evaluation does.
    """

    def __init__(self, carry_over: bool = False) -> None:
        self.carry_over = carry_over
        self._memory: TemporalMemory | None = None

    def before(self, img_metas: Sequence[Mapping]) -> TemporalMemory | None:
        """Memory for a batch with these meta data.

        Raises:
            ValueError: the batch is larger than the one before.
        """
        memory = self._memory
        if memory is None:
            return None
        if len(img_metas) > memory.batch_size:
            raise ValueError(f"a batch of {len(img_metas)} samples follows one of {memory.batch_size}; slots may only "
                             "disappear")
        memory = memory.narrow(len(img_metas))
        starts = [bool(meta["start_of_sequence"]) for meta in img_metas]
        if self.carry_over or not any(starts):
            return memory
        return None if all(starts) else forget_slots(memory, starts)

    def after(self, memory: TemporalMemory | None) -> None:
        """Keep what the model gave for the next frame."""
        self._memory = memory
