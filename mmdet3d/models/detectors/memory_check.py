"""Whether a memory fits the model and the batch that it is given to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmdet3d.structures import FrameMeta, TemporalMemory


@dataclass(frozen=True)
class MemoryLayout:
    """What a model needs its memory to look like.

    Attributes:
        sizes: (Z, Y, X) of each stage, finest first; none for a model without memory.
        slots: History slots T of each stage.
        channels: Channels C of a slot.
    """

    sizes: tuple[tuple[int, int, int], ...]
    slots: tuple[int, ...]
    channels: int

    def history_shapes(self, batch: int) -> list[tuple[int, int, int]]:
        """Shapes [B, V, T * C] of the histories."""
        return [(batch, z * y * x, slots * self.channels)
                for (z, y, x), slots in zip(self.sizes, self.slots, strict=True)]


def check_memory(memory: TemporalMemory | None, meta: FrameMeta, layout: MemoryLayout, device: torch.device) -> None:
    """Refuse a memory that does not fit.

    Args:
        memory: The memory; None always fits.
        meta: Meta data of the batch.
        layout: What the model needs.
        device: Where the batch is.

    Raises:
        ValueError: the memory has another batch size, number of stages, grid size, number of channels or slots, or
            lies on another device, or a sequence goes on that it does not follow.
    """
    if memory is None:
        return
    batch = len(meta.starts)
    if memory.batch_size != batch:
        raise ValueError(f"the memory holds {memory.batch_size} batch slots, but the batch has {batch} "
                         "samples; call reset_memory() before changing the batch size")
    sizes = tuple(tuple(size) for size in memory.sizes)
    for what, held, needed in (
            ("stages", len(memory.histories), len(layout.sizes)),
            ("grid sizes (Z, Y, X)", list(sizes), list(layout.sizes)),
            ("channels", memory.channels, layout.channels),
            ("histories [B, V, T * C]", [tuple(h.shape) for h in memory.histories], layout.history_shapes(batch)),
            ("augmentations", tuple(memory.bda.shape), (batch, 4, 4)),
            ("tensors on device", sorted({str(history.device) for history in memory.histories}), [str(device)])):
        if held != needed:
            raise ValueError(f"the memory holds {what} {held}, this model needs {needed}")
    for slot, (start, known, new) in enumerate(
            zip(meta.starts, memory.sequence_ids.tolist(), meta.sequence_ids, strict=True)):
        if not start and known != new:
            raise ValueError(f"batch slot {slot} continues sequence {new} (start_of_sequence is False), but the memory "
                             f"follows sequence {known}; give a sequence's frames in order, or call reset_memory()")
