"""tools/check_data.py: a sound data set has no problems, and every kind of damage is found and named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loading import load_module, load_tool
from PIL import Image

from mmdet3d.datasets.converters import check
from mmdet3d.datasets.converters.label_files import write_coarse_labels
from mmdet3d.datasets.converters.multiscale_files import coarse_grids

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    return load_tool("check_data")


@pytest.fixture(scope="module")
def world_module():
    return load_module(ROOT / "tests/datasets/converters/label_world.py")


@pytest.fixture(scope="module")
def sound(world_module, tmp_path_factory):
    """A sound data set with coarse labels; copied by tests that damage it."""
    root = tmp_path_factory.mktemp("sound") / "data"
    _, infos = world_module.write_world(root)
    for info in infos:
        for tree, free in world_module.FREE.items():
            folder = root / info["occ_path"].replace("gts", tree)
            write_coarse_labels(folder, coarse_grids(folder / "labels.npz", free))
    return root, infos


class World:
    """A copy of the sound data set: records to change, files to damage."""

    def __init__(self, root, module, infos):
        self.root, self.module, self.infos = root, module, infos

    def labels(self, index, tree="gts"):
        return self.root / self.infos[index]["occ_path"].replace("gts", tree) / "labels.npz"

    def change_labels(self, index, tree="gts", **arrays):
        path = self.labels(index, tree)
        content = {**np.load(path), **arrays}
        np.savez_compressed(path, **{name: array for name, array in content.items() if array is not None})

    def image(self, index, camera):
        return self.root / self.infos[index]["cams"][camera]["data_path"]

    def lidar(self, index):
        return self.root / self.infos[index]["lidar_path"]


@pytest.fixture
def world(sound, world_module, tmp_path):
    root, _ = sound
    shutil.copytree(root, tmp_path / "data")
    infos = []
    for scene, length in enumerate((3, 2)):
        infos += [world_module.make_info(scene, frame, len(infos) + frame) for frame in range(length)]
    return World(tmp_path / "data", world_module, infos)


def run(tool, world, *options):
    info_file = world.module.write_infos(world.root / "infos.pkl", world.infos)
    out = world.root / "problems.json"
    code = tool.main([str(info_file), "--workers", "1", "--compare-every", "1", "--json", str(out), *options])
    return code, json.loads(out.read_text())


@pytest.mark.parametrize("dataset", ["occ3d", "openocc"])
def test_a_sound_data_set_has_no_problems(tool, world, dataset, capsys):
    code, report = run(tool, world, "--dataset", dataset)
    assert code == 0 and report["problems"] == [] and report["samples"] == 5
    out = capsys.readouterr().out
    assert "30  images of 64 x 40" in out and "5  label grids of 16 x 24 x 8" in out and "no problems" in out


def cut_image(world):
    path = world.image(1, "CAM_BACK")
    path.write_bytes(path.read_bytes()[:-400])


def no_image(world):
    world.image(1, "CAM_BACK").write_bytes(b"<html>not found</html>")


def grey_image(world):
    Image.new("L", (64, 40)).save(world.image(1, "CAM_BACK"))


def small_image(world):
    Image.new("RGB", (48, 36)).save(world.image(1, "CAM_BACK"))


def cut_lidar(world):
    world.lidar(1).write_bytes(world.lidar(1).read_bytes()[:-3])


def empty_lidar(world):
    world.lidar(1).write_bytes(b"")


def wild_lidar(world):
    points = np.fromfile(world.lidar(1), "<f4").reshape(-1, 5)
    points[3, 1], points[5, 0] = np.nan, 1e9
    points.tofile(world.lidar(1))


def remove(kind):
    def damage(world):
        {"image": world.image(1, "CAM_BACK"), "lidar": world.lidar(1), "labels": world.labels(1)}[kind].unlink()
    return damage


def cut_labels(world):
    world.labels(1).write_bytes(world.labels(1).read_bytes()[:-10])


def flip_byte(world):
    data = bytearray(world.labels(1).read_bytes())
    data[200] ^= 0xFF
    world.labels(1).write_bytes(data)


def labels_with(**arrays):
    return lambda world: world.change_labels(1, **arrays)


def label_out_of_range(world):
    grid = np.load(world.labels(1))["semantics"]
    grid[0, 0, 0], grid[1, 0, 0] = 18, 254
    world.change_labels(1, semantics=grid)


def coarse_with(change):
    def damage(world):
        path = world.labels(1).with_name("labels_1_2.npz")
        change(path)
    return damage


def wrong_coarse(path):
    grid = np.load(path)["semantics"]
    grid[0, 0, 0] = 5
    np.savez_compressed(path, semantics=grid, flow=grid)


def record_with(**changes):
    return lambda world: world.infos[1].update(changes)


def camera_with(**changes):
    return lambda world: world.infos[1]["cams"]["CAM_BACK"].update(changes)


DAMAGE = [
    (remove("image"), "missing file", "CAM_BACK: file not found"),
    (remove("lidar"), "missing file", "samples/0-1.bin"),
    (remove("labels"), "missing file", "gts/scene-0/0-1/labels.npz"),
    (record_with(lidar_path=None), "missing file", "no lidar_path"),
    (cut_image, "unreadable file", "CAM_BACK_0-1.jpg: OSError: image file is truncated"),
    (no_image, "unreadable file", "CAM_BACK_0-1.jpg: UnidentifiedImageError"),
    (grey_image, "wrong shape or size", "expected 3 colour channels, found 1"),
    (small_image, "wrong shape or size", r"image of \[48, 36\], most are \[64, 40\]"),
    (cut_lidar, "wrong shape or size", "797 bytes, expected a multiple of 20"),
    (empty_lidar, "wrong shape or size", "0 bytes"),
    (wild_lidar, "values", "2 of 40 points"),
    (cut_labels, "unreadable file", "labels.npz: not a readable .npz file"),
    (flip_byte, "unreadable file", "labels.npz: not a readable .npz file"),
    (labels_with(mask_camera=None), "missing entry", r"no \['mask_camera'\]; found \['mask_lidar', 'semantics'\]"),
    (labels_with(semantics=None), "missing entry", r"no \['semantics'\]"),
    (labels_with(semantics=np.zeros((16, 24), np.uint8)), "wrong shape or size", r"multiples of 8, found \[16, 24\]"),
    (labels_with(semantics=np.zeros((16, 24, 8))), "wrong dtype", "whole numbers, found float64"),
    (labels_with(semantics=np.full((16, 24, 8), 17, np.uint8)), "labels", "every voxel is free"),
    (label_out_of_range, "labels", r"2 voxels hold \[18, 254\]; occ3d has 0..17 and 255"),
    (labels_with(mask_lidar=np.zeros((16, 24, 4), np.uint8)), "wrong shape or size", r"mask_lidar: .* \[16, 24, 4\]"),
    (labels_with(mask_lidar=np.full((16, 24, 8), 2, np.uint8)), "values", r"mask_lidar: .* found 2\.\.2"),
    (labels_with(mask_lidar=np.zeros((16, 24, 8))), "wrong dtype", "mask_lidar"),
    (coarse_with(wrong_coarse), "coarse labels", "labels_1_2.npz: semantics: 1 of 384 voxels differ"),
    (coarse_with(Path.unlink), "coarse labels", "2 of 3 coarse label files"),
    (coarse_with(lambda path: path.write_bytes(b"PK")), "unreadable file", "labels_1_2.npz"),
    (record_with(lidar2ego_rotation=[2.0, 0, 0, 0]), "calibration", "lidar2ego_rotation: .* not a unit quaternion"),
    (record_with(lidar2ego_translation=[0.9, 0.0, 180.0]), "calibration", "farther than 10 m"),
    (record_with(ego2global_rotation=[np.nan, 0, 0, 0]), "poses", "ego2global_rotation"),
    (record_with(ego2global_translation=[1.0, 2.0]), "poses", "not a position"),
    (record_with(ego2global_translation=[500.0, 5.0, 0.5]), "poses", "moved at 500 m/s"),
    (record_with(can_bus=np.full(18, np.inf)), "record", "can_bus"),
    (camera_with(sensor2ego_rotation=[0.5, 0.5, 0.5, 0.6]), "calibration", "CAM_BACK: sensor2ego_rotation"),
    (camera_with(sensor2lidar_rotation=np.diag([1.0, 1.0, -1.0])), "calibration", "not orthonormal"),
    (camera_with(cam_intrinsic=np.eye(3) * 2), "calibration", "not a pinhole matrix"),
    (camera_with(cam_intrinsic=np.eye(4)), "calibration", "not a finite 3x3 matrix"),
    (camera_with(cam_intrinsic=np.array([[30.0, 0, 99], [0, 31, 20], [0, 0, 1]])), "calibration", "outside of the im"),
    (camera_with(timestamp=1_700_000), "time", r"CAM_BACK: taken \+0\.700 s"),
    (camera_with(timestamp="soon"), "record", "TypeError"),
    (lambda world: world.infos[1]["cams"].pop("CAM_BACK"), "record", r"cameras \['CAM_BACK'\] are missing"),
    (record_with(prev=""), "sequence", "prev is empty within scene scene-0"),
    (record_with(prev="0-7"), "sequence", "prev is 0-7, but the frame before is 0-0"),
    (lambda world: world.infos.pop(0), "sequence", "first frame of scene scene-0 has prev '0-0'"),
    (record_with(scene_token="scene-9", prev=""), "sequence", "scene scene-0 goes on after frames of another scene"),
    (record_with(timestamp=0), "time", "0.000 s after the frame before"),
    (lambda world: world.infos[4].update(timestamp=300_000_000), "time", "s after the frame before"),
    (lambda world: world.infos.append(world.infos[1]), "record", "the token occurs 2 times"),
]


@pytest.mark.parametrize("damage, kind, message", DAMAGE)
def test_damage_is_found(tool, world, damage, kind, message):
    damage(world)
    code, report = run(tool, world)
    assert code == 1
    found = [problem for problem in report["problems"] if problem["kind"] == kind]
    assert found and any(re.search(message, problem["detail"]) for problem in found), report["problems"]
    assert all(problem["token"] in {info["token"] for info in world.infos} for problem in report["problems"])
    assert sum(report["counts"].values()) == len(report["problems"])


@pytest.mark.parametrize("arrays, kind, message", [
    ({"flow": np.zeros((16, 24, 8, 3), np.float32)}, "wrong shape or size", "flow: expected [16, 24, 8, 2]"),
    ({"flow": np.zeros((16, 24, 8, 2), np.int32)}, "wrong dtype", "flow: expected floating-point"),
    ({"flow": np.full((16, 24, 8, 2), np.nan, np.float16)}, "values", "3072 voxels are not finite"),
    ({"flow": np.full((16, 24, 8, 2), 130.0, np.float32)}, "values", "faster than 100 m/s"),
    ({"flow": None}, "missing entry", "no ['flow']"),
    ({"semantics": np.full((16, 24, 8), 17, np.uint8)}, "labels", "openocc has 0..16"),
])
def test_damage_of_flow_labels_is_found(tool, world, arrays, kind, message):
    world.change_labels(2, "openocc_v2", **arrays)
    code, report = run(tool, world, "--dataset", "openocc")
    assert code == 1 and report["counts"] == {kind: 1}
    assert report["problems"][0]["token"] == "0-2" and message in report["problems"][0]["detail"]
    assert run(tool, world, "--dataset", "occ3d")[0] == 0


def test_parts_can_be_left_out(tool, world):
    for index in range(5):
        world.lidar(index).unlink()
        shutil.rmtree(world.labels(index).parent)
        world.image(index, "CAM_FRONT").unlink()
    assert run(tool, world, "--skip", "lidar", "labels", "images")[0] == 0
    assert run(tool, world, "--skip", "lidar")[1]["counts"] == {"missing file": 10}


def test_without_any_coarse_files_there_is_no_problem(tool, world, capsys):
    for path in world.root.rglob("labels_1_*.npz"):
        path.unlink()
    assert run(tool, world)[0] == 0
    assert "no coarse label files: they are computed while loading" in capsys.readouterr().out


def test_coarse_labels_are_compared_in_some_samples_only(tool, world):
    coarse_with(wrong_coarse)(world)
    assert run(tool, world, "--compare-every", "2")[0] == 0
    assert run(tool, world, "--compare-every", "0")[0] == 0
    assert run(tool, world, "--skip", "coarse")[0] == 0
    assert run(tool, world)[1]["counts"] == {"coarse labels": 1}


def test_problems_are_grouped_and_shortened(tool, world, capsys):
    for index in range(4):
        world.lidar(index).unlink()
    cut_image(world)
    run(tool, world, "--show", "2")
    out = capsys.readouterr().out
    assert out.index("missing file:") < out.index("unreadable file:")
    assert "... and 2 more (--json FILE lists all)" in out
    table = {line[:24].strip(): line[24:].split() for line in out.splitlines() if line[:24].strip() in check.KINDS}
    assert table["missing file"] == ["4", "4"] and table["unreadable file"] == ["1", "1"] and len(table) == 13


def test_an_unusable_info_file_is_an_error(tool, tmp_path, capsys):
    (tmp_path / "bad.pkl").write_bytes(b"hello")
    assert tool.main([str(tmp_path / "bad.pkl")]) == 2
    assert "error: info file" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"skip: \['wheels'\] unknown"):
        check.SampleCheck("x.pkl", skip=("wheels",))
    with pytest.raises(ValueError, match="not a known label set"):
        check.SampleCheck("x.pkl", "kitti")


def test_an_interruption_is_told(tool, world, monkeypatch, capsys):
    done, real = [], check.check_sample

    def stop_at_two(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(check, "check_sample", stop_at_two)
    code, report = run(tool, world)
    assert code == 130 and report["samples"] == 2 and report["interrupted"]
    assert "2 of 5 samples" in capsys.readouterr().out


def test_command_line_with_two_processes(world):
    world.lidar(4).unlink()
    info_file = world.module.write_infos(world.root / "infos.pkl", world.infos)
    finished = subprocess.run([sys.executable, str(ROOT / "tools/check_data.py"), info_file.name, "--workers", "2"],
                              cwd=world.root, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "1-1: file not found: samples/1-1.bin" in finished.stdout


def test_the_real_frames_are_sound_but_for_files_that_are_not_there(tool, shared, tmp_path):
    for name, missing in (("real", 4), ("pseudo_seq", 3)):
        info_file = shared / f"data/nuscenes_real/stcocc-nuscenes_infos_{name}.pkl"
        out = tmp_path / f"{name}.json"
        assert tool.main([str(info_file), "--workers", "1", "--json", str(out)]) == 1
        assert json.loads(out.read_text())["counts"] == {"missing file": missing}
