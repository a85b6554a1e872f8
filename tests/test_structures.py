"""The voxel grid and the temporal memory."""

import dataclasses

import pytest
import torch

from mmdet3d.structures import TemporalMemory, VoxelGrid

CONFIG = {"x": [-8, 4, 2.0], "y": [-6.0, 6.0, 1.5], "z": [-1, 5.4, 1.6], "depth": [1.0, 45.0, 0.5]}
SIZES = ((4, 2, 3), (2, 1, 5))  # (Z, Y, X) of two stages
SLOTS, CHANNELS, BATCH = (3, 2), 4, 2


def test_grid_sizes_and_bounds():
    grid = VoxelGrid.from_config(CONFIG)
    assert (grid.low, grid.high, grid.cell) == ((-8, -6, -1), (4, 6, 5.4), (2, 1.5, 1.6))
    assert grid.size_xyz == (6, 8, 4)
    assert grid.size_zyx == (4, 8, 6)
    assert grid.num_voxels == 192


def test_published_grid():
    grid = VoxelGrid.from_config({"x": [-40, 40, 0.8], "y": [-40, 40, 0.8], "z": [-1, 5.4, 0.8]})
    assert [grid.coarsen(f).size_zyx for f in (1, 2, 4)] == [(8, 100, 100), (4, 50, 50), (2, 25, 25)]


def test_coarsening_keeps_the_bounds_and_the_original():
    grid = VoxelGrid.from_config(CONFIG)
    coarse = grid.coarsen(2)
    assert coarse == VoxelGrid((-8, -6, -1), (4, 6, 5.4), (4, 3, 3.2))
    assert coarse.size_xyz == (3, 4, 2) and grid.size_xyz == (6, 8, 4)
    with pytest.raises(ValueError, match=r"cannot coarsen \(3, 4, 2\) \(X, Y, Z\) voxels by 2"):
        coarse.coarsen(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.cell = (1, 1, 1)


@pytest.mark.parametrize("change, words", [
    ({"z": None}, r"grid_config needs z=\[low, high, cell\], got None"),
    ({"y": [-6, 6]}, r"grid_config needs y=\[low, high, cell\], got \[-6, 6\]"),
    ({"x": [-8, 4, 5.0]}, r"grid_config x=\[-8.0, 4.0, 5.0\] holds no whole number of voxels"),
    ({"x": [4, -8, 2.0]}, r"x=\[4.0, -8.0, 2.0\] holds no whole number"),
    ({"x": [4, -8, -2.0]}, r"x=\[4.0, -8.0, -2.0\] holds no whole number"),
    ({"x": [-8, 4, 0]}, r"x=\[-8.0, 4.0, 0.0\] holds no whole number"),
])
def test_grids_that_are_none_are_refused(change, words):
    config = {key: value for key, value in (CONFIG | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        VoxelGrid.from_config(config)


@pytest.fixture
def memory():
    torch.manual_seed(0)
    return TemporalMemory(
        histories=tuple(torch.randn(BATCH, z * y * x, t * CHANNELS) for (z, y, x), t in zip(SIZES, SLOTS, strict=True)),
        sizes=SIZES, channels=CHANNELS, bda=torch.randn(BATCH, 4, 4), sequence_ids=torch.tensor([7, 3]),
        ego_translation=torch.randn(BATCH, 3, dtype=torch.float64))


@pytest.mark.parametrize("stage", [0, 1])
def test_views_of_a_history(memory, stage):
    size_z, size_y, size_x = SIZES[stage]
    volume = memory.history_volume(stage)
    assert memory.batch_size == BATCH
    assert volume.shape == (BATCH, SLOTS[stage] * CHANNELS, *SIZES[stage])
    assert volume.data_ptr() == memory.histories[stage].data_ptr()
    for z in range(size_z):
        for y in range(size_y):
            for x in range(size_x):
                row = memory.histories[stage][:, (z * size_y + y) * size_x + x]
                assert torch.equal(volume[:, :, z, y, x], row)
                assert torch.equal(memory.newest_volume(stage)[:, :, z, y, x], row[:, :CHANNELS])


def same(a, b):
    return (all(torch.equal(x, y) for x, y in zip(a.histories, b.histories, strict=True))
            and a.sizes == b.sizes and a.channels == b.channels
            and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("bda", "sequence_ids", "ego_translation")))


def test_state_dict_round_trip_through_a_safe_file(memory, tmp_path):
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    state = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert same(TemporalMemory.from_state_dict(state), memory)
    lists = {**state, "histories": list(state["histories"]), "sizes": [list(size) for size in state["sizes"]]}
    again = TemporalMemory.from_state_dict(lists)
    assert isinstance(again.histories, tuple) and again.sizes == SIZES


@pytest.mark.parametrize("change", [lambda state: state.pop("bda"), lambda state: state.update(extra=1)])
def test_a_state_dict_of_something_else_is_refused(memory, change):
    state = memory.state_dict()
    change(state)
    with pytest.raises(ValueError, match="temporal memory needs .*'sequence_ids'.* got"):
        TemporalMemory.from_state_dict(state)


def test_a_clone_shares_nothing(memory):
    copied = memory.clone()
    assert same(copied, memory)
    before = memory.clone()
    for tensor in (*copied.histories, copied.bda, copied.sequence_ids, copied.ego_translation):
        tensor.zero_()
    assert same(memory, before) and not same(copied, memory)


def test_moving_keeps_the_small_entries_on_the_host(memory):
    moved = memory.to("meta")
    assert {h.device.type for h in moved.histories} == {"meta"}
    assert {t.device.type for t in (moved.bda, moved.sequence_ids, moved.ego_translation)} == {"cpu"}
    assert memory.histories[0].device.type == "cpu" and moved.sizes == SIZES


def test_narrowing_keeps_the_first_slots(memory):
    first = memory.narrow(1)
    assert first.batch_size == 1 and first.sizes == memory.sizes and first.channels == memory.channels
    for short, whole in zip((*first.histories, first.bda, first.sequence_ids, first.ego_translation),
                            (*memory.histories, memory.bda, memory.sequence_ids, memory.ego_translation), strict=True):
        assert torch.equal(short, whole[:1])
    assert same(memory.narrow(memory.batch_size), memory)
    for count in (0, memory.batch_size + 1):
        with pytest.raises(ValueError, match=f"cannot take {count} of {memory.batch_size} batch slots"):
            memory.narrow(count)
