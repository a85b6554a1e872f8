"""tools/visualize.py from the command line: pictures, comparison, animation, errors in one line."""

import pickle
import shutil

import numpy as np
import pytest
from loading import load_tool
from PIL import Image

from mmdet3d.datasets.converters.multiscale_gt import downsample_labels
from mmdet3d.datasets.synthetic.prepare import prepare_dataset
from mmdet3d.datasets.synthetic.scene import WorldSettings


@pytest.fixture(scope="module")
def tool():
    return load_tool("visualize")


@pytest.fixture(scope="module")
def infos(tmp_path_factory):
    settings = WorldSettings(("scene-0061",), frames=2, image_size=(64, 36))
    return prepare_dataset(tmp_path_factory.mktemp("world"), settings)["train"]


def records(infos):
    return sorted(pickle.loads(infos.read_bytes())["infos"], key=lambda info: info["timestamp"])


def write_predictions(infos, folder, side=(1, 1, 1), nested=True):
    for info in records(infos):
        scene, token = info["occ_path"].split("/")[-2:]
        with np.load(infos.parent / "openocc_v2" / scene / token / "labels.npz") as file:
            semantics = downsample_labels(file["semantics"], side, 16)
        path = folder / scene / f"{token}.npz" if nested else folder / f"{token}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, semantics=semantics, flow=np.zeros((*semantics.shape, 2), np.float16))


@pytest.mark.parametrize("dataset", ["openocc", "occ3d"])
def test_draws_a_sample(tool, infos, tmp_path, capsys, dataset):
    common = ["--infos", str(infos), "--index", "1", "--width", "320", "--dataset", dataset]
    assert tool.main([*common, "--out", str(tmp_path / "plain")]) == 0
    token = records(infos)[1]["token"]
    path = tmp_path / "plain/scene-0061" / f"{token}.png"
    assert capsys.readouterr().out == f"{path}\n"
    plain = np.asarray(Image.open(path))
    assert plain.shape[1] == 320
    for option in ("--points", "--voxels"):
        assert tool.main([*common, option, "--out", str(tmp_path / option)]) == 0
        drawn = np.asarray(Image.open(tmp_path / option / "scene-0061" / f"{token}.png"))
        assert drawn.shape == plain.shape and (drawn != plain).any()


@pytest.mark.parametrize("side, nested", [((1, 1, 1), True), ((5, 5, 2), False)])
def test_compares_predictions_in_an_animation(tool, infos, tmp_path, side, nested):
    write_predictions(infos, tmp_path / "pred", side, nested)
    assert tool.main(["--infos", str(infos), "--count", "9", "--width", "320", "--pred", str(tmp_path / "pred"),
                      "--out", str(tmp_path / "out"), "--format", "jpg", "--video", str(tmp_path / "all.gif")]) == 0
    pictures = sorted((tmp_path / "out/scene-0061").iterdir())
    assert [path.suffix for path in pictures] == [".jpg", ".jpg"]
    with Image.open(tmp_path / "all.gif") as video, Image.open(pictures[0]) as picture:
        assert video.n_frames == 2 and video.size == picture.size and video.info["duration"] == 500


def test_errors_are_one_line(tool, infos, tmp_path, capsys):
    def error(*options):
        assert tool.main(["--infos", str(infos), "--width", "320", "--out", str(tmp_path / "out"), *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    assert "--index 7: " in error("--index", "7") and "samples 0 to 1" in error("--index", "7")
    assert "has no prediction: neither" in error("--pred", str(tmp_path))
    write_predictions(infos, tmp_path / "odd")
    name = f"scene-0061/{records(infos)[0]['token']}.npz"
    np.savez(tmp_path / "odd" / name, semantics=np.zeros((30, 40, 8), np.uint8))
    assert "(30, 40, 8) voxels cannot be compared" in error("--pred", str(tmp_path / "odd"))
    np.savez(tmp_path / "odd" / name, other=np.zeros(3))
    assert "expected whole numbers 'semantics'" in error("--pred", str(tmp_path / "odd"))
    assert "info file not found" in error("--infos", str(tmp_path / "none.pkl"))
    shutil.copytree(infos.parent, tmp_path / "moved", ignore=shutil.ignore_patterns("openocc_v2", "*.bin"))
    moved = ["--infos", str(tmp_path / "moved" / infos.name)]
    assert "labels.npz" in error(*moved) and "pcd.bin" in error(*moved, "--points", "--dataset", "occ3d")
    with pytest.raises(SystemExit):
        tool.main(["--infos", str(infos), "--video", "x.mp4"])
    assert "--video writes GIF files" in capsys.readouterr().err
