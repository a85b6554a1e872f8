"""tools/scene_starts.py: counters by scene, the jackknife, and a whole run on the tiny world."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loading import load_tool

from mmdet3d.datasets.labels import OPENOCC
from mmdet3d.datasets.metrics.ray_iou import RayCounts
from mmdet3d.datasets.metrics.ray_scores import scores

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

import evaluation_case as case  # noqa: E402

tool = load_tool("scene_starts")


def counts(generator):
    """Ray counters of one sample: a random number for each count."""
    zeros = RayCounts.zeros(OPENOCC.num_classes)
    return {name: generator.integers(50, 100, array.shape).astype(array.dtype) for name, array in vars(zeros).items()}


def test_counters_of_the_first_frames_of_each_scene():
    generator = np.random.default_rng(0)
    rays = [counts(generator) for _ in range(8)]
    dataset = SimpleNamespace(flag=np.array([0, 0, 0, 0, 0, 0, 4, 4]))
    found = tool.counts_by_scene(dataset, [SimpleNamespace(rays=sample) for sample in rays])
    members = {"first": ([0], [6]), "2 to 5": ([1, 2, 3, 4], [7]), "all": (range(6), [6, 7])}
    assert found.keys() == members.keys()
    for position, scenes in members.items():
        for scene, samples in zip(found[position], scenes, strict=True):
            for name, total in scene.items():
                np.testing.assert_array_equal(total, sum(rays[index][name] for index in samples))


def test_metrics_with_all_scenes_and_without_each():
    generator = np.random.default_rng(1)
    scenes = [counts(generator) for _ in range(3)]
    rows = tool.metrics_of(OPENOCC, scenes)
    for row, members in zip(rows, ([0, 1, 2], [1, 2], [0, 2], [0, 1]), strict=True):
        result = scores(RayCounts(**{name: sum(scenes[i][name] for i in members) for name in scenes[0]}), OPENOCC,
                        samples=3)
        assert row.tolist() == pytest.approx([100 * result["RayIoU"], result["mAVE"]])


def test_the_error_is_that_of_a_mean_where_the_metric_is_one():
    """For means over scenes the jackknife gives the usual standard error of the mean."""
    values = np.array([1.0, 4.0, 2.0, 9.0, 3.0])
    left_out = (values.sum() - values) / 4
    rows = np.stack([np.concatenate([[values.mean()], left_out])] * 2, -1)
    found = tool.difference(np.stack([rows, rows + 2]), np.zeros((2, 6, 2)))["RayIoU"]
    error = values.std(ddof=1) / np.sqrt(5)
    assert found["difference"] == pytest.approx(values.mean() + 1) and found["standard_error"] == pytest.approx(error)
    assert found["interval"] == pytest.approx([values.mean() + 1 - 2.7764 * error, values.mean() + 1 + 2.7764 * error],
                                              rel=1e-4)


def test_a_whole_comparison(tiny_world, tmp_path, capsys, one_thread):
    torch.save({"state_dict": case.model(case.dataset(tiny_world)).state_dict()}, tmp_path / "tiny.pth")
    record = tmp_path / "starts.json"
    assert tool.main([str(case.CONFIG), str(tmp_path / "tiny.pth"), "--seeds", "0", "--device", "cpu", "--json",
                      str(record), "--cfg-options", f"data.test.ann_file={case.mixed_infos(tiny_world)}",
                      "data.workers_per_gpu=0"]) == 0
    text, saved = capsys.readouterr().out, json.loads(record.read_text())
    assert saved["scenes"] == len(case.LENGTHS) and saved["samples"] == sum(case.LENGTHS)
    assert set(saved["starts"]) == {"none", "primed", "carried"} and "| carried | all |" in text
    same = saved["starts"]["carried"]["all"]["against_carried"]["RayIoU"]
    assert same["difference"] == 0 and same["interval"] == [0, 0]
    assert saved["starts"]["none"]["first"]["against_carried"]["mAVE"]["difference"] != 0
