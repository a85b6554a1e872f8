"""A training that is interrupted and continued is the uninterrupted one, bit by bit; and what else can be resumed."""

import logging

import pytest
import torch
import training_run

from mmdet3d.core.checkpoint_files import rank_file
from mmdet3d.core.checkpointing import (
    CheckpointError,
    find_latest,
    resume_training_state,
    save_training_state,
    to_plain,
)
from mmdet3d.utils.checkpoint import read_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six iterations of the small model without a break; a checkpoint after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    training_run.start(folder)
    return folder


@pytest.fixture
def after_four(tmp_path):
    """What is left of a run that ended after four iterations."""
    training_run.start(tmp_path / "work", max_iters=4)
    return tmp_path / "work"


def assert_same(found, expected, place=""):
    assert type(found) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, place
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    else:
        assert found == expected, place


def whole_state(path):
    """Everything in a checkpoint but when it was written and the name of its folder."""
    content = read_checkpoint(path)
    folder = content["training_state"].pop("rank_folder")
    del content["meta"]["time"]
    ranks = [torch.load(rank_file(path, folder, rank), weights_only=True)
             for rank in range(content["training_state"]["world_size"])]
    return {**content, "ranks": ranks}


def change(path, function):
    content = read_checkpoint(path)
    function(content)
    save_checkpoint(content, path)


# ---- to the bit -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_model_goes_on_to_the_bit_in_a_new_process(tmp_path):
    """With worker processes, whose number changes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training_run.start(whole, small=False, workers=1, max_iters=4)
    training_run.start(parts, small=False, workers=1, max_iters=2)
    done = training_run.run_script((parts, {"small": False, "resume": "latest", "workers": 2, "max_iters": 4}))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "at iteration 2 with everything" in done.stderr
    assert training_run.read_losses(parts) == training_run.read_losses(whole)
    assert len(training_run.read_losses(whole)) == 4
    assert_same(whole_state(parts / "iter_4.pth"), whole_state(whole / "iter_4.pth"))
    assert_same(read_checkpoint(parts / "iter_4_ema.pth"), read_checkpoint(whole / "iter_4_ema.pth"))


@pytest.mark.cuda
def test_a_gpu_goes_on_to_the_bit_in_deterministic_mode(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"small": False, "device": "cuda", "deterministic": True}
    done = training_run.run_script((whole, options), (parts, {**options, "max_iters": 4}),
                                   (parts, {**options, "resume": "latest"}))
    assert done.returncode == 0, done.stderr[-4000:]
    assert training_run.read_losses(parts) == training_run.read_losses(whole)
    assert_same(whole_state(parts / "iter_6.pth"), whole_state(whole / "iter_6.pth"))


@pytest.mark.parametrize("options", [{}, {"batch": 2, "workers": 1}, {"cumulative_iters": 2}])
def test_every_break_gives_the_same_training(tmp_path, options):
    training_run.start(tmp_path / "whole", **options)
    for stop in (2, 4):
        training_run.start(tmp_path / "parts", max_iters=stop, resume="latest", **options)
    runner = training_run.start(tmp_path / "parts", resume="latest", **options)
    assert runner.iter == 6
    assert training_run.read_losses(tmp_path / "parts") == training_run.read_losses(tmp_path / "whole")
    assert_same(whole_state(tmp_path / "parts/iter_6.pth"), whole_state(tmp_path / "whole/iter_6.pth"))


@pytest.mark.parametrize("change_it", [
    lambda rank: rank.update(memory=None), lambda rank: rank["random"].update(torch=torch.get_rng_state())])
def test_what_is_not_restored_shows_in_the_losses(finished, after_four, change_it):
    """So the comparisons of this file would notice."""
    (path,) = (after_four / "state").glob("iter_4-*/rank_0.pth")
    saved = torch.load(path, weights_only=True)
    torch.manual_seed(123)
    change_it(saved)
    save_checkpoint(saved, path)
    training_run.start(after_four, resume="latest")
    found, expected = training_run.read_losses(after_four), training_run.read_losses(finished)
    assert all(found[i] == expected[i] for i in range(4))
    assert any(found[i] != expected[i] for i in (4, 5))


def test_the_contents_are_those_of_the_format(finished):
    content = read_checkpoint(finished / "iter_4.pth")
    assert list(content) == ["meta", "state_dict", "optimizer", "training_state"]
    meta, state = content["meta"], content["training_state"]
    assert (meta["epoch"], meta["iter"], meta["seed"], meta["exp_name"]) == (1, 3, 0, "test")
    assert meta["CLASSES"] == ("car", "free") and meta["versions"]["torch"] == str(torch.__version__)
    assert {"python", "torch", "cuda", "mmcv", "mmdet3d", "numpy"} <= set(meta["versions"])
    assert state["iteration"] == 4 and state["world_size"] == 1 and state["sampler"]["batches"] == 4
    assert state["hooks"]["ema"]["updates"] == 14
    assert content["optimizer"]["state"][0]["step"] == 4
    assert sorted(path.name for path in finished.glob("*.pth")) == [
        "iter_2.pth", "iter_4.pth", "iter_4_ema.pth", "iter_6.pth", "iter_6_ema.pth", "latest.pth"]
    assert [path.name.partition("-")[0] for path in (finished / "state").iterdir()] == ["iter_6"]
    assert (finished / "latest.pth").resolve() == finished / "iter_6.pth"


def test_two_processes_go_on_to_the_bit(tmp_path):
    """Processes have running statistics, random states and memories of their own."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = training_run.run_script((whole, {}), (parts, {"max_iters": 4}), (parts, {"resume": "latest"}), processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        assert training_run.read_losses(parts, rank) == training_run.read_losses(whole, rank)
    states = [whole_state(folder / "iter_6.pth") for folder in (parts, whole)]
    assert_same(*states)
    assert len(states[0]["ranks"]) == 2 and set(states[0]["ranks"][1]["buffers"]) >= {"norm.running_mean"}
    assert not torch.equal(states[0]["ranks"][1]["buffers"]["norm.running_mean"],
                           states[0]["state_dict"]["norm.running_mean"])
    with pytest.raises(CheckpointError, match="made by 2 processes, this run has 1"):
        training_run.start(parts, resume="latest")
    runner = training_run.start(parts, resume="latest", max_iters=8, allow_new_layout=True)
    assert runner.iter == 8


# ---- other checkpoints ----------------------------------------------------------------------------------------------


def test_checkpoint_of_the_mmcv_runner(after_four, caplog):
    """The iteration ``meta.iter`` is repeated; what such a file does not hold is named."""
    change(after_four / "iter_4.pth", lambda content: content.pop("training_state"))
    (after_four / "losses_0.txt").unlink()
    with caplog.at_level(logging.WARNING):
        training_run.start(after_four, resume=after_four / "iter_4.pth")
    assert list(training_run.read_losses(after_four)) == [3, 4, 5]
    for what in ("averaged weights", "the order of samples", "random states", "the temporal memory"):
        assert what in caplog.text
    content = read_checkpoint(after_four / "iter_6.pth")
    assert content["optimizer"]["state"][0]["step"] == 7  # four, and iterations 3, 4 and 5
    assert content["training_state"]["sampler"]["batches"] == 3
    assert content["training_state"]["hooks"]["ema"]["updates"] == 13


def test_another_layout_needs_a_flag(after_four, caplog):
    with pytest.raises(CheckpointError, match="iter_4.pth: .*samples_per_gpu 1 .*allow_new_layout"):
        training_run.start(after_four, resume="latest", batch=2)
    with caplog.at_level(logging.WARNING):
        training_run.start(after_four, resume="latest", batch=2, max_iters=6, allow_new_layout=True)
    assert "the order of samples" in caplog.text and "averaged weights" not in caplog.text
    content = read_checkpoint(after_four / "iter_6.pth")
    assert content["training_state"]["hooks"]["ema"]["updates"] == 16
    assert content["training_state"]["sampler"]["batches"] == 2  # begun anew at iteration 4
    training_run.start(after_four, resume="latest", batch=2, max_iters=8)
    assert read_checkpoint(after_four / "iter_8.pth")["training_state"]["sampler"]["batches"] == 4


def test_nothing_changes_when_a_checkpoint_is_refused(after_four):
    runner = training_run.start(after_four / "other", max_iters=2, batch=2)
    before = to_plain({"model": runner.model.state_dict(), "optimizer": runner.optimizer.state_dict(),
                       "sampler": runner.train_sampler.state_dict()})
    before = {name: {key: value.clone() if isinstance(value, torch.Tensor) else value
                     for key, value in entry.items()} for name, entry in before.items()}
    with pytest.raises(CheckpointError):
        resume_training_state(runner, after_four / "iter_4.pth")
    after = to_plain({"model": runner.model.state_dict(), "optimizer": runner.optimizer.state_dict(),
                      "sampler": runner.train_sampler.state_dict()})
    assert_same(after, before)
    assert runner.iter == 2


def test_an_older_checkpoint_has_no_rank_files(after_four, caplog):
    with caplog.at_level(logging.WARNING):
        training_run.start(after_four, resume=after_four / "iter_2.pth", max_iters=3, interval=-1)
    assert "random states" in caplog.text and "only the newest" in caplog.text
    assert find_latest(after_four).name == "iter_3.pth"


def test_a_run_can_leave_out_the_memory(tmp_path, caplog):
    training_run.start(tmp_path, max_iters=2, save_memory=False)
    with caplog.at_level(logging.WARNING):
        training_run.start(tmp_path, resume="latest", max_iters=3)
    assert "start anew: the temporal memory" in caplog.text


@pytest.mark.parametrize("break_it, message", [
    (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "optimizer has groups of .5. parameters"),
    (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of parameter 0 has shape .3."),
    (lambda c: c.pop("meta") and c.pop("training_state"), "load_from"),
    (lambda c: c["training_state"].pop("sampler"), "training_state needs"),
    (lambda c: c["training_state"].update(format=7), "format 7"),
    (lambda c: c["state_dict"].pop("head.bias"), "head.bias"),
])
def test_refusals(after_four, break_it, message):
    change(after_four / "iter_4.pth", break_it)
    with pytest.raises(CheckpointError, match=message):
        training_run.start(after_four, resume=after_four / "iter_4.pth")


def test_a_damaged_rank_file_is_named(after_four):
    (path,) = (after_four / "state").glob("iter_4-*/rank_0.pth")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="rank_0.pth: cannot be read"):
        training_run.start(after_four, resume="latest")


def test_plain_values():
    view = torch.arange(100.0)[:2]
    plain = to_plain({"view": view, "path": (1, [2.5, None, True]), "version": torch.__version__})
    assert plain["view"].untyped_storage().nbytes() == 8 and type(plain["version"]) is str
    assert plain["path"] == (1, [2.5, None, True])
    with pytest.raises(TypeError, match="plain values only, got object"):
        to_plain({"a": [object()]})
    assert to_plain({"a": object}, unknown=repr) == {"a": repr(object)}


def test_saving_outside_of_a_hook_takes_the_number_of_iterations(tmp_path):
    runner = training_run.start(tmp_path, max_iters=2)
    save_training_state(runner, tmp_path / "iter_2.pth", finished=runner.iter)
    content = read_checkpoint(tmp_path / "iter_2.pth")
    assert content["meta"]["iter"] == 1 and content["training_state"]["iteration"] == 2
    assert content["training_state"]["hooks"]["ema"]["updates"] == 12
