"""Losses that are not finite: a report, then a stop, or the iteration counts for nothing."""

import json

import pytest
import torch
import training_run

from mmdet3d.core.hooks.builder import build_hook
from mmdet3d.core.hooks.finite_loss import FiniteLossHook, NonFiniteLossError
from mmdet3d.registry import ConfigError
from mmdet3d.utils.checkpoint import read_checkpoint


def bad_frame(seed=0):
    """The sample of the third iteration."""
    sampler = training_run.build_dataloader(training_run.SmallSequences(), 1, 0, training=True, seed=seed)
    batches = iter(sampler.sequence_sampler)
    return [next(batches) for _ in range(3)][-1][0]


def reports(folder):
    return sorted(path.name for path in (folder / "nonfinite").iterdir())


def test_stops_with_a_report(tmp_path):
    bad = bad_frame()
    with pytest.raises(NonFiniteLossError, match="iteration 2: not finite: loss_a, loss_b, number, loss; see .*json"):
        training_run.start(tmp_path, nan_at=[bad])
    assert reports(tmp_path) == ["iter_2_rank_0.json", "iter_2_rank_0.pth"]
    text = json.loads((tmp_path / "nonfinite/iter_2_rank_0.json").read_text())
    assert text["samples"] == [{"sample_idx": f"frame-{bad}", "index": str(bad),
                                "scene_name": text["samples"][0]["scene_name"]}]
    assert text["nonfinite_losses"] == ["loss_a", "loss_b", "number", "loss"] and text["own_loss"] == "nan"
    assert text["nonfinite_inputs"] == ["img_inputs[0]"]
    assert text["nonfinite_weights"] == ["norm.running_mean", "norm.running_var"]
    batch = torch.load(tmp_path / "nonfinite/iter_2_rank_0.pth", weights_only=True)["batch"]
    assert batch["img_inputs"][0].shape == (1, 2, 3, 4) and batch["img_inputs"][0].isnan().any()
    assert batch["img_metas"][0]["sample_idx"] == f"frame-{bad}"
    assert read_checkpoint(tmp_path / "iter_2.pth")["meta"]["iter"] == 1


def test_skips_that_iteration(tmp_path):
    runner = training_run.start(tmp_path, max_iters=4, interval=1, nan_at=[bad_frame()],
                                finite_loss={"on_nonfinite": "skip"})
    before, after = (read_checkpoint(tmp_path / f"iter_{n}.pth") for n in (2, 3))
    for name, value in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], value), name  # weights and running statistics
    assert after["optimizer"]["state"][0]["step"] == 2
    hooks = after["training_state"]["hooks"]
    assert hooks["ema"]["updates"] == 12 and hooks["finite_loss"] == {"skipped": 1}
    assert after["training_state"]["sampler"]["batches"] == 3
    (folder,) = (tmp_path / "state").iterdir()
    assert folder.name.startswith("iter_4-")
    last = read_checkpoint(tmp_path / "iter_4.pth")
    assert last["optimizer"]["state"][0]["step"] == 3 and runner.iter == 4
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert runner.model.memory.histories[0].isfinite().all()
    assert reports(tmp_path) == ["iter_2_rank_0.json", "iter_2_rank_0.pth"]


def test_a_skip_drops_what_was_accumulated(tmp_path):
    training_run.start(tmp_path, max_iters=4, interval=1, cumulative_iters=2, nan_at=[bad_frame()],
                       finite_loss={"on_nonfinite": "skip"})
    content = read_checkpoint(tmp_path / "iter_4.pth")
    assert content["optimizer"]["state"][0]["step"] == 2
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_stops_after_enough_skips_also_across_a_resume(tmp_path):
    options = {"finite_loss": {"on_nonfinite": "skip", "max_skips": 3, "max_reports": 1}, "nan_at": range(14)}
    training_run.start(tmp_path, max_iters=2, **options)
    assert reports(tmp_path) == ["iter_0_rank_0.json", "iter_0_rank_0.pth"]
    with pytest.raises(NonFiniteLossError, match="iteration 3: .*after 3 skipped iterations, max_skips=3"):
        training_run.start(tmp_path, resume="latest", **options)
    assert "iter_3_rank_0.json" in reports(tmp_path) and "iter_2_rank_0.json" not in reports(tmp_path)


def test_a_large_batch_is_cut(tmp_path):
    with pytest.raises(NonFiniteLossError):
        training_run.start(tmp_path, nan_at=[bad_frame()], finite_loss={"max_batch_mb": 1e-4})
    content = torch.load(tmp_path / "nonfinite/iter_2_rank_0.pth", weights_only=True)
    assert content["left_out"] and "img_inputs[0]" in content["left_out"]
    assert content["batch"]["img_inputs"][0].startswith("left out: (1, 2, 3, 4)")


def test_a_report_that_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / "nonfinite").touch()  # a file where the folder should be
    with pytest.raises(NonFiniteLossError, match="iteration 2"):
        training_run.start(tmp_path, nan_at=[bad_frame()])


@pytest.mark.slow
def test_all_processes_do_the_same(tmp_path):
    """One process meets the bad frame; both skip, and later both stop."""
    options = {"lengths": [4, 3, 5, 2], "nan_at": [0, 7], "max_iters": 8, "interval": 1}
    done = training_run.run_script((tmp_path / "skip", {**options, "finite_loss": {"on_nonfinite": "skip"}}),
                                   (tmp_path / "stop", options), processes=2)
    assert done.returncode != 0 and done.stderr.count("NonFiniteLossError: iteration") >= 2
    skipped = read_checkpoint(tmp_path / "skip/iter_8.pth")
    count = skipped["training_state"]["hooks"]["finite_loss"]["skipped"]
    assert 0 < count < 8 and skipped["optimizer"]["state"][0]["step"] == 8 - count
    assert all(value.isfinite().all() for value in skipped["state_dict"].values())
    written = reports(tmp_path / "stop")
    assert sum(name.endswith(".json") for name in written) == 2 and sum(name.endswith(".pth") for name in written) >= 1


@pytest.mark.parametrize("options", [{"on_nonfinite": "ignore"}, {"max_skips": -1}, {"max_skip": 1}])
def test_refusals(options):
    with pytest.raises(ConfigError):
        build_hook({"type": "FiniteLossHook", **options}, "finite_loss")
    assert FiniteLossHook().on_nonfinite == "stop"
