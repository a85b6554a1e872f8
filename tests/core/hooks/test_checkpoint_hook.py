"""Names, times and number of checkpoints."""

import pytest
import training_run

from mmdet3d.core.checkpoint_files import list_checkpoints
from mmdet3d.core.hooks.builder import build_hook
from mmdet3d.core.hooks.checkpoint import CheckpointHook
from mmdet3d.registry import ConfigError
from mmdet3d.utils.checkpoint import read_checkpoint


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_names_and_the_last_iteration(tmp_path):
    training_run.start(tmp_path, max_iters=7, interval=3)
    assert names(tmp_path) == ["iter_3.pth", "iter_6.pth", "iter_7.pth"]
    assert [read_checkpoint(path)["meta"]["iter"] for path in list_checkpoints(tmp_path)] == [2, 5, 6]


def test_keep_the_last(tmp_path):
    training_run.start(tmp_path, max_iters=7, interval=2, keep=2)
    assert names(tmp_path) == ["iter_6.pth", "iter_7.pth"]
    assert (tmp_path / "latest.pth").resolve().name == "iter_7.pth"
    assert sorted(path.name for path in tmp_path.glob("*_ema.pth")) == ["iter_4_ema.pth", "iter_7_ema.pth"]


def test_only_the_last(tmp_path):
    training_run.start(tmp_path, max_iters=3, interval=-1)
    assert names(tmp_path) == ["iter_3.pth"]


def test_a_checkpoint_waits_for_the_step(tmp_path):
    training_run.start(tmp_path, max_iters=8, interval=2, cumulative_iters=3)
    assert names(tmp_path) == ["iter_3.pth", "iter_6.pth", "iter_8.pth"]
    steps = [read_checkpoint(path)["optimizer"]["state"][0]["step"] for path in list_checkpoints(tmp_path)]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("options, message", [
    ({"interval": 0}, "interval: expected a positive"), ({"max_keep_ckpts": -2}, "max_keep_ckpts"),
    ({"interval": 2.5}, "2.5"), ({"by_epoch": True}, "by_epoch"), ({"intervall": 3}, "intervall")])
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        build_hook({"type": "CheckpointHook", **options}, "checkpoint_config")
    assert type(build_hook({"type": "CheckpointHook"}, "checkpoint_config")) is CheckpointHook
