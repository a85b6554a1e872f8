"""tools/infer.py with a stub model: files, summary, reproducibility, errors without a traceback."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loading import load_tool
from PIL import Image
from torch import nn

import mmdet3d.models

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))

import data_world  # noqa: E402

CONFIG = """
data_config = dict(cams=["CAM_FRONT", "CAM_BACK"], input_size=(32, 64))
point_cloud_range = [-6.0, -5.0, -1.0, 6.0, 5.0, 3.0]
model = dict(type="Stub", occupancy_head=dict(num_classes=17))
data = dict(test=dict(dataset_name="openocc"))
"""


class Stub(nn.Module):
    """Random labels and flow, which depend on the seed of the sample like the noise of a flow head."""

    def __init__(self, cfg=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def run(self, img_inputs, img_metas, memory):
        generator = torch.Generator().manual_seed(img_metas[0]["noise_seed"])
        return SimpleNamespace(memory=None, semantics=torch.randint(0, 17, (1, 12, 10, 4), generator=generator).byte(),
                               flow=torch.randn(1, 12, 10, 4, 2, generator=generator).half()), None

    def decode(self, prediction):
        return prediction.semantics, prediction.flow


@pytest.fixture(scope="module")
def infer():
    return load_tool("infer")


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setattr(mmdet3d.models, "build_model", Stub)
    (tmp_path / "tiny.py").write_text(CONFIG)
    info_file = data_world.make_world(tmp_path / "drive", lengths=(3,))
    return [str(tmp_path / "tiny.py"), "--infos", str(info_file), "--device", "cpu", "--out", str(tmp_path / "out")]


def test_predictions_pictures_and_summary(infer, setup, tmp_path, capsys):
    assert infer.main([*setup, "--limit", "2"]) == 0
    folder = tmp_path / "out" / "scene-0"
    names = [f"scene-0-{frame}.{kind}" for frame in (0, 1) for kind in ("npz", "png")]
    assert sorted(p.name for p in folder.iterdir()) == names
    with np.load(folder / "scene-0-1.npz") as saved:
        assert saved["semantics"].shape == (12, 10, 4) and saved["semantics"].dtype == np.uint8
        assert saved["flow"].shape == (12, 10, 4, 2) and saved["flow"].dtype == np.float16
    assert Image.open(folder / "scene-0-1.png").width > 1000
    text = capsys.readouterr().out
    assert str(folder / "scene-0-0.png") in text and "weights are random" in text and "2 frames on cpu" in text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["random_weights"] and summary["dataset_name"] == "openocc" and summary["device"] == "cpu"
    assert [frame["token"] for frame in summary["frames"]] == ["scene-0-0", "scene-0-1"]
    assert Path(summary["frames"][0]["picture"]).is_file() and summary["frames"][0]["occupied_voxels"] > 0


def test_a_frame_depends_on_the_seed_and_itself(infer, setup, tmp_path):
    def semantics(*extra):
        assert infer.main([*setup, "--no-picture", *extra]) == 0
        with np.load(tmp_path / "out" / "scene-0" / "scene-0-0.npz") as saved:
            return saved["semantics"]

    first, again, other = semantics(), semantics("--limit", "1"), semantics("--limit", "1", "--seed", "9")
    assert (first == again).all() and (first != other).any()
    assert not list((tmp_path / "out").rglob("*.png"))


def test_without_infos_a_small_data_set_is_made_once(infer, setup, tmp_path, monkeypatch, capsys):
    made = []

    def prepare(folder, settings, workers, on_frame):
        made.append(settings.frames)
        data_world.make_world(folder, lengths=(2,)).rename(folder / "stcocc-nuscenes_infos_val.pkl")

    monkeypatch.setattr("mmdet3d.datasets.synthetic.prepare.prepare_dataset", prepare)
    monkeypatch.setattr(infer, "ROOT", tmp_path)
    arguments = [argument for argument in setup if argument not in setup[1:3]]
    for _ in range(2):
        assert infer.main([*arguments, "--no-picture"]) == 0
    assert made == [4] and "making a small synthetic data set" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["infos"] == str(tmp_path / "data/synthetic-small/stcocc-nuscenes_infos_val.pkl")


def test_errors_are_one_line(infer, setup, tmp_path, capsys):
    def error(*arguments):
        assert infer.main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    rest = setup[1:]
    assert "config file not found: none.py" in error("none.py", *rest)
    assert "info file not found" in error(*setup, "--infos", str(tmp_path / "none.pkl"))
    assert "none.pth" in error(*setup, "--checkpoint", str(tmp_path / "none.pth"))
    assert "'warp' is not a device" in error(*setup, "--device", "warp")
    (tmp_path / "drive/samples/CAM_BACK_scene-0-0.png").write_bytes(b"broken")
    assert "sample scene-0-0, CAM_BACK: cannot read image" in error(*setup)
    with pytest.raises(ValueError, match="not a device"):
        infer.main([*setup, "--device", "warp", "--debug"])
    with pytest.raises(SystemExit, match="2"):
        infer.main([*setup, "--limit", "0"])
    with pytest.raises(SystemExit, match="2"):
        infer.main([*setup, "--averaged"])


@pytest.mark.parametrize("change", [{"token": "../../evil"}, {"occ_path": "gts/../scene-0-0"}, {"token": "a b"}])
def test_names_of_an_info_file_cannot_lead_elsewhere(infer, setup, tmp_path, capsys, change):
    infos = pickle.loads((tmp_path / "drive" / "infos.pkl").read_bytes())["infos"]
    infos[0].update(change)
    path = tmp_path / "drive" / "evil.pkl"
    path.write_bytes(pickle.dumps({"infos": infos}))
    before = sorted(tmp_path.rglob("*.npz"))
    assert infer.main([*setup, "--infos", str(path)]) == 2
    assert "cannot be used as a file name" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*.npz")) == before
