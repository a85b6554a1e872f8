"""Averaged weights: decay law, what is averaged, files and how they go on."""

import math

import pytest
import torch
import training_run
from mmcv.runner import Hook

from mmdet3d.core.hooks.builder import build_hook
from mmdet3d.core.hooks.ema import MEGVIIEMAHook, ema_decay
from mmdet3d.registry import ConfigError
from mmdet3d.utils.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, MEGVIIEMAHook))


class Weights(Hook):
    """Keeps the weights after each iteration, and what the average should be after them."""

    def __init__(self, updates):
        self.updates, self.expected = updates, None

    def before_run(self, runner):
        self.expected = {name: value.double() for name, value in runner.model.state_dict().items()}

    def after_train_iter(self, runner):
        self.updates += 1
        decay = 0.999 * (1 - math.exp(-self.updates / 2000))
        for name, value in runner.model.state_dict().items():
            if value.is_floating_point():
                self.expected[name] = decay * self.expected[name] + (1 - decay) * value.double()


@pytest.mark.parametrize("updates, decay", [
    (10561, 0.99391520), (12000, 0.99652373), (20000, 0.99895465), (106620, 0.999)])
def test_decay(updates, decay):
    assert ema_decay(updates) == pytest.approx(decay, abs=5e-9)


def test_average_of_parameters_and_statistics(tmp_path):
    weights = Weights(1000)
    runner = training_run.start(tmp_path, max_iters=5, ema={"init_updates": 1000}, custom_hooks=[(weights, "LOWEST")])
    average = hook_of(runner).state_dict()
    assert list(average) == list(runner.model.state_dict())
    for name, value in average.items():
        torch.testing.assert_close(value.double(), weights.expected[name].double(), rtol=1e-6, atol=1e-7)
    assert average["norm.num_batches_tracked"] == 0 and runner.model.norm.num_batches_tracked == 5
    assert not torch.equal(average["norm.running_mean"], runner.model.norm.running_mean)
    assert not any(value.requires_grad for value in average.values()) and hook_of(runner).updates == 1005


@pytest.mark.parametrize("max_iters, interval, expected", [
    (9, 4, {"iter_4_ema.pth": 15, "iter_8_ema.pth": 19, "iter_9_ema.pth": 19}),
    (8, 4, {"iter_4_ema.pth": 15, "iter_8_ema.pth": 18}), (3, -1, {"iter_3_ema.pth": 13})])
def test_files(tmp_path, max_iters, interval, expected):
    """At index it (0-based) after it + 1 updates, and once at the end."""
    training_run.start(tmp_path, max_iters=max_iters, interval=-1, ema={"interval": interval})
    found = {path.name: read_checkpoint(path) for path in tmp_path.glob("*_ema.pth")}
    assert {name: content["updates"] for name, content in found.items()} == expected
    for name, content in found.items():
        assert set(content) == {"iter", "state_dict", "updates"} and name == f"iter_{content['iter']}_ema.pth"


def test_checkpoints_hold_the_average_after_the_iteration(tmp_path):
    """Although the hook that saves comes before the hook that averages."""
    runner = training_run.start(tmp_path, max_iters=2)
    names = [type(hook).__name__ for hook in runner.hooks]
    assert names.index("CheckpointHook") < names.index("MEGVIIEMAHook")
    saved = read_checkpoint(tmp_path / "iter_2.pth")["training_state"]["hooks"]["ema"]
    last = read_checkpoint(tmp_path / "iter_2_ema.pth")
    assert saved["updates"] == last["updates"] == 12
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in last["state_dict"].items())
    load_checkpoint(runner.model, tmp_path / "iter_2.pth", averaged=True)
    assert all(torch.equal(last["state_dict"][name], value) for name, value in runner.model.state_dict().items())


def test_published_behaviour_on_resume(tmp_path):
    """With the option the average begins anew with the resumed weights."""
    training_run.start(tmp_path, max_iters=2)
    runner = training_run.start(tmp_path, max_iters=4, resume="latest", ema={"restart_on_resume": True})
    assert hook_of(runner).updates == 12
    runner = training_run.start(tmp_path, max_iters=6, resume="latest")
    assert hook_of(runner).updates == 14


def test_starts_from_a_file(tmp_path):
    training_run.start(tmp_path / "a", max_iters=2)
    file = tmp_path / "a/iter_2_ema.pth"
    runner = training_run.start(tmp_path / "b", max_iters=2, ema={"resume": file})
    assert hook_of(runner).updates == 14
    content = read_checkpoint(file)
    content["state_dict"].pop("head.bias")
    save_checkpoint(content, file)
    with pytest.raises(CheckpointError, match="iter_2_ema.pth: .*1 entries differ: head.bias"):
        training_run.start(tmp_path / "c", max_iters=2, ema={"resume": file})


def test_accumulation_updates_with_the_steps(tmp_path):
    runner = training_run.start(tmp_path, max_iters=6, cumulative_iters=3)
    assert hook_of(runner).updates == 12


@pytest.mark.parametrize("options", [{"interval": 0}, {"decay": 1.5}, {"init_updates": -1}, {"momentum": 0.1}])
def test_refusals(options):
    with pytest.raises(ConfigError):
        build_hook({"type": "MEGVIIEMAHook", **options}, "custom_hooks[0]")
