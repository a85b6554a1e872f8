"""The data set: input dicts, sequences, options, determinism, workers, errors, and the published configs."""

import copy
from multiprocessing.reduction import ForkingPickler

import data_world
import numpy as np
import pytest
import torch
from mmcv import Config
from mmcv.parallel import collate
from torch.utils.data import DataLoader

from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.builder import build_pipeline
from mmdet3d.datasets.infos import DataError, load_infos, sequence_flags
from mmdet3d.datasets.nuscenes_occupancy import NuScenesOccupancyDataset
from mmdet3d.datasets.pipelines.images import PrepareImageInputs
from mmdet3d.datasets.pipelines.occupancy import LoadOccGTFromFileOpenOcc
from mmdet3d.registry import DATASETS, ConfigError

CONFIGS = sorted(data_world.CONFIG_FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def info_file(tmp_path_factory):
    return data_world.make_world(tmp_path_factory.mktemp("world") / "data")


def train_set(info_file, **options):
    return NuScenesOccupancyDataset(info_file, data_world.train_steps(), dataset_name="occ3d", sequences_split_num=2,
                                    **options)


def equal(a, b):
    """Whether two samples hold the same values."""
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return equal(a.data, b.data) if hasattr(a, "data") and hasattr(a, "cpu_only") else a == b


def test_both_names_mean_the_same_class():
    assert DATASETS.get("NuScenesDatasetOccpancy") is NuScenesOccupancyDataset
    assert DATASETS.get("NuScenesOccupancyDataset") is NuScenesOccupancyDataset


def test_input_dict(info_file):
    dataset = NuScenesOccupancyDataset(info_file, [], test_mode=True)
    record = dataset.get_data_info(2)
    assert dataset[2].keys() == record.keys() and len(dataset) == 7
    assert record["curr"]["token"] == record["sample_idx"] == "scene-0-2"
    assert [info["token"] for info in record["adjacent"]] == ["scene-0-1", "scene-0-0"]
    assert record["ann_infos"][1] == [3] and record["sweeps"] == [] and record["bbox3d_fields"] == []
    assert record["box_mode_3d"] == 0 and record["box_type_3d"].__name__ == "LiDARBoxes"
    assert record["pts_filename"] == "samples/scene-0-2.bin" and record["info_file"] == str(info_file)
    for index in (-1, 7):
        with pytest.raises(IndexError, match=rf"sample index {index} is not in 0\.\.6"):
            dataset[index]


def test_sequences_for_samplers(info_file):
    assert train_set(info_file).flag.tolist() == [0, 0, 1, 1, 2, 2, 3]
    whole = NuScenesOccupancyDataset(info_file, [], test_mode=True)
    assert whole.flag.tolist() == [0] * 4 + [1] * 3 and whole.flag.dtype == np.int64
    assert [i for i in range(7) if whole.get_data_info(i)["start_of_sequence"]] == [0, 4]
    assert len(NuScenesOccupancyDataset(info_file, [], load_interval=2)) == 4


def test_the_records_are_never_changed(info_file):
    def vandal(results):
        results["curr"]["can_bus"][:] = -1
        results["curr"]["cams"].clear()
        results["adjacent"][0]["token"] = "gone"
        results["can_bus"][:] = 5
        return results

    dataset = NuScenesOccupancyDataset(info_file, [vandal], test_mode=True)
    before = copy.deepcopy(list(dataset.data_infos))
    for index in range(len(dataset)):
        dataset[index]
    np.testing.assert_equal(list(dataset.data_infos), before)
    np.testing.assert_equal(before, load_infos(info_file))


@pytest.mark.parametrize("labels, name", [("LoadOccGTFromFileCVPR2023", "occ3d"),
                                          ("LoadOccGTFromFileOpenOcc", "openocc")])
def test_training_sample_and_batch(info_file, labels, name):
    dataset = NuScenesOccupancyDataset(info_file, data_world.train_steps(labels), dataset_name=name)
    batch = collate([dataset[3], dataset[5]], samples_per_gpu=2)
    assert [tuple(tensor.shape) for tensor in batch["img_inputs"]] == [
        (2, 6, 3, 16, 32), *[(2, 6, 4, 4)] * 4, (2, 4, 4)]
    assert batch["gt_depth"].shape == (2, 2, 16, 32) and (batch["gt_depth"] > 0).any()
    assert batch["voxel_semantics_1_8"].shape == (2, 2, 3, 1) and dataset.labels.name == name
    assert ("voxel_flows" in batch) == (name == "openocc")


def test_draws_are_reproducible_and_go_on(info_file):
    """The global generator, seeded, an own one with that seed, and a copy of it give the same samples."""
    one, other = train_set(info_file), train_set(info_file)
    np.random.seed(5)  # noqa: NPY002
    first, second = one[1], one[1]
    other.seed(5)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert equal(other[1], first) and equal(other[1], second) and not equal(first, second)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    other.seed(6)
    assert not equal(other[1], first)


def seed_worker(worker_id):
    np.random.seed(100 + worker_id)  # noqa: NPY002


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_samples_of_their_seeds(info_file, context):
    dataset = train_set(info_file)
    expected = []
    for worker in range(2):
        np.random.seed(100 + worker)  # noqa: NPY002
        expected.append([dataset[i] for i in range(4) if i % 2 == worker])
    loader = DataLoader(dataset, sampler=range(4), batch_size=1, num_workers=2, collate_fn=collate,
                        worker_init_fn=seed_worker, multiprocessing_context=context)
    for i, batch in enumerate(loader):
        sample = expected[i % 2][i // 2]
        assert equal([tensor[0] for tensor in batch["img_inputs"]], list(sample["img_inputs"]))
        assert torch.equal(batch["voxel_semantics"][0], torch.from_numpy(sample["voxel_semantics"]))
        assert batch["img_metas"].data[0][0]["sample_idx"] == sample["img_metas"].data["sample_idx"]


def test_a_worker_receives_handles_instead_of_records(tmp_path, info_file):
    large = data_world.make_world(tmp_path / "large", lengths=(8, 8, 8))
    sizes = []
    for path in (info_file, large):
        dataset = train_set(path)
        dataset.ann_file = ""  # its length differs
        sizes.append(len(ForkingPickler.dumps(dataset)) - dataset.flag.nbytes)
    assert abs(sizes[1] - sizes[0]) < 100


def test_images_of_a_scene_are_decoded_once_at_test_time(info_file):
    dataset = NuScenesOccupancyDataset(info_file, data_world.test_steps(), test_mode=True)
    reader = dataset.pipeline.transforms[0].reader
    for index in range(7):
        dataset[index]
    assert reader.decoded == 2 * 7
    # Two scenes in turns, as in batches of two.
    dataset = NuScenesOccupancyDataset(info_file, data_world.test_steps(), test_mode=True)
    dataset.remember_samples(2)
    for index in (0, 4, 1, 5, 2, 6, 3):
        dataset[index]
    assert dataset.pipeline.transforms[0].reader.decoded == 2 * 7
    training = train_set(info_file)
    training.remember_samples(4)
    training[0]  # the start of a scene: the adjacent frames are the current one
    assert training.pipeline.transforms[0].reader.decoded == 2


def test_nothing_but_the_files_that_are_read_is_needed(tmp_path):
    path = data_world.make_world(tmp_path / "data", lengths=(2,))
    for file in (*(tmp_path / "data/samples").glob("*.bin"), *(tmp_path / "data/gts").rglob("*.npz")):
        file.unlink()
    steps = [step for step in data_world.train_steps("LoadOccGTFromFileOpenOcc")
             if step["type"] not in ("LoadPointsFromFile", "PointToMultiViewDepth")]
    steps[-1]["keys"].remove("gt_depth")
    assert "gt_depth" not in NuScenesOccupancyDataset(path, steps)[1]


def test_errors_name_step_sample_and_file(tmp_path):
    path = data_world.make_world(tmp_path / "data", lengths=(3,))
    dataset = train_set(path)
    for file, message in (("samples/scene-0-2.bin", "LoadPointsFromFile: sample scene-0-2: .*samples/scene-0-2.bin"),
                          ("gts/scene-0/scene-0-2/labels.npz", "LoadOccGTFromFileCVPR2023: sample scene-0-2: .*labels"),
                          ("samples/CAM_BACK_scene-0-1.png", "PrepareImageInputs: sample scene-0-1, CAM_BACK: .*png")):
        content = (tmp_path / "data" / file).read_bytes()
        (tmp_path / "data" / file).write_bytes(content[:-21])
        with pytest.raises(DataError, match=message):
            dataset[2]
        (tmp_path / "data" / file).unlink()
        with pytest.raises(DataError, match=message):
            dataset[2]
    loader = DataLoader(dataset, sampler=[2], collate_fn=collate, num_workers=1)
    with pytest.raises(DataError, match="PrepareImageInputs: sample scene-0-1"):
        next(iter(loader))


@pytest.mark.parametrize("options, message", [
    ({"test_mode": True}, r"sequences_split_num: evaluation needs whole sequences \(1\), got 2"),
    ({"box_type_3d": "Camera"}, "box_type_3d: expected 'LiDAR', got 'Camera'"),
    ({"img_info_prototype": "bevdet"}, "img_info_prototype: expected 'bevdet4d'"),
    ({"eval_metric": "iou"}, "eval_metric: expected 'rayiou' or 'miou', got 'iou'"),
    ({"filter_empty_gt": True}, "filter_empty_gt: expected False"),
    ({"use_sequence_group_flag": False}, "use_sequence_group_flag: expected True"),
    ({"modality": {"use_cameras": True}}, r"modality: unknown keys \['use_cameras'\]"),
    ({"modality": {"use_camera": False}}, "use_camera must be True"),
    ({"load_interval": 0}, "load_interval: expected a positive"),
    ({"multi_adj_frame_id_cfg": (2, 4, 1)}, "starts at 1")])
def test_unsupported_options(info_file, options, message):
    with pytest.raises(ValueError, match=message):
        train_set(info_file, **options)


def test_records_of_somebodys_own(info_file):
    class Some(NuScenesOccupancyDataset):
        def load_annotations(self, ann_file, load_interval=1):
            return [info for info in super().load_annotations(ann_file, load_interval) if info["token"] in self.keep]

    Some.keep = {info["token"] for info in load_infos(info_file)[1:4]}
    dataset = Some(info_file, [])
    assert [dataset.data_infos[i]["token"] for i in range(len(dataset))] == [
        info["token"] for info in load_infos(info_file)[1:4]] and len(dataset.flag) == 3
    Some.keep = set()
    with pytest.raises(ValueError, match="Some keeps no sample of .*pkl"):
        Some(info_file, [])


def test_misspelt_keys_are_refused_with_their_place(info_file):
    config = {"type": "NuScenesDatasetOccpancy", "ann_file": str(info_file), "pipeline": []}
    with pytest.raises(ConfigError, match=r"data.train: NuScenesOccupancyDataset takes no \['ann_files'\] .*'ann_file"):
        build_dataset({**config, "ann_files": 1}, place="data.train")
    with pytest.raises(ConfigError, match=r"data.type: 'NuScenesDatasetOccupancy' is not .* mean 'NuScenesDatasetOcc"):
        build_dataset({**config, "type": "NuScenesDatasetOccupancy"})
    with pytest.raises(ConfigError, match=r"data.pipeline\[0\]: LoadAnnotations takes no \['with_bbox'\]"):
        build_dataset({**config, "pipeline": [{"type": "LoadAnnotations", "with_bbox": True}]})
    with pytest.raises(ConfigError, match="data: NuScenesOccupancyDataset: info file not found: .*none.pkl"):
        build_dataset({**config, "ann_file": "none.pkl"})
    with pytest.raises(ConfigError, match="data: NuScenesOccupancyDataset: dataset_name: 'kitti' is not a known"):
        build_dataset({**config, "dataset_name": "kitti"})


@pytest.mark.parametrize("path", [path for path in CONFIGS if "train" in Config.fromfile(str(path)).data
                                  and "pipeline" in Config.fromfile(str(path)).data.train], ids=lambda path: path.stem)
def test_published_configs_build(info_file, path):
    config = Config.fromfile(str(path))
    before = copy.deepcopy(config.data.to_dict())
    for split in ("train", "val", "test"):
        count = len(config.data[split].pipeline)
        dataset = build_dataset({**config.data[split], "ann_file": str(info_file)}, place=f"data.{split}")
        assert len(dataset.pipeline.transforms) == count and dataset.test_mode == (split != "train")
        assert dataset.offsets == (1, 2) and dataset.labels.name == config.dataset_name
        for step in config.data[split].pipeline:
            with pytest.raises(ConfigError, match=r"pipeline\[0\]: .* takes no \['misspelt'\]"):
                build_pipeline([{**step, "misspelt": 1}])
    assert config.data.to_dict() == before


def test_ground_truth_is_what_the_files_hold(info_file):
    sizes = {"grid_size": data_world.GRID}
    folders = [info_file.parent / tree / "scene-0/scene-0-1" for tree in ("gts", "openocc_v2")]
    occ3d, openocc = (dict(np.load(folder / "labels.npz")) for folder in folders)
    found = NuScenesOccupancyDataset(info_file, [], dataset_name="occ3d", label_options=sizes).ground_truth(1)
    np.testing.assert_array_equal(found["semantics"], occ3d["semantics"])
    np.testing.assert_array_equal(found["mask_camera"], occ3d["mask_camera"])
    assert found["flow"] is None
    found = NuScenesOccupancyDataset(info_file, [], label_options=sizes).ground_truth(1)
    np.testing.assert_array_equal(found["semantics"], openocc["semantics"])
    np.testing.assert_array_equal(found["flow"], openocc["flow"])
    assert found["mask_camera"] is None


def test_ground_truth_of_a_coarser_grid_is_that_of_the_pipeline(info_file):
    options = {"grid_size": data_world.GRID, "coarsen": (2, 3, 4)}
    dataset = NuScenesOccupancyDataset(info_file, [LoadOccGTFromFileOpenOcc(**options)], label_options=options)
    found, sample = dataset.ground_truth(3), dataset[3]
    assert found["semantics"].shape == (8, 8, 2) and found["flow"].shape == (8, 8, 2, 2)
    np.testing.assert_array_equal(found["semantics"], sample["voxel_semantics"])
    np.testing.assert_array_equal(found["flow"], sample["voxel_flows"])
    with pytest.raises(IndexError, match=r"sample index 7 is not in 0\.\.6"):
        dataset.ground_truth(7)
    with pytest.raises(ConfigError, match="coarse"):
        build_dataset({"type": "NuScenesDatasetOccpancy", "ann_file": str(info_file), "pipeline": [],
                       "label_options": {"coarse": 2}})


@pytest.mark.parametrize("split", [1, 2])
def test_golden_input_dicts(shared, split):
    golden = np.load(shared / "golden/pipeline_dataset.npz")
    path = shared / "data/nuscenes_real/stcocc-nuscenes_infos_mini_val_poses.pkl"
    dataset = NuScenesOccupancyDataset(path, [], sequences_split_num=split)
    prefix = f"split{split}"
    np.testing.assert_array_equal(dataset.flag, golden[f"{prefix}_flag"])
    tokens = golden["split1_tokens"].tolist()
    for i in range(len(dataset)):
        record = dataset.get_data_info(i)
        assert record["sample_idx"] == tokens[i] and record["timestamp"] == golden[f"{prefix}_timestamp"][i]
        for key in ("sequence_group_idx", "sample_index", "start_of_sequence"):
            assert record[key] == golden[f"{prefix}_{key}"][i]
        assert [tokens.index(info["token"]) for info in record["adjacent"]] == golden[f"{prefix}_adjacent"][i].tolist()
        np.testing.assert_allclose(record["can_bus"], golden[f"{prefix}_can_bus"][i], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(record["curr"]["can_bus"], golden[f"{prefix}_can_bus_before"][i])
        for key, atol in (("curr_to_prev_ego_rt", 1e-6), ("curr_to_prev_lidar_rt", 1e-6),
                          ("prev_lidar_to_global_rt", 1.3e-4), ("global_to_curr_lidar_rt", 1.3e-4)):
            np.testing.assert_allclose(record[key], golden[f"{prefix}_{key}"][i], rtol=0, atol=atol)


def test_golden_sequences(shared):
    golden = np.load(shared / "golden/pipeline_dataset.npz")
    path = shared / "data/nuscenes_real/stcocc-nuscenes_infos_mini_val_poses.pkl"
    for split in (3, 4, "all"):
        np.testing.assert_array_equal(NuScenesOccupancyDataset(path, [], sequences_split_num=split).flag,
                                      golden[f"flag_split{split}"])
    third = NuScenesOccupancyDataset(path, [], load_interval=3)
    np.testing.assert_array_equal(third.flag, golden["flag_load_interval3"])
    np.testing.assert_array_equal(third.flag, sequence_flags(third.data_infos))
    for split in (8, 13, 15, 20):
        with pytest.raises(ValueError, match="pieces"):
            NuScenesOccupancyDataset(path, [], sequences_split_num=split)


def test_prepare_step_is_registered():
    (step,) = build_pipeline([{"type": "PrepareImageInputs", "data_config": data_world.DATA_CONFIG}]).transforms
    assert isinstance(step, PrepareImageInputs)
