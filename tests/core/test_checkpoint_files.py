"""Which checkpoint is the newest, what is removed, and what a full disk or a kill leaves."""

import contextlib
import errno
import os

import pytest
import torch
import training_run

import mmdet3d.utils.checkpoint
from mmdet3d.core.checkpoint_files import (
    find_latest,
    list_checkpoints,
    remove_leftovers,
    remove_old_checkpoints,
    set_latest,
)
from mmdet3d.utils.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from mmdet3d.utils.files import atomic_write


def checkpoint(folder, iteration, age=0):
    """A small main file that was written ``age`` seconds ago."""
    path = save_checkpoint({"state_dict": {"weight": torch.full((3,), iteration)}}, folder / f"iter_{iteration}.pth")
    when = path.stat().st_mtime_ns - age * 10**9
    os.utime(path, ns=(when, when))
    return path


# ---- the newest -----------------------------------------------------------------------------------------------------


def test_latest_without_anything(tmp_path):
    assert find_latest(tmp_path) is None and find_latest(tmp_path / "missing") is None


def test_latest_without_a_link_is_the_highest_number(tmp_path):
    for iteration in (100, 20, 3):
        checkpoint(tmp_path, iteration)
    save_checkpoint({"state_dict": {"a": torch.ones(1)}, "iter": 500, "updates": 3}, tmp_path / "iter_500_ema.pth")
    assert find_latest(tmp_path).name == "iter_100.pth"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_3.pth", "iter_20.pth", "iter_100.pth"]


def test_the_link_decides_between_attempts(tmp_path):
    """A run that was set back to iteration 10 does not go on from what the first attempt left at 50."""
    checkpoint(tmp_path, 50, age=20)
    set_latest(checkpoint(tmp_path, 20, age=10))
    assert find_latest(tmp_path) == tmp_path / "iter_20.pth"


def test_a_checkpoint_completed_after_the_link(tmp_path):
    set_latest(checkpoint(tmp_path, 20, age=10))
    newer = checkpoint(tmp_path, 30, age=-5)
    assert find_latest(tmp_path) == newer


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, caplog, content):
    good, bad = checkpoint(tmp_path, 20), checkpoint(tmp_path, 30)
    set_latest(bad)
    bad.write_bytes(bad.read_bytes()[:-100] if content is None else content)
    assert find_latest(tmp_path) == good
    assert "iter_30.pth" in caplog.text


def test_a_link_to_nothing(tmp_path):
    good = checkpoint(tmp_path, 20)
    (tmp_path / "latest.pth").symlink_to("iter_30.pth")
    assert find_latest(tmp_path) == good


def test_nothing_readable_is_an_error(tmp_path):
    """To begin anew would overwrite what somebody may still repair."""
    (tmp_path / "iter_3.pth").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints"):
        find_latest(tmp_path)


def test_the_link_is_replaced_and_moves_with_the_folder(tmp_path):
    for iteration in (1, 2):
        set_latest(checkpoint(tmp_path / "a", iteration))
    (tmp_path / "a").rename(tmp_path / "b")
    assert os.readlink(tmp_path / "b/latest.pth") == "iter_2.pth"
    assert find_latest(tmp_path / "b") == tmp_path / "b/iter_2.pth"


# ---- what is removed ------------------------------------------------------------------------------------------------


def test_old_checkpoints_go_later_ones_stay(tmp_path):
    for iteration in (2, 4, 6, 8, 100):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 4).rename(tmp_path / "iter_4_ema.pth")
    checkpoint(tmp_path, 4)
    remove_old_checkpoints(tmp_path / "iter_8.pth", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_100.pth", "iter_4_ema.pth", "iter_6.pth", "iter_8.pth"]
    remove_old_checkpoints(tmp_path / "iter_8.pth", keep=5)
    assert len(list_checkpoints(tmp_path)) == 3


def test_leftovers_of_a_kill_are_removed(tmp_path):
    training_run.start(tmp_path, max_iters=2)
    (kept,) = (tmp_path / "state").iterdir()
    leftovers = [tmp_path / ".iter_4.pth.0123456789ab.tmp", kept / ".rank_0.pth.0123456789ab.tmp",
                 tmp_path / "state/iter_4-00000000/rank_0.pth", tmp_path / "nonfinite/.a.json.0123456789ab.tmp"]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / ".latest.pth.0123456789ab.tmp").symlink_to("iter_4.pth")
    others = [tmp_path / "notes.tmp", tmp_path / ".hidden"]
    for path in others:
        path.touch()
    training_run.start(tmp_path, max_iters=3, interval=-1, resume="latest")
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in others)
    assert not list(tmp_path.glob(".latest*")) and not (tmp_path / "state/iter_4-00000000").exists()


def test_rank_files_stay_where_no_checkpoint_can_be_read(tmp_path):
    training_run.start(tmp_path, max_iters=2)
    (tmp_path / "iter_2.pth").write_bytes(b"damaged")
    remove_leftovers(tmp_path)
    assert len(list((tmp_path / "state").iterdir())) == 1


# ---- a full disk ----------------------------------------------------------------------------------------------------


class FullDisk:
    """Files that hold no more than ``space`` bytes; those before the first ``name`` are not limited."""

    def __init__(self, name, space):
        self.name, self.space = name, space

    @contextlib.contextmanager
    def __call__(self, path, sync=False):
        with atomic_write(path, sync) as file:
            yield self.limited(file) if self.name in str(path) else file

    def limited(self, file):
        disk = self

        class Limited:
            def write(self, data):
                disk.space -= len(memoryview(data).cast("B"))
                if disk.space < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return file.write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return Limited()


@pytest.mark.parametrize("name, space", [("iter_4.pth", 0), ("iter_4.pth", 2000), ("rank_0.pth", 1000)])
def test_a_full_disk_never_costs_the_previous_checkpoint(tmp_path, monkeypatch, name, space):
    training_run.start(tmp_path / "whole")
    work_dir = tmp_path / "work"
    training_run.start(work_dir, max_iters=2)
    with monkeypatch.context() as patch:
        patch.setattr(mmdet3d.utils.checkpoint, "atomic_write", FullDisk(name, space))
        with pytest.raises(CheckpointError, match=f"{name}: could not be written .No space left on device"):
            training_run.start(work_dir, resume="latest")
    assert [path.name for path in list_checkpoints(work_dir)] == ["iter_2.pth"]
    assert [path.name.partition("-")[0] for path in (work_dir / "state").iterdir()] == ["iter_2"]
    assert (work_dir / "latest.pth").resolve().name == "iter_2.pth" and not list(work_dir.rglob(".*.tmp"))
    training_run.start(work_dir, resume="latest")
    assert training_run.read_losses(work_dir) == training_run.read_losses(tmp_path / "whole")


def test_writing_a_checkpoint_again_never_costs_the_old_one(tmp_path, monkeypatch):
    """Rank files of the two do not mix."""
    training_run.start(tmp_path, max_iters=2)
    before = read_checkpoint(tmp_path / "iter_2.pth")["training_state"]["rank_folder"]
    with monkeypatch.context() as patch:
        patch.setattr(mmdet3d.utils.checkpoint, "atomic_write", FullDisk("iter_2.pth", 500))
        with pytest.raises(CheckpointError, match="the old file is unchanged"):
            training_run.start(tmp_path, max_iters=2)
    assert [path.name for path in (tmp_path / "state").iterdir()] == [before]
    assert read_checkpoint(tmp_path / "iter_2.pth")["training_state"]["rank_folder"] == before
