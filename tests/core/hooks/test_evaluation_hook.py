"""Evaluation and pictures during training: what they log and write, and that the training does not notice them."""

import json
import logging

import evaluation_case as case
import pytest
import torch
from mmcv.runner import LoggerHook
from PIL import Image

from mmdet3d.core.evaluation import Evaluator, EvaluatorOptions
from mmdet3d.core.hooks.ema import MEGVIIEMAHook
from mmdet3d.core.hooks.evaluation import build_evaluation_hook
from mmdet3d.core.hooks.pictures import PictureDrawer
from mmdet3d.core.runner import TrainRunner
from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.loader import build_dataloader
from mmdet3d.models import build_model
from mmdet3d.registry import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cfg(tiny_world):
    made = case.config(tiny_world)
    made.evaluation = {"interval": 2, "pictures": {"samples": [4], "history": 1, "width": 480}}
    return made


def config(cfg, **evaluation):
    changed = cfg.copy()
    changed.evaluation = evaluation
    return changed


def train(cfg, work_dir, hook=None, iterations=3, ema=False):
    """Losses of each iteration, and the runner."""
    torch.manual_seed(0)
    model = build_model(cfg.model).train()
    loader = build_dataloader(build_dataset(cfg.data.train), 1, 0, training=True)
    runner = TrainRunner(model, torch.optim.AdamW(model.parameters(), lr=1e-3), logger=logging.getLogger("test"),
                         work_dir=work_dir, max_iters=iterations)
    runner.timestamp = "log"
    averages = [{"type": "MEGVIIEMAHook", "init_updates": 1000}] if ema else []
    runner.register_training_hooks(
        {"policy": "fixed"}, {}, None, {"interval": 2, "hooks": [{"type": "TextLoggerHook"}]},
        custom_hooks_config=averages)
    losses = Losses()
    runner.register_hook(losses, "VERY_LOW")
    if hook is not None:
        runner.register_hook(hook, "LOW")
    runner.run([loader])
    return losses.values, runner


class Losses(LoggerHook):
    def __init__(self):
        super().__init__(interval=1, by_epoch=False)
        self.values, self.logged = [], []

    def after_train_iter(self, runner):
        self.values.append(runner.outputs["loss"].item().hex())

    def log(self, runner):
        self.logged.append(self.get_mode(runner))


@pytest.fixture(scope="module")
def runs(cfg, tmp_path_factory):
    """Two equal trainings, the second one with evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    hook = build_evaluation_hook(cfg)
    return train(cfg, folder / "without"), train(cfg, folder / "with", hook), hook, folder


@pytest.mark.slow
def test_the_training_does_not_notice(runs):
    (losses, plain), (others, evaluated), _, _ = runs
    assert losses == others and len(losses) == 3
    for (name, value), other in zip(plain.model.state_dict().items(), evaluated.model.state_dict().values(),
                                    strict=True):
        assert torch.equal(value, other), name
    for one, other in zip(plain.model.memory.histories, evaluated.model.memory.histories, strict=True):
        assert torch.equal(one, other)
    assert evaluated.model.training and torch.isfinite(evaluated.model.memory.histories[0]).all()


@pytest.mark.slow
def test_scores_are_those_of_the_model_and_are_logged(runs, cfg):
    _, (_, runner), hook, folder = runs
    assert hook.latest.samples == sum(case.LENGTHS)
    data = build_dataset({**cfg.data.val, "test_mode": True})
    again = Evaluator(data, EvaluatorOptions(workers_per_gpu=0)).run(runner.model)
    assert again.summary.voxels == hook.latest.summary.voxels
    lines = [json.loads(line) for line in (folder / "with/log.log.json").read_text().splitlines()]
    scores = [line for line in lines if line.get("mode") == "val"]
    assert [line["iter"] for line in scores] == [2, 3]  # every second iteration, and the last one
    assert {"RayIoU", "RayIoU@1", "mAVE", "occ_score", "voxel_mIoU", "samples"} <= set(scores[0])
    plain = [json.loads(line) for line in (folder / "without/log.log.json").read_text().splitlines()]
    values = [[line["loss"] for line in part if line.get("mode") == "train"] for part in (plain, lines)]
    assert values[0] == values[1] != []


@pytest.mark.slow
def test_pictures_are_drawn(runs, cfg):
    _, _, hook, folder = runs
    files = sorted((folder / "with/pictures").rglob("*.png"))
    token = hook.evaluator.dataset.data_infos[4]["token"]
    assert [path.stem for path in files] == [token, token]
    assert {path.parents[1].name for path in files} == {"iter_2", "iter_3"}
    with Image.open(files[0]) as picture:
        assert picture.width == 480 and len(picture.getcolors(10**6)) > 50


@pytest.mark.slow
def test_averaged_weights_are_evaluated_when_asked_for(cfg, tmp_path):
    hook = build_evaluation_hook(config(cfg, interval=-1, use_ema=True))
    _, runner = train(cfg, tmp_path, hook, iterations=2, ema=True)
    average = next(entry for entry in runner.hooks if isinstance(entry, MEGVIIEMAHook)).state_dict()
    model = hook._copy(runner, torch.device("cpu"))
    raw = runner.model.state_dict()
    name = "occupancy_head.predicter.0.weight"
    assert torch.equal(model.state_dict()[name], average[name]) and not torch.equal(average[name], raw[name])
    assert hook.latest.samples == sum(case.LENGTHS)


def test_averaged_weights_need_their_hook(cfg, tmp_path):
    hook = build_evaluation_hook(config(cfg, use_ema=True))
    with pytest.raises(ConfigError, match="evaluation.use_ema: the config has no hook that averages weights"):
        train(cfg, tmp_path, hook, iterations=1)


def test_intervals(cfg):
    assert build_evaluation_hook(config(cfg, interval=7)).interval == 7
    assert build_evaluation_hook(config(cfg)).interval == cfg.checkpoint_config.interval != 24
    inherited = config(cfg, interval=24, pipeline=[{"type": "LoadPointsFromFile"}])
    assert build_evaluation_hook(inherited).interval == cfg.checkpoint_config.interval
    drawn = build_evaluation_hook(config(cfg, interval=7, pictures={"interval": 3}))
    assert (drawn.interval, drawn.picture_interval) == (7, 3) and drawn.pictures.samples == (0,)


@pytest.mark.parametrize("options, message", [
    ({"intervall": 3}, r"evaluation: unknown \['intervall'\] \(did you mean 'interval'\?\)"),
    ({"interval": 0}, "evaluation.interval: expected a positive whole number"),
    ({"order": "any"}, "evaluation: order: expected one of"),
    ({"pictures": {"samples": [99]}}, r"evaluation.pictures: samples: \[99\] are not among the 9 samples"),
    ({"pictures": {"size": 1}}, "evaluation.pictures: unknown"),
    ({"pictures": {"history": -1}}, "expected history of at least 0"),
])
def test_wrong_options_are_refused(cfg, options, message):
    with pytest.raises(ConfigError, match=message):
        build_evaluation_hook(config(cfg, **options))


def test_samples_by_token(cfg, tiny_world):
    data = case.dataset(tiny_world)
    token = data.data_infos[5]["token"]
    assert PictureDrawer(data, [token, 1]).samples == (5, 1)
    with pytest.raises(ValueError, match="expected a list of numbers or tokens"):
        PictureDrawer(data, token)
