"""Building a model for use, the settings that frames follow, and running frame after frame, with a stub model."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmcv import Config
from torch import nn

import mmdet3d.models
from mmdet3d.apis.inference import (
    FrameSettings,
    _predictor_of,
    choose_device,
    init_model,
    load_config,
    open_frames,
    predict,
)
from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.labels import OCC3D, OPENOCC

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))

import data_world  # noqa: E402

CONFIG = """
data_config = dict(cams=["CAM_FRONT", "CAM_BACK"], Ncams=2, input_size=(32, 64))
point_cloud_range = [-6.0, -5.0, -1.0, 6.0, 5.0, 3.0]
model = dict(type="Stub", occupancy_head=dict(num_classes=17))
data = dict(test=dict(dataset_name="openocc", stereo=True, multi_adj_frame_id_cfg=(1, 2, 1)))
"""


class Stub(nn.Module):
    """Counts the frames of a sequence in its memory and writes the count into the grid."""

    def __init__(self, cfg=None):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def run(self, img_inputs, img_metas, memory):
        assert not torch.is_grad_enabled() and not self.training
        assert img_inputs[0].device == self.weight.device
        count = 1 if memory is None or img_metas[0]["start_of_sequence"] else memory.count + 1
        return SimpleNamespace(memory=SimpleNamespace(count=count, batch_size=1)), None

    def decode(self, prediction):
        grid = torch.full((1, 12, 10, 4), prediction.memory.count, dtype=torch.uint8)
        return grid, torch.zeros(*grid.shape, 2, dtype=torch.float16)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(mmdet3d.models, "build_model", Stub)
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def test_random_weights_are_seeded_and_flagged(config):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = init_model(config), init_model(str(config)), init_model(config, seed=1)
    assert first.random_weights and not first.training
    assert torch.equal(first.weight, second.weight) and not torch.equal(first.weight, other.weight)
    assert first.cfg.model.type == "Stub"
    assert torch.equal(torch.rand(1), expected)  # the global state was left alone


def test_checkpoint_is_loaded_strictly(config, tmp_path):
    torch.save({"state_dict": {"weight": torch.tensor([1.0, 2.0, 3.0])}}, tmp_path / "good.pth")
    torch.save({"state_dict": {"weight": torch.zeros(3), "other": torch.zeros(1)}}, tmp_path / "bad.pth")
    model = init_model(config, tmp_path / "good.pth", device="cpu")
    assert model.weight.tolist() == [1.0, 2.0, 3.0] and not model.random_weights
    with pytest.raises(RuntimeError, match="bad.pth"):
        init_model(config, tmp_path / "bad.pth")


def test_frames_stream_through_the_model(config, tmp_path, device):
    info_file = data_world.make_world(tmp_path / "drive", lengths=(2,))
    model, memory, counts = init_model(config, device=device), None, []
    for frame in open_frames(model, info_file):
        result, memory = predict(model, frame, memory)
        counts.append((result["index"], int(result["occ_results"][0, 0, 0, 0]), frame.img_inputs[0].shape))
    assert counts == [([0], 1, (1, 6, 3, 32, 64)), ([1], 2, (1, 6, 3, 32, 64))]
    alone, _ = predict(model, (frame.img_inputs, frame.img_metas))
    assert alone["occ_results"].max() == 1


def test_settings_of_a_config():
    settings = FrameSettings.from_config(Config.fromstring(CONFIG, ".py"))
    assert settings.labels is OPENOCC and settings.offsets == (1, 2)
    assert settings.point_cloud_range == (-6, -5, -1, 6, 5, 3)
    step = {"type": "PrepareImageInputs", "data_config": {"input_size": (1, 2)}}
    settings = FrameSettings.from_config({
        "grid_config": {"x": [-4, 4, 1], "y": [-3, 3, 1], "z": [-1, 2, 1]},
        "model": {"occupancy_head": {"num_classes": 18}}, "data": {"test": {"pipeline": [step], "stereo": False}}})
    assert settings.labels is OCC3D and settings.offsets == (1,)
    assert settings.data_config == {"input_size": (1, 2)} and settings.point_cloud_range == (-4, -3, -1, 4, 3, 2)


@pytest.mark.parametrize("drop, change, message", [
    ("data_config", {}, "neither data_config nor a PrepareImageInputs"),
    ("point_cloud_range", {}, "neither point_cloud_range nor grid_config"),
    ("model", {"data": {}}, "neither data.test.dataset_name nor"),
    (None, {"model": {"occupancy_head": {"num_classes": 18}}}, "num_classes is 18, but dataset_name 'openocc' has 17"),
    (None, {"data": {"test": {"dataset_name": "kitti"}}}, "dataset_name: 'kitti' is not a known label set"),
])
def test_what_a_config_lacks(drop, change, message):
    cfg = {**Config.fromstring(CONFIG, ".py")._cfg_dict.to_dict(), **change}
    cfg.pop(drop, None)
    with pytest.raises(ValueError, match=message):
        FrameSettings.from_config(cfg)


def test_errors_before_anything_is_built(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="config file not found: .*none.py"):
        load_config(tmp_path / "none.py")
    with pytest.raises(ValueError, match="the key 'model' is missing"):
        init_model(Config({}))
    with pytest.raises(ValueError, match="'tpu9' is not a device"):
        choose_device("tpu9")
    with pytest.raises(ValueError, match=r"'cuda:99' is not there; PyTorch sees \d+ CUDA devices"):
        init_model(config, device="cuda:99")
    with pytest.raises(DataError, match="info file not found"):
        open_frames(load_config(config), tmp_path / "none.pkl")


def test_changed_weights_are_noticed(config, tmp_path):
    model = init_model(config, device="cpu")
    first = _predictor_of(model)
    assert _predictor_of(model) is first
    model.load_state_dict({"weight": torch.ones(3)})
    second = _predictor_of(model)
    assert second is not first and second.model.weight.tolist() == [1, 1, 1]
    model.load_state_dict({"weight": torch.zeros(3)}, assign=True)
    assert _predictor_of(model).model.weight.tolist() == [0, 0, 0]
    model.weight.data = torch.full((3,), 2.0)
    assert _predictor_of(model).model.weight.tolist() == [2, 2, 2]
    with torch.inference_mode():
        other = init_model(config, device="cpu")
    assert _predictor_of(other) is _predictor_of(other)
