"""tools/rayiou.py from files to numbers, and what it says about bad files."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loading import load_tool

from mmdet3d.datasets.infos import load_infos
from mmdet3d.datasets.lidar_origins import LidarOrigins
from mmdet3d.datasets.metrics import RayMetric, VoxelMIoU

ROOT = Path(__file__).resolve().parents[2]
rayiou = load_tool("rayiou")


def make_info(scene, number, time, place):
    return {"token": f"{scene}{number}", "timestamp": time, "scene_token": scene,
            "prev": f"{scene}{number - 1}" if number else "", "occ_path": f"./data/gts/scene-{scene}/{scene}{number}",
            "cams": {}, "can_bus": np.zeros(18), "lidar2ego_translation": [0.9, 0.0, 1.8],
            "lidar2ego_rotation": [1.0, 0.0, 0.0, 0.0], "ego2global_translation": place,
            "ego2global_rotation": [1.0, 0.0, 0.0, 0.0]}


def make_world(tmp_path, dataset="openocc"):
    """Two scenes, the later one first in the scene table; grids of the released size."""
    free = 16 if dataset == "openocc" else 17
    infos = [make_info("b", i, i, [4.0 * i, 0.0, 0.0]) for i in range(2)]
    infos += [make_info("a", i, 10 + i, [0.0, 3.0 * i, 0.0]) for i in range(3)]
    (tmp_path / "infos.pkl").write_bytes(pickle.dumps({"infos": infos, "metadata": {"version": "x"}}))
    (tmp_path / "scene.json").write_text(json.dumps([{"token": t, "nbr_samples": n} for t, n in (("a", 3), ("b", 2))]))
    rng = np.random.default_rng(0)
    for info in infos:
        gt = np.full((200, 200, 16), free, np.uint8)
        gt[:, :, 0] = 11
        for _ in range(80):
            x, y = rng.integers(0, 190, 2)
            gt[x:x + 6, y:y + 4, 1:6] = rng.integers(0, free)
        flow = np.zeros((200, 200, 16, 2), np.float16)
        flow[gt < 8] = rng.normal(0, 3, 2)
        scene, token = info["occ_path"].split("/")[-2:]
        truth, pred = tmp_path / "gt" / scene / token / "labels.npz", tmp_path / "pred" / scene / f"{token}.npz"
        truth.parent.mkdir(parents=True)
        pred.parent.mkdir(parents=True, exist_ok=True)
        extra = {"flow": flow} if dataset == "openocc" else {"mask_camera": np.ones_like(gt), "mask_lidar": gt * 0}
        np.savez_compressed(truth, semantics=gt, **extra)
        np.savez_compressed(pred, semantics=np.roll(gt, 1, axis=0), flow=np.roll(flow, 1, axis=0) * 0.5)
    return tmp_path


def arguments(world, *more, dataset="openocc"):
    return ["--pred", str(world / "pred"), "--gt", str(world / "gt"), "--infos", str(world / "infos.pkl"),
            "--dataset", dataset, "--workers", "1", *more]


@pytest.mark.parametrize("pairing", ["token", "index"])
def test_scores_equal_those_of_the_metrics(tmp_path, capsys, pairing):
    world = make_world(tmp_path)
    scenes = ["--scenes", str(world / "scene.json")] if pairing == "index" else []
    report = world / "out/results.json"
    assert rayiou.main(arguments(world, "--pairing", pairing, *scenes, "--json", str(report))) == 0
    infos = load_infos(world / "infos.pkl")
    origins = LidarOrigins(infos, pairing, *scenes[1:])
    rays, voxels = RayMetric("openocc"), VoxelMIoU("openocc")
    for index, info in enumerate(infos):
        scene, token = info["occ_path"].split("/")[-2:]
        pred = np.load(world / "pred" / scene / f"{token}.npz")
        gt = np.load(world / "gt" / scene / token / "labels.npz")
        rays.add(token, pred["semantics"], gt["semantics"], origins[index], pred["flow"], gt["flow"])
        voxels.add(token, pred["semantics"], gt["semantics"])
    summary, text = json.loads(report.read_text()), capsys.readouterr().out
    assert summary["ray_iou"]["RayIoU"] == rays.result()["RayIoU"] and 0.1 < rays.result()["RayIoU"] < 0.9
    assert summary["ray_iou"]["mAVE"] == pytest.approx(rays.result()["mAVE"], abs=1e-12)
    assert summary["voxel_iou"]["miou"] == voxels.result()["miou"]
    assert summary["settings"]["pairing"] == pairing and (summary["samples"], summary["missing"]) == (5, 0)
    assert summary["classes"][:2] == ["car", "truck"] and summary["free_label"] == 16
    assert summary["ray_iou"]["classes"]["car"]["gt_rays"] == rays.counts.gt[0]
    assert f"MIOU: {rays.result()['miou']!r}" in text and f"pairing: {pairing}" in text
    assert f"mAVE over {rays.result()['flow_rays']} true-positive rays" in text
    assert "===> mIoU of 5 samples" in text and "5 samples in" in text


def test_processes_cache_and_flat_names_change_nothing(tmp_path):
    world = make_world(tmp_path)
    results = []
    for number, more in enumerate(([], ["--cache", str(world / "cache")], ["--cache", str(world / "cache")],
                                   ["--workers", "2"], [])):
        if number == 4:  # as other projects write them
            for path in sorted((world / "pred").glob("*/*.npz")):
                np.savez(world / "pred" / path.name, pred=np.load(path)["semantics"], flow=np.load(path)["flow"])
                path.unlink()
        assert rayiou.main(arguments(world, *more, "--json", str(world / "r.json"))) == 0
        results.append(json.loads((world / "r.json").read_text())["ray_iou"])
    assert len(list((world / "cache").rglob("*.npz"))) == 5
    for result in results[1:]:
        assert result["RayIoU"] == results[0]["RayIoU"] and result["classes"].keys() == results[0]["classes"].keys()
        assert result["mAVE"] == pytest.approx(results[0]["mAVE"], abs=1e-12)


def test_occ3d_has_a_mask_and_no_flow(tmp_path):
    world = make_world(tmp_path, "occ3d")
    assert rayiou.main(arguments(world, "--json", str(world / "r.json"), dataset="occ3d")) == 0
    result = json.loads((world / "r.json").read_text())
    assert result["ray_iou"]["mAVE"] == 0 and result["classes"][0] == "others"
    path = next((world / "gt").rglob("labels.npz"))
    arrays = dict(np.load(path))
    arrays["mask_camera"][:] = 0
    np.savez(path, **arrays)
    before = result["voxel_iou"]["miou"]
    assert rayiou.main(arguments(world, "--json", str(world / "r.json"), dataset="occ3d")) == 0
    assert json.loads((world / "r.json").read_text())["voxel_iou"]["miou"] != before


def test_missing_predictions(tmp_path, capsys):
    world = make_world(tmp_path)
    (world / "pred/scene-a/a1.npz").unlink()
    assert rayiou.main(arguments(world)) == 2
    assert "1 of 5 predictions are missing" in (text := capsys.readouterr().err) and "a1" in text
    assert rayiou.main(arguments(world, "--allow-missing")) == 0
    assert "NOT THE WHOLE SPLIT: 1 predictions are missing" in capsys.readouterr().out


def change(path, **arrays):
    np.savez(path, **{**np.load(path), **arrays})


@pytest.mark.parametrize("where", ["pred/scene-b/b0.npz", "gt/scene-b/b0/labels.npz"])
def test_bad_files_are_named(tmp_path, capsys, where):
    world = make_world(tmp_path)
    path, good = world / where, (world / where).read_bytes()
    kind = "prediction" if where.startswith("pred") else "truth"

    def refused(*messages):
        assert rayiou.main(arguments(world)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for message in (path.name, *messages):
            assert message in error, error
        path.write_bytes(good)

    semantics = np.load(path)["semantics"]
    rng = np.random.default_rng(0)
    for content in (b"", rng.bytes(3000), good[:len(good) // 2], good[:-30], b"PK\x03\x04" + rng.bytes(200)):
        path.write_bytes(content)
        refused("damaged or no .npz file")
    np.save(path.with_suffix(".npy"), semantics)
    path.with_suffix(".npy").replace(path)
    refused("damaged or no .npz file")
    change(path, semantics=np.array([{"a": 1}], object))
    refused("damaged or no .npz file")
    change(path, semantics=semantics[1:])
    refused("must have shape", "(200, 200, 16)")
    change(path, semantics=np.where(semantics == 11, 40, semantics))
    refused("holds label 40", "0 to 16")
    change(path, semantics=np.where(semantics == 16, 15, semantics))
    refused("no voxel of semantics is free", "another class table")
    np.savez(path, occupancy=semantics, flow=np.zeros((200, 200, 16, 2), np.float16))
    refused("has no array 'semantics'")
    if kind == "prediction":
        change(path, flow=np.full((200, 200, 16, 2), np.nan, np.float16))
        refused("flow is not finite")
    else:
        np.savez(path, semantics=semantics)
        refused("has no array 'flow'", "openocc")
        path.unlink()
        refused("file not found")
        change(path, flow=np.full((200, 200, 16, 2), np.nan, np.float16))
        assert rayiou.main(arguments(world, "--json", str(world / "r.json"))) == 0
        assert json.loads((world / "r.json").read_text())["samples"] == 5


def test_wrong_folders_options_and_double_predictions(tmp_path, capsys):
    world = make_world(tmp_path)
    for option, message in (("--pred", "folder of predictions not found"), ("--gt", "folder of ground truth not found"),
                            ("--infos", "info file not found")):
        assert rayiou.main(arguments(world, option, str(world / "nothing"))) == 2
        assert message in capsys.readouterr().err
    (world / "empty").mkdir()
    assert rayiou.main(arguments(world, "--pred", str(world / "empty"))) == 2
    assert "no prediction of" in capsys.readouterr().err
    for options, message in ((["--pairing", "index"], "needs --scenes"),
                             (["--scenes", "x"], "for --pairing index only"),
                             (["--pairing", "index", "--scenes", "x", "--allow-missing"], "needs the whole split"),
                             (["--workers", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            rayiou.parse_args(arguments(world, *options))
        assert message in capsys.readouterr().err
    source = world / "pred/scene-a/a0.npz"
    (world / "pred/a0.npz").write_bytes(source.read_bytes())
    assert rayiou.main(arguments(world)) == 2
    assert "sample a0 has two predictions" in capsys.readouterr().err


def test_runs_without_mmcv():
    program = """
import sys
for name in ("mmcv", "mmdet", "mmseg", "nuscenes"):
    sys.modules[name] = None  # importing it raises ImportError
import mmdet3d.datasets.lidar_origins, mmdet3d.datasets.metrics, mmdet3d.datasets.metrics.files
import mmdet3d.datasets.converters.parallel
assert not any(name.startswith("mmdet3d.models") for name in sys.modules)
print("done")
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0 and finished.stdout.strip() == "done", finished.stderr
