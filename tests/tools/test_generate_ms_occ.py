"""tools/generate_ms_occ.py: files, resuming, checking, damaged and missing labels."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loading import load_module, load_tool

from mmdet3d.datasets.converters import multiscale_files
from mmdet3d.datasets.converters.multiscale_gt import downsample_labels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    return load_tool("generate_ms_occ")


@pytest.fixture(scope="module")
def world_module():
    return load_module(ROOT / "tests/datasets/converters/label_world.py")


@pytest.fixture
def world(world_module, tmp_path):
    info_file, infos = world_module.write_world(tmp_path / "data", sensors=False)
    return info_file, infos


def run(tool, info_file, *options, dataset="occ3d"):
    summary = info_file.parent / "summary.json"
    code = tool.main(["--dataset", dataset, "--pkl_path", str(info_file), "--workers", "1", "--json", str(summary),
                      *options])
    return code, json.loads(summary.read_text())


def coarse_files(info_file, tree="gts"):
    return sorted((info_file.parent / tree).rglob("labels_1_*.npz"))


@pytest.mark.parametrize("dataset, tree, free", [("occ3d", "gts", 17), ("openocc", "openocc_v2", 16)])
def test_files_hold_the_labels_twice(tool, world, dataset, tree, free):
    info_file, infos = world
    code, summary = run(tool, info_file, dataset=dataset)
    assert code == 0 and summary["counts"] == {"written": 5} and summary["problems"] == []
    assert len(coarse_files(info_file, tree)) == 15 and not list(info_file.parent.rglob("*.tmp"))
    for info in infos:
        folder = info_file.parent / info["occ_path"].replace("gts", tree)
        semantics = np.load(folder / "labels.npz")["semantics"]
        for factor in (2, 4, 8):
            with np.load(folder / f"labels_1_{factor}.npz", allow_pickle=False) as content:
                assert content.files == ["semantics", "flow"]
                for name in content.files:
                    assert content[name].dtype == np.uint8
                    np.testing.assert_array_equal(content[name], downsample_labels(semantics, factor, free))
    other = {"gts": "openocc_v2", "openocc_v2": "gts"}[tree]
    assert coarse_files(info_file, other) == []


def test_complete_files_are_left_alone_unless_asked(tool, world, capsys):
    info_file, _ = world
    run(tool, info_file)
    before = {path: path.stat().st_mtime_ns for path in coarse_files(info_file)}
    content = {path: path.read_bytes() for path in before}
    code, summary = run(tool, info_file)
    assert code == 0 and summary["counts"] == {"complete": 5}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "5  complete already, left alone" in capsys.readouterr().out
    code, summary = run(tool, info_file, "--overwrite")
    assert summary["counts"] == {"written": 5}
    assert all(path.stat().st_mtime_ns > before[path] for path in before)
    assert {path: path.read_bytes() for path in before} == content  # the same bytes whenever they are made


def test_an_interrupted_run_is_continued(tool, world, monkeypatch, capsys):
    info_file, _ = world
    done, write = [], multiscale_files.write_coarse_labels

    def write_two(folder, grids):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(folder)
        write(folder, grids)

    monkeypatch.setattr(multiscale_files, "write_coarse_labels", write_two)
    code, summary = run(tool, info_file)
    assert code == 130 and summary["interrupted"] and summary["counts"] == {"written": 2}
    assert "interrupted; the same command continues" in capsys.readouterr().out
    monkeypatch.undo()
    code, summary = run(tool, info_file)
    assert code == 0 and summary["counts"] == {"complete": 2, "written": 3}


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def damage_empty(path):
    path.write_bytes(b"")


def damage_shape(path):
    np.savez_compressed(path, semantics=np.zeros((1, 2, 3), np.uint8), flow=np.zeros((1, 2, 3), np.uint8))


def damage_entry(path):
    np.savez_compressed(path, semantics=np.load(path)["semantics"])


def damage_dtype(path):
    grid = np.load(path)["semantics"]
    np.savez_compressed(path, semantics=grid.astype(np.int64), flow=grid)


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_shape, damage_entry, damage_dtype, Path.unlink])
def test_incomplete_files_are_made_again(tool, world, damage):
    info_file, _ = world
    run(tool, info_file)
    path = coarse_files(info_file)[4]
    good = path.read_bytes()
    damage(path)
    code, summary = run(tool, info_file)
    assert code == 0 and summary["counts"] == {"complete": 4, "written": 1}
    assert path.read_bytes() == good


def test_check_compares_and_writes_nothing(tool, world, capsys):
    info_file, infos = world
    code, summary = run(tool, info_file, "--check")
    assert code == 1 and summary["counts"] == {"absent": 5} and coarse_files(info_file) == []
    run(tool, info_file)
    assert run(tool, info_file, "--check")[1]["counts"] == {"equal": 5}
    folder = info_file.parent / infos[1]["occ_path"]
    grid = np.load(folder / "labels_1_4.npz")["semantics"]
    wrong = grid.copy()
    wrong[0, 1, 1] = 3 if grid[0, 1, 1] != 3 else 4
    np.savez_compressed(folder / "labels_1_4.npz", semantics=grid, flow=wrong)
    (info_file.parent / infos[2]["occ_path"] / "labels_1_8.npz").write_bytes(b"PK")
    before = {path: path.read_bytes() for path in coarse_files(info_file)}
    code, summary = run(tool, info_file, "--check")
    assert code == 1 and summary["counts"] == {"equal": 3, "different": 1, "failed": 1}
    different, failed = summary["problems"]
    assert different["token"] == "0-1" and "labels_1_4.npz: flow: 1 of 48 voxels differ" in different["detail"]
    assert failed["token"] == "0-2" and "labels_1_8.npz: not a readable .npz file" in failed["detail"]
    assert {path: path.read_bytes() for path in before} == before
    assert "0-1: " in capsys.readouterr().out


def test_missing_and_unusable_labels_are_listed_and_the_rest_is_done(tool, world, capsys):
    info_file, infos = world
    folders = [info_file.parent / info["occ_path"] for info in infos]
    shutil.rmtree(folders[0])
    (folders[1] / "labels.npz").write_bytes(b"no zip")
    np.savez_compressed(folders[2] / "labels.npz", semantics=np.zeros((16, 20, 8), np.uint8))
    np.savez_compressed(folders[3] / "labels.npz", labels=np.zeros((16, 24, 8), np.uint8))
    code, summary = run(tool, info_file)
    assert code == 1 and summary["counts"] == {"missing": 1, "failed": 3, "written": 1}
    assert [problem["token"] for problem in summary["problems"]] == ["0-0", "0-1", "0-2", "1-0"]
    details = [problem["detail"] for problem in summary["problems"]]
    assert "file not found: gts/scene-0/0-0/labels.npz; looked for" in details[0]
    assert "not a readable .npz file" in details[1] and "does not divide the grid (16, 20, 8)" in details[2]
    assert "no ['semantics']; found ['labels']" in details[3]
    out = capsys.readouterr().out
    assert "label file not found: 1" in out and "0-2: " in out


def test_a_pickle_in_a_label_file_is_not_run(tool, world):
    info_file, infos = world
    np.savez_compressed(info_file.parent / infos[0]["occ_path"] / "labels.npz", semantics=np.array([{}], object))
    code, summary = run(tool, info_file)
    assert code == 1 and "allow_pickle=False" in summary["problems"][0]["detail"]


def test_wrong_tree(tool, world_module, tmp_path, capsys):
    info_file, _ = world_module.write_world(tmp_path / "data", trees=("gts",), sensors=False)
    assert run(tool, info_file, dataset="openocc")[0] == 1
    assert "no label file was found at all" in capsys.readouterr().out


def test_errors_in_one_line(tool, tmp_path, capsys):
    assert tool.main(["--dataset", "occ3d", "--pkl_path", str(tmp_path / "none.pkl")]) == 2
    assert "error: info file not found" in capsys.readouterr().err
    for options in (["--workers", "0"], ["--check", "--overwrite"], ["--dataset", "nuscenes"]):
        with pytest.raises(SystemExit):
            tool.main(["--dataset", "occ3d", "--pkl_path", "x.pkl", *options])


def test_command_line_with_two_processes(world):
    info_file, _ = world
    command = [sys.executable, str(ROOT / "tools/generate_ms_occ.py"), "--dataset", "occ3d", "--pkl_path",
               info_file.name, "--workers", "2"]
    finished = subprocess.run(command, cwd=info_file.parent, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "5 of 5 samples" in finished.stdout and len(coarse_files(info_file)) == 15
