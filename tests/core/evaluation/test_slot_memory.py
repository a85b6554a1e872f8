"""What a batch slot remembers at the start of a sequence."""

import pytest
import torch

from mmdet3d.core.evaluation.slot_memory import SlotMemory, forget_slots
from mmdet3d.structures import TemporalMemory

SIZES = ((2, 3, 4), (1, 2, 2))


def memory_of(batch):
    generator = torch.Generator().manual_seed(0)
    return TemporalMemory(
        histories=tuple(torch.randn(batch, z * y * x, 6, generator=generator) for z, y, x in SIZES), sizes=SIZES,
        channels=3, bda=torch.eye(4).repeat(batch, 1, 1), sequence_ids=torch.arange(batch),
        ego_translation=torch.ones(batch, 3, dtype=torch.float64))


def metas(*starts):
    return [{"start_of_sequence": start} for start in starts]


def test_a_sequence_goes_on_with_its_memory():
    slots, memory = SlotMemory(), memory_of(2)
    assert slots.before(metas(True, True)) is None
    slots.after(memory)
    kept = slots.before(metas(False, False))
    assert all(torch.equal(a, b) for a, b in zip(kept.histories, memory.histories, strict=True))


def test_where_all_slots_start_there_is_no_memory():
    slots = SlotMemory()
    slots.after(memory_of(2))
    assert slots.before(metas(True, True)) is None


def test_a_slot_that_starts_alone_has_zeros():
    slots, memory = SlotMemory(), memory_of(3)
    slots.after(memory)
    given = slots.before(metas(False, True, False))
    for new, old in zip(given.histories, memory.histories, strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]]) and not new[1].any() and old[1].any()
    assert torch.equal(forget_slots(memory, [True] * 3).histories[0], torch.zeros_like(memory.histories[0]))


def test_carried_over_it_stays():
    slots, memory = SlotMemory(carry_over=True), memory_of(2)
    slots.after(memory)
    given = slots.before(metas(True, True))
    assert all(torch.equal(a, b) for a, b in zip(given.histories, memory.histories, strict=True))


def test_slots_disappear_from_the_end():
    slots, memory = SlotMemory(), memory_of(3)
    slots.after(memory)
    given = slots.before(metas(False, False))
    assert given.batch_size == 2 and torch.equal(given.histories[0], memory.histories[0][:2])
    with pytest.raises(ValueError, match="a batch of 4 samples follows one of 3; slots may only disappear"):
        slots.before(metas(*[False] * 4))


def test_a_model_without_memory():
    slots = SlotMemory()
    slots.after(None)
    assert slots.before(metas(False)) is None
