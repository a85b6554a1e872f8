"""A synthetic data set made ready for use: info files that can be moved, coarse labels, and both label sets."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv import Config

from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.infos import DataError, load_infos
from mmdet3d.datasets.loader import build_dataloader, to_device
from mmdet3d.datasets.synthetic.prepare import SMALL, prepare_dataset
from mmdet3d.datasets.synthetic.scene import WorldSettings
from mmdet3d.models import build_model

CONFIGS = Path(__file__).resolve().parents[3] / "config/stcocc"
SETTINGS = WorldSettings(("scene-0061", "scene-0103"), frames=1, image_size=(64, 36))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "first"
    calls = []
    paths = prepare_dataset(folder, SETTINGS, on_frame=lambda: calls.append(1))
    assert len(calls) == 2 and list(paths) == ["train", "val"]
    moved = folder.with_name("moved")
    shutil.move(folder, moved)  # nothing in it may name the place where it was made
    return {split: moved / path.name for split, path in paths.items()}


def config(split, dataset_name, prepared):
    """``data.<split>`` of a published config with small images, on the prepared data."""
    names = {"openocc": "openocc-12e", "occ3d": "occ3d-36e"}
    data = Config.fromfile(str(CONFIGS / f"stcocc-r50-16f-{names[dataset_name]}.py")).data[split].to_dict()
    for step in data["pipeline"]:
        if "data_config" in step:
            step["data_config"]["input_size"] = (32, 64)
    return {**data, "ann_file": str(prepared["train" if split == "train" else "val"]), "sequences_split_num": 1}


def test_info_files_are_complete(prepared):
    assert [info["occ_path"].split("/")[-2] for info in load_infos(prepared["val"])] == ["scene-0103"]
    assert {path.name for path in prepared["train"].parent.rglob("labels_1_*.npz")} == {
        f"labels_1_{n}.npz" for n in (2, 4, 8)}
    assert len(list(prepared["train"].parent.rglob("labels_1_4.npz"))) == 4
    again = prepared["train"].read_bytes()
    assert prepare_dataset(prepared["train"].parent, SETTINGS) == prepared
    assert prepared["train"].read_bytes() == again


@pytest.mark.parametrize("dataset_name, classes", [("openocc", 17), ("occ3d", 18)])
def test_published_pipelines_run_on_it(prepared, dataset_name, classes):
    dataset = build_dataset(config("train", dataset_name, prepared))
    dataset.seed(1)
    sample = dataset[0]
    assert sample["img_inputs"][0].shape == (18, 3, 32, 64) and sample["gt_depth"].shape == (6, 32, 64)
    assert (sample["gt_depth"] > 0).float().mean() > 0.01
    for n, key in ((1, ""), (2, "_1_2"), (4, "_1_4"), (8, "_1_8")):
        grid = sample[f"voxel_semantics{key}"]
        assert grid.shape == (200 // n, 200 // n, 16 // n)
        assert grid.max() == classes - 1 and 3 < len(np.unique(grid)) <= classes
    assert ("voxel_flows" in sample) == (dataset_name == "openocc")
    test = build_dataset(config("val", dataset_name, prepared))
    assert len(test) == 1 and test[0]["img_inputs"][0][0].shape == (18, 3, 32, 64)
    truth = test.ground_truth(0)
    assert truth["semantics"].shape == (200, 200, 16)
    if dataset_name == "occ3d":
        assert truth["flow"] is None and 0 < truth["mask_camera"].mean() < 0.5
    else:
        assert truth["mask_camera"] is None and np.abs(truth["flow"]).max() > 1


def test_the_tiny_config_trains_on_it(prepared):
    cfg = Config.fromfile(str(CONFIGS / "stcocc-tiny-synthetic.py"))
    dataset = build_dataset({**cfg.data.train, "ann_file": str(prepared["train"]), "sequences_split_num": 1})
    loader = build_dataloader(dataset, 1, 0, training=True, seed=1)
    torch.manual_seed(0)
    model = build_model(cfg.model).train()
    for _, batch in zip(range(2), loader, strict=False):
        assert batch["voxel_semantics"].shape == (1, 40, 40, 8) and batch["voxel_flows"].shape == (1, 40, 40, 8, 2)
        out = model.train_step(to_device(batch, torch.device("cpu")), None)
        model.zero_grad()
        out["loss"].backward()
        assert np.isfinite(list(out["log_vars"].values())).all() and out["log_vars"]["loss_flow"] > 0
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients) and len(gradients) > 100


def test_the_tiny_config_is_evaluated_with_the_labels_it_trains_on(prepared):
    cfg = Config.fromfile(str(CONFIGS / "stcocc-tiny-synthetic.py"))
    test = build_dataset({**cfg.data.test, "ann_file": str(prepared["val"])})
    steps = [step for step in cfg.data.train.pipeline if "OccGT" in step["type"]]
    sample = build_dataset({**cfg.data.test, "ann_file": str(prepared["val"]), "pipeline": steps})[0]
    truth = test.ground_truth(0)
    np.testing.assert_array_equal(truth["semantics"], sample["voxel_semantics"])
    np.testing.assert_array_equal(truth["flow"], sample["voxel_flows"])
    moving = np.abs(truth["flow"]).max(-1) > 1
    assert moving.any() and (truth["semantics"][moving] < 8).all()


def test_damaged_labels_are_told(prepared, tmp_path):
    shutil.copytree(prepared["train"].parent, tmp_path / "copy")
    path = next((tmp_path / "copy/gts").rglob("labels.npz"))
    path.write_bytes(b"no zip")
    for coarse in path.parent.glob("labels_1_*.npz"):
        coarse.unlink()
    with pytest.raises(DataError, match="labels.npz"):
        prepare_dataset(tmp_path / "copy", SETTINGS)


def test_the_small_set_has_a_scene_of_each_kind():
    assert SMALL.scenes == ("scene-0061", "scene-0103") and SMALL.frames >= 3
