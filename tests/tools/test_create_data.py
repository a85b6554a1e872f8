"""tools/create_data.py: whole and partial downloads, with and without CAN bus and lidar, messages and exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loading import load_module, load_tool

from mmdet3d.datasets.infos import load_infos

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("nuscenes")


@pytest.fixture(scope="module")
def tool():
    return load_tool("create_data")


@pytest.fixture
def world():
    return load_module(ROOT / "tests/datasets/converters/nuscenes_world.py")


@pytest.fixture
def download(world, tmp_path, monkeypatch):
    """Root of a download, relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    root = Path("data/nuscenes")
    world.write_download(root, world.make_tables())
    return root


def run(tool, root, *options, version="v1.0-mini"):
    code = tool.main(["--root", str(root), "--version", version, "--json", "summary.json", *options])
    return code, json.loads(Path("summary.json").read_text()) if Path("summary.json").is_file() else None


def test_whole_download(tool, download, capsys):
    code, summary = run(tool, download)
    output = capsys.readouterr().out
    assert code == 0 and summary["schema_version"] == 1 and summary["missing"]["sensors"] == {}
    for split, scene, official in (("train", "scene-0061", 8), ("val", "scene-0103", 2)):
        path = f"data/nuscenes/stcocc-nuscenes_infos_{split}.pkl"
        assert summary["splits"][split] == {"file": path, "samples": 3, "scenes": 1, "official_scenes": official}
        assert f"{split}: 3 samples, 1 of {official} official scenes: {path}" in output
        infos = load_infos(path)
        assert [info["occ_path"] for info in infos] == [
            f"./data/nuscenes/gts/{scene}/{scene}-{frame}" for frame in range(3)]
        assert all(Path(camera["data_path"]).is_file() for info in infos for camera in info["cams"].values())
        assert all(info["can_bus"].any() == (split == "val") for info in infos)
    assert "zeros in 1 scenes: scene-0061 (data/nuscenes/can_bus/scene-0061_pose.json not found)" in output
    assert not list(download.glob(".*.tmp"))


def test_same_input_gives_the_same_bytes(tool, download):
    for folder in ("a", "b"):
        assert run(tool, download, "--out", folder, "--prefix", "mine")[0] == 0
    assert Path("a/mine_infos_val.pkl").read_bytes() == Path("b/mine_infos_val.pkl").read_bytes()
    assert not list(download.glob("*.pkl"))


def test_without_can_bus_and_lidar(tool, download, capsys):
    shutil.rmtree(download / "can_bus")
    shutil.rmtree(download / "samples/LIDAR_TOP")
    code, summary = run(tool, download)
    output = capsys.readouterr().out
    assert code == 0 and summary["missing"]["lidar_absent"] and summary["can_bus"]["folder"] is None
    assert "no CAN bus expansion" in output and "no lidar file" in output and "missing:" not in output
    assert not load_infos(download / "stcocc-nuscenes_infos_val.pkl")[0]["can_bus"].any()


def test_can_bus_elsewhere(tool, download, capsys):
    shutil.move(download / "can_bus", "elsewhere")
    assert run(tool, download, "--can-bus", "elsewhere", "--out", "next")[0] == 0
    assert run(tool, download, "--can-bus", "elsewhere", "--out", "last", "--can-bus-motion", "last")[0] == 0
    following, last = (load_infos(f"{out}/stcocc-nuscenes_infos_val.pkl")[0]["can_bus"] for out in ("next", "last"))
    assert following[:7].tolist() == last[:7].tolist() and (following[7:16] != last[7:16]).all()
    capsys.readouterr()
    assert run(tool, download, "--can-bus", "nowhere")[0] == 2
    assert "--can-bus nowhere: neither can_bus/ nor *_pose.json" in capsys.readouterr().err


def test_partial_download_is_reported_and_can_be_skipped(tool, download, capsys):
    for path in download.glob("samples/CAM_FRONT/scene-0061-*"):
        path.unlink()
    (download / "samples/LIDAR_TOP/scene-0061-2-LIDAR_TOP-key.pcd.bin").unlink()
    code, summary = run(tool, download)
    output = capsys.readouterr().out
    assert code == 1 and summary["splits"] == {} and not list(download.glob("*.pkl"))
    for line in ("missing: LIDAR_TOP: 1 of 6 files", "missing: CAM_FRONT: 3 of 6 files", "in 1 scenes: scene-0061",
                 "samples/CAM_FRONT/scene-0061-2-CAM_FRONT-key.jpg", "incomplete: 1 of 2 scenes: scene-0061",
                 "nothing was written", "--skip-missing"):
        assert line in output
    code, summary = run(tool, download, "--skip-missing")
    assert code == 0 and summary["splits"]["train"]["file"] is None and summary["splits"]["val"]["samples"] == 3
    assert "train: no complete scene in the tables, no file written" in capsys.readouterr().out
    assert [path.name for path in download.glob("*.pkl")] == ["stcocc-nuscenes_infos_val.pkl"]


def test_nothing_complete(tool, download, capsys):
    shutil.rmtree(download / "samples")
    code, summary = run(tool, download, "--skip-missing")
    assert code == 1 and not list(download.glob("*.pkl"))
    assert summary["missing"]["incomplete_scenes"] == ["scene-0061", "scene-0103"]


def test_trainval_and_test_releases(tool, world, download):
    for version, names, files in (("v1.0-trainval", ("scene-0061", "scene-0103"), {"train": 3, "val": 3}),
                                  ("v1.0-test", ("scene-0077", "scene-0078"), {"test": 6})):
        tables = world.make_tables()
        for scene, name in zip(tables["scene"], names, strict=True):
            scene["name"] = name
        if version == "v1.0-test":
            tables.update(sample_annotation=[], instance=[])
        world.write_json_tables(download, tables, version)
        code, summary = run(tool, download, "--out", version, version=version)
        assert code == 0 and {split: part["samples"] for split, part in summary["splits"].items()} == files
        assert {path.name for path in Path(version).iterdir()} == {f"stcocc-nuscenes_infos_{key}.pkl" for key in files}


def test_errors_are_one_line(tool, download, capsys):
    for options, message in ((("--version", "v1.0"), "version: expected one of v1.0-trainval, v1.0-mini, v1.0-test"),
                             (("--version", "v1.0-trainval"), "versions there: v1.0-mini"),
                             (("--root", "nowhere"), "root folder not found: nowhere")):
        assert tool.main(["--root", str(download), "--version", "v1.0-mini", *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    (download / "v1.0-mini/scene.json").unlink()
    assert tool.main(["--root", str(download), "--version", "v1.0-mini"]) == 2
    assert "tables missing: scene.json; found: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--prefix", "../x"])


def test_help_runs_from_anywhere(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "tools/create_data.py"), "--help"], cwd=tmp_path,
                            capture_output=True, text=True, check=True)
    assert "--skip-missing" in result.stdout
