"""tools/bench_pipeline.py: its variants give the same values, and it writes its numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load_tool
from PIL import Image

from mmdet3d.datasets.infos import load_infos

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/datasets"))

import data_world  # noqa: E402


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_pipeline")


def configs():
    shared = {"type": "NuScenesDatasetOccpancy", "dataset_name": "occ3d", "ann_file": "infos.pkl"}
    return {"train": {**shared, "pipeline": data_world.train_steps(), "sequences_split_num": 2},
            "test": {**shared, "pipeline": data_world.test_steps(), "test_mode": True}}


def test_variants_give_the_same_values(bench, tmp_path):
    (tmp_path / "links").mkdir()
    path = data_world.make_world(tmp_path / "data", lengths=(2,))
    path = bench.make_sequence(path, 5, tmp_path / "links", None)
    for split, config in configs().items():
        samples = []
        for variant in bench.VARIANTS:
            dataset = bench.dataset_of(config, path, variant)
            dataset.seed(3)
            inputs = dataset[4]["img_inputs"]
            samples.append(inputs[0] if split == "test" else inputs)
        literal, pipeline, shipped = samples
        assert all(torch.equal(a, b) for a, b in zip(literal, pipeline, strict=True))
        assert shipped[0].dtype == torch.uint8 and torch.equal(shipped[4], literal[4])


def test_images_are_brought_to_one_size(bench, tmp_path):
    (tmp_path / "links").mkdir()
    original = load_infos(data_world.make_world(tmp_path / "data", lengths=(2,)))[0]["cams"]["CAM_BACK"]
    path = bench.make_sequence(tmp_path / "data/infos.pkl", 3, tmp_path / "links", None, (80, 60))
    for info in load_infos(path):
        camera = info["cams"]["CAM_BACK"]
        assert Image.open(camera["data_path"]).size == (80, 60)
        np.testing.assert_allclose(camera["cam_intrinsic"][:2], 2 * original["cam_intrinsic"][:2])
        assert camera["cam_intrinsic"][2].tolist() == [0, 0, 1]


def test_writes_numbers_of_every_case(bench, tmp_path, capsys):
    path = data_world.make_world(tmp_path / "data", lengths=(2,))
    config = tmp_path / "config.py"
    config.write_text(f"data = {configs()!r}\n")
    bench.main([str(config), "--info-file", str(path), "--frames", "4", "--workers", "1", "--image-size", "80", "60",
                "--json", str(tmp_path / "numbers.json")])
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert [(row["split"], row["workers"], row["variant"]) for row in rows] == [
        (split, 1, variant) for split in ("train", "test") for variant in bench.VARIANTS]
    assert all(row["samples_per_s"] > 0 and row["cpu_s_per_sample"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 7
