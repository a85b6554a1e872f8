"""Batch samplers: goldens, the worked example of 150 scenes, full coverage, saved positions."""

import itertools
import json
import logging
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmdet3d.datasets.samplers.sequence import (
    EvalSequenceSampler,
    LegacyEvalSequenceSampler,
    TrainSequenceSampler,
    balanced_slots,
    build_batch_sampler,
    distributed_place,
    sequence_groups,
    slot_groups,
)

LENGTHS = (7, 3, 5, 9, 4, 6, 8, 2, 10, 5, 3, 6)
FLAGS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
# The validation scenes: 150 of 39, 40 or 41 frames, 6019 frames in all.
VAL_LENGTHS = [40, 41, 40, 39, 40] * 26 + [41] * 19 + [40]
VAL_FLAGS = np.repeat(np.arange(150), VAL_LENGTHS)
SEED = 209652396


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/pipeline_samplers.npz")


@pytest.fixture(scope="module")
def golden_flags(shared, golden):
    dataset = np.load(shared / "golden/pipeline_dataset.npz")
    return {"syn": golden["synthetic_flag"], "split1": dataset["split1_flag"], "split2": dataset["split2_flag"]}


def all_ranks(kind, flags, batch, world, **options):
    return [list(kind(flags, batch, world, rank, **options)) for rank in range(world)]


def test_golden_training_orders(golden, golden_flags):
    names = [name for name in golden.files if name.startswith("train_")]
    assert len(names) > 8
    for name in names:
        kind, batch, world, rank, seed = re.fullmatch(r"train_(\w+)_b(\d)_w(\d)_r(\d)_seed(\d)", name).groups()
        sampler = TrainSequenceSampler(golden_flags[kind], int(batch), int(world), int(rank), seed=int(seed))
        order = list(itertools.islice(sampler, len(golden[name])))
        np.testing.assert_array_equal(order, golden[name], err_msg=name)


def test_golden_evaluation_orders(golden, golden_flags):
    names = [name for name in golden.files if re.fullmatch(r"eval_.*_seed0", name)]
    assert len(names) > 20
    for name in names:
        kind, batch, world, rank = re.fullmatch(r"eval_(\w+)_b(\d)_w(\d)_r(\d)_seed0", name).groups()
        sampler = LegacyEvalSequenceSampler(golden_flags[kind], int(batch), int(world), int(rank), seed=0)
        order = list(sampler)
        assert len(order) == len(sampler)
        np.testing.assert_array_equal(order, golden[name], err_msg=name)
        if f"{name}_second_pass" in golden.files:
            np.testing.assert_array_equal(list(sampler), golden[f"{name}_second_pass"], err_msg=name)


def test_golden_coverage(golden, golden_flags):
    for name in (name for name in golden.files if name.endswith("_covered")):
        kind, batch, world = re.fullmatch(r"eval_(\w+)_b(\d)_w(\d)_covered", name).groups()
        place = golden_flags[kind], int(batch), int(world)
        if golden[name] == -1:
            with pytest.raises(ValueError, match="cannot fill"):
                LegacyEvalSequenceSampler(*place, seed=0)
        else:
            orders = all_ranks(LegacyEvalSequenceSampler, *place, seed=0)
            assert len(set(np.concatenate(orders).ravel().tolist())) == golden[name]
            assert len(LegacyEvalSequenceSampler(*place, seed=0).covered()) == golden[name]


def test_first_seed_of_a_test_run():
    assert np.random.RandomState(0).randint(2**31) == SEED


def test_permutations_of_the_worked_example():
    val = list(itertools.islice(slot_groups(150, SEED, 1, 0), 300))
    assert val[:16] == [6, 125, 48, 38, 64, 44, 28, 76, 75, 115, 37, 39, 85, 121, 111, 105]
    assert val[150:158] == [149, 82, 100, 113, 43, 63, 91, 54]
    train = list(itertools.islice(slot_groups(1400, 0, 1, 0), 2800))
    assert train[:4] == [844, 1088, 1375, 50] and train[1400:1404] == [934, 1312, 549, 540]

    def weighted(values):
        return sum(position * value for position, value in enumerate(values)) % 1000003

    assert [weighted(val[:150]), weighted(val[150:])] == [863817, 812407]
    assert [weighted(train[:1400]), weighted(train[1400:])] == [271439, 238660]


@pytest.mark.parametrize("world, batch, batches, first", [
    (1, 1, 6036, {0: [6, 125, 48, 38]}),
    (6, 1, 1019, {0: [6, 28, 85], 1: [125, 76, 121], 5: [44, 39]}),
    (6, 5, 203, {0: [6], 1: [125], 2: [48], 3: [38], 4: [64], 5: [44], 6: [28], 7: [76], 8: [75], 9: [115]}),
    (8, 1, 768, {0: [6, 75], 7: [76, 105]}),
])
def test_worked_example(world, batch, batches, first):
    assert len(VAL_FLAGS) == 6019
    for slot, groups in first.items():
        sampler = LegacyEvalSequenceSampler(VAL_FLAGS, batch, world, slot // batch)
        assert len(sampler) == batches
        frames = np.array(list(sampler))[:, slot % batch]
        visited = [group for group, _ in itertools.groupby(VAL_FLAGS[frames].tolist())]
        assert visited[: len(groups)] == groups


def test_the_published_order_tells_what_it_skips(caplog):
    with caplog.at_level(logging.WARNING):
        sampler = LegacyEvalSequenceSampler(VAL_FLAGS, 4, 8, 0, seed=0)
    missing = 6019 - len(sampler.covered())
    assert missing > 0 and f"skips {missing} of 6019 frames" in caplog.text
    caplog.clear()
    LegacyEvalSequenceSampler(VAL_FLAGS, 1, 1, 0)
    LegacyEvalSequenceSampler(VAL_FLAGS, 4, 8, 1)  # rank 0 has told
    assert caplog.text == ""


@pytest.mark.parametrize("flags", [FLAGS, VAL_FLAGS, np.zeros(5, int), np.arange(9), FLAGS * 3 + 2],
                         ids=["syn", "val", "one", "single", "gaps"])
@pytest.mark.parametrize("world, batch", [(1, 1), (2, 1), (3, 2), (8, 1), (1, 5), (6, 5), (7, 3)])
def test_evaluation_visits_every_frame_once(flags, world, batch):
    orders = all_ranks(EvalSequenceSampler, flags, batch, world)
    seen = [frame for batches in orders for batch_of in batches for frame in batch_of]
    assert sorted(seen) == list(range(len(flags)))
    assert all(type(frame) is int for frame in seen)
    for rank, batches in enumerate(orders):
        sizes = [len(one) for one in batches]
        assert sizes == sorted(sizes, reverse=True) and 0 not in sizes and max(sizes, default=0) <= batch
        assert len(EvalSequenceSampler(flags, batch, world, rank)) == len(batches)
        for position in range(max(sizes, default=0)):  # each batch position: whole sequences, one after the other
            frames = [one[position] for one in batches if position < len(one)]
            for group, run in itertools.groupby(frames, key=lambda frame: flags[frame]):
                assert list(run) == np.flatnonzero(flags == group).tolist()


def test_evaluation_in_one_process_reads_front_to_back():
    assert list(EvalSequenceSampler(FLAGS, 1)) == [[frame] for frame in range(len(FLAGS))]
    sampler = EvalSequenceSampler(FLAGS, 2, 2, 1)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("world, batch", [(1, 4), (4, 1), (6, 5), (8, 1), (3, 2)])
def test_evaluation_is_balanced(world, batch):
    orders = all_ranks(EvalSequenceSampler, VAL_FLAGS, batch, world)
    frames = [sum(map(len, batches)) for batches in orders]
    assert max(map(len, orders)) <= np.ceil(150 / (world * batch)) * 41
    assert max(frames) - min(frames) <= 41


def test_balanced_slots():
    slots = balanced_slots([3, 9, 4, 5, 3], 2)
    assert sorted(itertools.chain(*slots)) == [0, 1, 2, 3, 4]
    assert [sum([3, 9, 4, 5, 3][group] for group in groups) for groups in slots] == [12, 12]
    assert balanced_slots([2, 5], 3) == [[1], [0], []]


def test_evaluation_says_when_it_cannot_be_balanced(caplog):
    with caplog.at_level(logging.INFO, logger="mmdet3d"):
        EvalSequenceSampler(np.repeat([0, 1, 2], 5), 2, 2)
        assert "3 sequences leave 1 of 4 batch slots (2 processes x batch 2) without work" in caplog.text
        caplog.clear()
        EvalSequenceSampler(np.repeat([0, 1, 2], [30, 2, 2]), 1, 2)
        assert "longest batch slot has 30 frames, the mean is 17.0" in caplog.text
        caplog.clear()
        EvalSequenceSampler(VAL_FLAGS, 5, 6)
        assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("done", [0, 1, 7, 60, 1000])
def test_training_goes_on_where_it_stopped(done):
    for rank in range(2):
        place = {"samples_per_gpu": 2, "world_size": 2, "rank": rank, "seed": 3}
        whole = list(itertools.islice(TrainSequenceSampler(FLAGS, **place), done + 30))
        first = TrainSequenceSampler(FLAGS, **place)
        assert list(itertools.islice(first, done)) == whole[:done]
        state = json.loads(json.dumps(first.state_dict()))
        assert state["batches"] == done
        second = TrainSequenceSampler(FLAGS, **place)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert list(itertools.islice(second, 30)) == whole[done:]
        assert second.state_dict()["batches"] == done + 30
        assert second.state_dict(batches=5)["batches"] == 5


def test_workers_fetch_ahead_so_the_position_is_given():
    sampler = TrainSequenceSampler(FLAGS, 2, seed=1)
    loader = DataLoader(torch.arange(len(FLAGS)), batch_sampler=sampler, num_workers=0)
    seen = [batch.tolist() for batch in itertools.islice(loader, 9)]
    again = TrainSequenceSampler(FLAGS, 2, seed=1)
    again.load_state_dict(sampler.state_dict(batches=4))
    assert list(itertools.islice(again, 5)) == seen[4:]


@pytest.mark.parametrize("change, message", [
    ({"seed": 4}, r"seed 3 \(now 4\)"), ({"samples_per_gpu": 1}, r"samples_per_gpu 2 \(now 1\)"),
    ({"world_size": 3}, r"world_size 1 \(now 3\)"), ({"flags": FLAGS[:-1]}, r"sequences \w+ \(now \w+\)")])
def test_a_position_of_another_run_is_refused(change, message):
    options = {"flags": FLAGS, "samples_per_gpu": 2, "world_size": 1, "seed": 3}
    state = TrainSequenceSampler(**options).state_dict(10)
    with pytest.raises(ValueError, match=message):
        TrainSequenceSampler(**{**options, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="missing"):
        TrainSequenceSampler(**options).load_state_dict({"batches": 3})
    with pytest.raises(ValueError, match="negative"):
        TrainSequenceSampler(**options).load_state_dict({**state, "batches": -1})


@pytest.mark.parametrize("kind", [TrainSequenceSampler, LegacyEvalSequenceSampler, EvalSequenceSampler])
def test_refusals(kind):
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        kind(FLAGS, 0)
    with pytest.raises(ValueError, match=r"rank: expected 0\.\.1, got 2"):
        kind(FLAGS, 1, 2, 2)
    with pytest.raises(ValueError, match=r"flags: .* shape \(2, 3\)"):
        kind(np.zeros((2, 3)), 1)
    if kind is not EvalSequenceSampler:
        with pytest.raises(ValueError, match="12 sequences cannot fill 14 batch slots"):
            kind(FLAGS, 7, 2)


def test_groups_by_ascending_id_even_if_they_interleave():
    assert [group.tolist() for group in sequence_groups([5, 2, 5, 2, 9])] == [[1, 3], [0, 2], [4]]


def test_samplers_by_their_config_names():
    assert isinstance(build_batch_sampler("IterBasedRunner", FLAGS, 2, seed=5), TrainSequenceSampler)
    assert build_batch_sampler("IterBasedRunner", FLAGS, 2, seed=5).seed == 5
    assert isinstance(build_batch_sampler("IterBasedRunnerEval", FLAGS, 2, seed=5), EvalSequenceSampler)
    legacy = build_batch_sampler("IterBasedRunnerEval", FLAGS, 1, world_size=3, rank=2, legacy_order=True)
    assert isinstance(legacy, LegacyEvalSequenceSampler) and (legacy.seed, legacy.rank) == (SEED, 2)
    with pytest.raises(ValueError, match=r"\['IterBasedRunner', 'IterBasedRunnerEval'\], got 'EpochBasedRunner'"):
        build_batch_sampler("EpochBasedRunner", FLAGS, 2)


def test_place_without_a_process_group():
    assert distributed_place() == (0, 1)


def test_length_of_training_is_one_pass():
    assert len(TrainSequenceSampler(FLAGS, 2, 2)) == 68 // 4 and len(TrainSequenceSampler([0, 1], 2)) == 1
