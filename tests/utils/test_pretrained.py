"""Initial weights: a published file, ImageNet backbones under their usual names, and what is said without a file."""

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from mmcv import Config
from torch import nn

from mmdet3d.models import build_model  # noqa: F401  (registers the parts)
from mmdet3d.registry import ConfigError, build
from mmdet3d.utils.checkpoint import CheckpointError
from mmdet3d.utils.pretrained import load_backbone, load_initial_weights

PUBLISHED = Path(__file__).resolve().parents[2] / "config/stcocc/stcocc-r50-16f-openocc-12e.py"


def resnet(depth=50, **options):
    return build({"type": "ResNet", "depth": depth, "num_stages": 4, "out_indices": (0, 2, 3), "style": "pytorch",
                  "norm_cfg": {"type": "BN", "requires_grad": True}, **options})


def detector(depth=18, **options):
    model = nn.Module()
    model.forward_projection = nn.Module()
    model.forward_projection.img_backbone = resnet(depth, **options)
    model.head = nn.Linear(2, 3)
    return model


def imagenet(depth=18):
    torch.manual_seed(1)
    return getattr(torchvision.models, f"resnet{depth}")().state_dict()


def write(path, entries, **content):
    torch.save({**content, "state_dict": entries} if content else entries, path)
    return path


def test_names_of_torchvision_are_those_of_a_resnet_50(tmp_path):
    entries = imagenet(50)
    model = detector(50)
    count = load_backbone(model, write(tmp_path / "resnet50.pth", entries))
    own = model.forward_projection.img_backbone.state_dict()
    assert count == len(own) == len(entries) - 2  # without the classifier
    assert all(torch.equal(own[key], entries[key]) for key in own)


def test_a_resnet_50_computes_the_same_as_that_of_torchvision(tmp_path):
    torch.manual_seed(0)
    other = torchvision.models.resnet50().eval()
    model = detector(50)
    load_backbone(model, write(tmp_path / "a.pth", other.state_dict()))
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        x = other.maxpool(other.relu(other.bn1(other.conv1(image))))
        expected = other.layer4(other.layer3(other.layer2(other.layer1(x))))
        torch.testing.assert_close(model.forward_projection.img_backbone.eval()(image)[-1], expected, rtol=1e-4,
                                   atol=1e-5)


@pytest.mark.parametrize("prefix", ["backbone.", "img_backbone.", "forward_projection.img_backbone.",
                                    "module.backbone."])
def test_names_of_the_mmdet_family(tmp_path, prefix):
    entries = {prefix + key: value for key, value in imagenet().items() if not key.startswith("fc.")}
    others = {f"{prefix.partition('backbone')[0].replace('img_', '')}head.fc.weight": torch.ones(2)}
    model = detector()
    load_backbone(model, write(tmp_path / "a.pth", {**entries, **others}, meta={}))
    assert torch.equal(model.forward_projection.img_backbone.layer4[1].conv2.weight,
                       entries[prefix + "layer4.1.conv2.weight"])


def test_old_files_have_no_counters(tmp_path):
    entries = {key: value for key, value in imagenet().items() if "num_batches" not in key}
    assert load_backbone(detector(), write(tmp_path / "a.pth", entries)) == len(entries) - 2


def unchanged(model, function, message, error=CheckpointError):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        function()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_that_do_not_fit_change_nothing(tmp_path):
    model = detector()
    without = {key: value for key, value in imagenet().items() if not key.startswith("layer4")}
    unchanged(model, lambda: load_backbone(model, write(tmp_path / "a.pth", without)),
              "missing in the file: layer4.0.conv1.weight")
    unchanged(model, lambda: load_backbone(model, write(tmp_path / "b.pth", imagenet(50))),
              r"of another shape: .*in the file.*in the backbone|missing")
    wide = {**imagenet(), "conv1.weight": torch.zeros(64, 5, 7, 7)}
    unchanged(model, lambda: load_backbone(model, write(tmp_path / "c.pth", wide)),
              r"1 of another shape: conv1.weight \(\[64, 5, 7, 7\] in the file, \[64, 3, 7, 7\] in the backbone\)")
    unchanged(model, lambda: load_backbone(model, tmp_path / "none.pth"), "no such file")


def test_models_without_such_a_backbone(tmp_path):
    path = write(tmp_path / "a.pth", imagenet())
    with pytest.raises(ConfigError, match="Linear has no forward_projection.img_backbone"):
        load_backbone(nn.Linear(1, 1), path)
    with pytest.raises(ConfigError, match="style='pytorch', got 'caffe'"):
        load_backbone(detector(50, style="caffe"), path)


def test_published_weights_are_loaded_as_far_as_they_fit(tmp_path, caplog):
    model = detector()
    entries = {"head.weight": torch.full((3, 2), 5.0), "head.bias": torch.ones(7), "else.weight": torch.ones(1)}
    with caplog.at_level(logging.INFO):
        load_initial_weights(model, write(tmp_path / "a.pth", entries))
    assert bool(model.head.weight.eq(5).all()) and model.head.bias.shape == (3,)
    text = caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.WARNING
    assert "loaded 1 of the model's" in text and "1 unknown to the model: else.weight" in text and "head.bias" in text


def test_an_absent_file_is_explained(tmp_path, caplog):
    model = detector()
    absent = "pretrained/forward_projection-r50-4d-stereo-pretrained.pth"
    with pytest.raises(ConfigError) as error:
        load_initial_weights(model, tmp_path / absent)
    for words in (absent, "load_from=None", "init_backbone=<file>"):
        assert words in str(error.value)
    load_initial_weights(model, None)
    load_initial_weights(model, tmp_path / absent, write(tmp_path / "r18.pth", imagenet()))
    assert torch.equal(model.forward_projection.img_backbone.conv1.weight, imagenet()["conv1.weight"])
    assert "starting with the weights of init_backbone alone" in caplog.text


def test_published_weights_come_after_the_backbone(tmp_path):
    model = detector()
    key = "forward_projection.img_backbone.conv1.weight"
    published = write(tmp_path / "p.pth", {key: torch.full((64, 3, 7, 7), 2.0)})
    load_initial_weights(model, published, write(tmp_path / "r18.pth", imagenet()))
    assert bool(model.state_dict()[key].eq(2).all())
    first = model.forward_projection.img_backbone.layer1[0].conv1.weight
    assert torch.equal(first, imagenet()["layer1.0.conv1.weight"])


def test_the_published_model_takes_a_resnet_50():
    config = Config.fromfile(str(PUBLISHED)).model.forward_projection.img_backbone
    keys = build(config).state_dict().keys()
    assert {key for key in torchvision.models.resnet50().state_dict() if not key.startswith("fc.")} == set(keys)
