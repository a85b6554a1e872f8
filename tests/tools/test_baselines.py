"""The most frequent label of each voxel, its score, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from loading import load_tool
from mmcv import Config

from mmdet3d.core.evaluation.baselines import evaluate_constant, majority_labels
from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.labels import OPENOCC

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "config/stcocc/stcocc-tiny-synthetic.py")
command = load_tool("baselines")


class Labels:
    """Grids of labels as a data set."""

    labels, ann_file = OPENOCC, "made up"

    def __init__(self, *grids):
        self.grids = [np.array(grid, dtype=np.int64).reshape(-1, 2, 1) for grid in grids]

    def __len__(self):
        return len(self.grids)

    def ground_truth(self, index):
        return {"semantics": self.grids[index]}


def test_majority():
    data = Labels([3, 5, 16, 255, 255, 9], [3, 16, 16, 255, 2, 2], [4, 16, 11, 255, 255, 4])
    labels = majority_labels(data)
    assert labels.shape == (3, 2, 1) and labels.dtype == np.uint8
    assert labels.ravel().tolist() == [3, 16, 16, 16, 2, 2]  # nothing known: free; a tie: the lowest number
    seen = []
    majority_labels(data, lambda loop: (seen.append(index) or index for index in loop))
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match=r"made up: sample 1 has labels of \(1, 2, 1\) voxels"):
        majority_labels(Labels([1, 2, 3, 4], [1, 2]))
    with pytest.raises(ValueError, match="made up has no samples"):
        majority_labels(Labels())


def options(world, **changes):
    files = {f"data.{part}.ann_file": world / f"stcocc-nuscenes_infos_{split}.pkl"
             for part, split in (("train", "train"), ("test", "val"))}
    return ["--device", "cpu", "--cfg-options",
            *(f"{key}={value}" for key, value in {**files, "data.workers_per_gpu": 0, **changes}.items())]


def test_command(tiny_world, tmp_path, capsys):
    out, saved = tmp_path / "majority.json", tmp_path / "majority.npy"
    assert command.main([CONFIG, "--out", str(out), "--save", str(saved), *options(tiny_world)]) == 0
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert "majority: RayIoU" in printed and "MEAN" in printed
    assert (record["predictor"], record["samples"], record["train_samples"]) == ("majority", 6, 6)
    # the road is where it always is; whoever says nothing moves errs by the mean speed
    assert 0.02 < record["ray_iou"]["RayIoU"] < 0.2
    moving = record["moving"]
    assert moving["speed"] == 0.5 and moving["ave"] == moving["ave_zero_flow"]
    assert set(record["versions"]) >= {"torch", "mmdet3d"} and record["missing"] == []

    cfg = Config.fromfile(CONFIG)
    data = build_dataset({**cfg.data.test, "ann_file": str(tiny_world / "stcocc-nuscenes_infos_val.pkl"),
                          "test_mode": True})
    labels = np.load(saved)
    assert labels.shape == (40, 40, 8)
    assert evaluate_constant(data, labels).summary.rays["RayIoU"] == record["ray_iou"]["RayIoU"]
    one_of_them = evaluate_constant(data, data.ground_truth(2)["semantics"].astype(np.uint8))
    assert one_of_them.summary.rays["RayIoU"] > record["ray_iou"]["RayIoU"]


def test_untrained_is_reproducible(tiny_world, tmp_path):
    records = []
    for number, seed in enumerate((0, 0)):
        out = tmp_path / f"{number}.json"
        assert command.main([CONFIG, "--predictor", "untrained", "--seed", str(seed), "--out", str(out),
                             *options(tiny_world)]) == 0
        records.append(json.loads(out.read_text()))
    assert records[0]["ray_iou"] == records[1]["ray_iou"] and records[0]["predictor"] == "untrained"
    assert records[0]["ray_iou"]["RayIoU"] < 0.02


def test_errors(tiny_world, tmp_path, capsys):
    assert command.main([CONFIG, "--out", str(tmp_path / "a.json"),
                         *options(tiny_world, **{"data.train.ann_file": tmp_path / "none.pkl"})]) == 2
    assert "none.pkl" in capsys.readouterr().err and not (tmp_path / "a.json").exists()
    with pytest.raises(SystemExit):
        command.main([CONFIG, "--predictor", "untrained", "--save", "a.npy"])
