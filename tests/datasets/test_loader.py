"""Loaders: order of samples, form of batches, random numbers and the way to the device."""

import itertools
import signal
import subprocess

import numpy as np
import pytest
import torch
from data_world import GRID, make_world, train_steps
from data_world import test_steps as evaluation_steps
from mmcv.parallel import DataContainer

from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.loader import build_dataloader, collate, to_device

LENGTHS = (4, 3, 5)


@pytest.fixture(scope="module")
def infos(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("loader") / "world", LENGTHS)


def make_dataset(infos, training, **image_options):
    steps = train_steps("LoadOccGTFromFileOpenOcc") if training else evaluation_steps(**image_options)
    return build_dataset({"type": "NuScenesOccupancyDataset", "ann_file": str(infos), "pipeline": steps,
                          "test_mode": not training})


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def indices(batches):
    return [[meta["index"] for meta in (batch["img_metas"] if isinstance(batch["img_metas"][0], dict)
                                        else batch["img_metas"][0])] for batch in batches]


def test_batches_of_the_train_pipeline(infos):
    loader = build_dataloader(make_dataset(infos, True), 2, 0, training=True)
    batches = take(loader, 6)
    batch = batches[0]
    assert [tuple(x.shape) for x in batch["img_inputs"]] == [(2, 6, 3, 16, 32), *[(2, 6, 4, 4)] * 4, (2, 4, 4)]
    assert batch["gt_depth"].shape == (2, 2, 16, 32)
    assert batch["voxel_semantics"].shape == (2, *GRID) and batch["voxel_flows"].shape == (2, *GRID, 2)
    assert len(batch["img_metas"]) == 2 and isinstance(batch["img_metas"][0]["can_bus"], np.ndarray)
    sampler = loader.sequence_sampler
    expected = list(itertools.islice(iter(type(sampler)(loader.dataset.dataset.flag, 2)), 6))
    assert indices(batches) == expected
    starts = [[meta["start_of_sequence"] for meta in batch["img_metas"]] for batch in batches]
    assert starts[0] == [True, True] and not all(itertools.chain(*starts))


def test_batches_of_the_test_pipeline(infos):
    loader = build_dataloader(make_dataset(infos, False), 2, 0, training=False)
    batches = list(loader)
    first = batches[0]
    assert set(first) == {"img_inputs", "img_metas", "points"} and {len(value) for value in first.values()} == {1}
    assert [tuple(x.shape) for x in first["img_inputs"][0]] == [(2, 6, 3, 16, 32), *[(2, 6, 4, 4)] * 4, (2, 4, 4)]
    assert [meta["start_of_sequence"] for meta in first["img_metas"][0]] == [True, True]
    assert [p.shape[1] for p in first["points"][0]] == [3, 3]
    assert sorted(itertools.chain(*indices(batches))) == list(range(sum(LENGTHS)))
    published = build_dataloader(make_dataset(infos, False), 1, 0, training=False, order="published")
    assert len(published) == sum(LENGTHS) + 17


def test_each_process_has_its_own_sequences(infos):
    dataset = make_dataset(infos, False)
    seen = [list(itertools.chain(*indices(build_dataloader(dataset, 1, 0, training=False, rank=r, world_size=2))))
            for r in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(sum(LENGTHS))) and seen[0] and seen[1]


def draws(batches):
    return [torch.cat([batch["img_inputs"][4].flatten(), batch["img_inputs"][5].flatten()]) for batch in batches]


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def test_augmentation_depends_on_the_place_in_the_training_only(infos):
    plain = draws(take(build_dataloader(make_dataset(infos, True), 1, 0, training=True, seed=3), 6))
    assert not any(same(plain[1:], plain[:-1]))
    workers = build_dataloader(make_dataset(infos, True), 1, 2, training=True, seed=3, start_method="fork")
    assert all(same(plain, draws(take(workers, 6))))
    resumed = build_dataloader(make_dataset(infos, True), 1, 0, training=True, seed=3)
    resumed.sequence_sampler.load_state_dict(workers.sequence_sampler.state_dict(batches=4))
    assert all(same(plain[4:], draws(take(resumed, 2))))
    other = draws(take(build_dataloader(make_dataset(infos, True), 1, 0, training=True, seed=4), 6))
    assert not any(same(plain, other))
    places = take(build_dataloader(make_dataset(infos, True), 2, 0, training=True, seed=3), 1)[0]["img_inputs"][4]
    assert not torch.equal(places[0], places[1])


class Draws(torch.utils.data.Dataset):
    """Samples that show their worker's random numbers."""

    flag = np.arange(8)

    def __getitem__(self, index):
        import cv2

        return {"index": index, "numpy": np.random.mtrand._rand.randint(2**31), "torch": int(torch.randint(2**31, ())),
                "threads": cv2.getNumThreads()}


def test_workers_are_seeded_as_published():
    loader = build_dataloader(Draws(), 1, 2, training=True, seed=5, rank=1, world_size=2, order="published",
                              start_method="fork")
    batches = take(loader, 4)
    for worker in range(2):
        rng = np.random.RandomState(2 * 1 + worker + 5)
        assert [int(batch["numpy"]) for batch in batches[worker::2]] == [rng.randint(2**31) for _ in range(2)]
    assert {int(batch["threads"]) for batch in batches} <= {0, 1}


def test_the_published_stream_of_a_data_set_is_that_of_its_worker(infos):
    dataset = make_dataset(infos, True)
    loader = build_dataloader(dataset, 1, 1, training=True, seed=5, order="published", start_method="fork")
    got = draws(take(loader, 2))
    dataset.seed(5)
    wanted = draws([collate([dataset[batch[0]]]) for batch in indices(take(loader, 2))])
    assert all(same(got, wanted))


def test_pictures_in_memory_follow_the_batch_size(infos):
    dataset = make_dataset(infos, False)
    build_dataloader(dataset, 3, 0, training=False)
    step = next(iter(dataset.pipeline))
    assert step.reader.capacity == 6 * 2 * 3


def test_batch_on_the_device(infos, device):
    batch = next(iter(build_dataloader(make_dataset(infos, True), 1, 0, training=True)))
    moved = to_device(batch, device)
    assert torch.equal(moved["img_inputs"][0].cpu(), batch["img_inputs"][0])
    assert {matrix.device.type for matrix in moved["img_inputs"][1:]} == {"cpu"}
    assert {moved[key].device.type for key in ("gt_depth", "voxel_semantics_1_8", "voxel_flows")} == {device}
    assert moved["img_inputs"][0].device.type == device and moved["img_inputs"][5].device.type == "cpu"
    assert moved["img_metas"] is batch["img_metas"]


def test_entries_are_stacked_or_listed():
    batch = collate([{"a": 1.5, "b": (torch.ones(2),), "c": DataContainer(torch.ones(3), stack=True),
                      "d": DataContainer({"x": 1}, cpu_only=True)} for _ in range(2)])
    assert batch["a"].tolist() == [1.5, 1.5] and batch["b"][0].shape == (2, 2) and batch["c"].shape == (2, 3)
    assert batch["d"] == [{"x": 1}, {"x": 1}]


@pytest.mark.parametrize("samples, message", [
    ([{"a": 1}, {"b": 1}], "differ in their keys"),
    ([{"a": torch.ones(2)}, {"a": torch.ones(3)}], r"a: cannot stack shapes \[\(2,\), \(3,\)\]"),
    ([{"a": [1]}, {"a": [1, 2]}], r"a: cannot collate lists of lengths \[1, 2\]")])
def test_samples_that_do_not_fit_together(samples, message):
    with pytest.raises(ValueError, match=message):
        collate(samples)


@pytest.mark.parametrize("options, message", [
    ({"order": "random"}, "order: expected one of"), ({"workers_per_gpu": -1}, "workers_per_gpu"),
    ({"samples_per_gpu": 9}, "sequences cannot fill 9 batch slots")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_dataloader(Draws(), **{"samples_per_gpu": 1, "workers_per_gpu": 0, "training": True, **options})


def test_workers_leave_signals_to_the_process_they_serve(infos):
    loader = build_dataloader(make_dataset(infos, True), 1, 1, training=True, start_method="fork")
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    for number in (signal.SIGINT, signal.SIGTERM):  # as from a terminal or a launcher, not from the parent
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    for _ in range(4):
        next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0
