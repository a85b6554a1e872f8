"""Logs of a training: what stands in them, and what happens without TensorBoard."""

import json
import logging

import pytest
import torch
from small_training import Loader, make_runner

from mmdet3d.core.hooks import progress
from mmdet3d.core.hooks.progress import TextLoggerHook


def run(work_dir, max_iters=6, kinds=("TextLoggerHook",), **options):
    runner = make_runner(work_dir, max_iters, log_config={"interval": 3, "hooks": [{"type": kind} for kind in kinds]},
                         optimizer_config={"grad_clip": {"max_norm": 5}}, **options)
    runner.meta = {"seed": 3, "exp_name": "some.py"}
    runner.run([Loader()])
    return runner


def test_lines_in_text_and_json(tmp_path, caplog):
    losses = []
    with caplog.at_level(logging.INFO):
        runner = run(tmp_path, record=lambda runner: losses.append(runner.outputs["log_vars"]["loss_line"]))
    first, *lines = [json.loads(line) for line in (tmp_path / f"{runner.timestamp}.log.json").read_text().splitlines()]
    assert first == {"seed": 3, "exp_name": "some.py"}
    assert [line["iter"] for line in lines] == [3, 6] and {line["mode"] for line in lines} == {"train"}
    for number, line in enumerate(lines):
        assert line["loss_line"] == pytest.approx(sum(losses[3 * number : 3 * number + 3]) / 3)
        assert {"eta", "time", "data_time", "grad_norm", "loss", "seen"} <= set(line)
        assert 0 <= line["data_time"] <= line["time"]
    assert lines[0]["lr"] == pytest.approx(1e-4 * (1 - (1 - 2 / 200) * 0.999), rel=1e-12)  # not rounded to 0
    text = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Iter")]
    assert len(text) == 2 and text[0].startswith("Iter [3/6]\tlr: 1.099e-06, eta: 0:00:0")
    assert f"loss_line: {lines[0]['loss_line']:.4f}" in text[0] and "grad_norm" in text[0]


@pytest.mark.parametrize("ignore_last, expected", [(True, [3, 6]), (False, [3, 6, 8])])
def test_the_last_iterations_are_logged_if_asked(tmp_path, ignore_last, expected):
    losses = []
    runner = make_runner(tmp_path, 8, record=lambda runner: losses.append(runner.outputs["log_vars"]["loss"]),
                         log_config={"interval": 3, "hooks": [{"type": "TextLoggerHook", "ignore_last": ignore_last}]})
    runner.run([Loader()])
    lines = [json.loads(line) for line in (tmp_path / f"{runner.timestamp}.log.json").read_text().splitlines()][1:]
    assert [line["iter"] for line in lines] == expected
    last = lines[-1]["iter"]
    assert lines[-1]["loss"] == pytest.approx(sum(losses[6:8]) / 2 if last == 8 else sum(losses[3:6]) / 3)


def test_the_estimate_counts_from_the_start_of_this_run(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, 100)
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    hook = TextLoggerHook(interval=10)
    runner._iter = 60  # resumed
    hook.before_run(runner)
    now[0], runner._iter = 70.0, 69  # ten iterations took 20 s
    assert hook._seconds_left(runner) == 60


def test_values_of_an_evaluation_are_marked(tmp_path, caplog):
    runner = make_runner(tmp_path, 9)
    hook = TextLoggerHook()
    hook.before_run(runner)
    runner.mode = "val"
    runner._iter = 4
    runner.log_buffer.output.update(RayIoU=0.25, samples=12, mAVE=float("nan"))
    with caplog.at_level(logging.INFO):
        hook.log(runner)
    assert caplog.records[-1].getMessage() == "Iter (val) [5]\tlr: 1.000e-04, RayIoU: 0.2500, samples: 12, mAVE: nan"
    line = json.loads((tmp_path / f"{runner.timestamp}.log.json").read_text().splitlines()[-1])
    assert line["RayIoU"] == 0.25 and line["mAVE"] is None and line["mode"] == "val"


class Writer:
    """Stands for a TensorBoard writer."""

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, float(value), step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_scalars(tmp_path, monkeypatch):
    writers = []
    monkeypatch.setattr(progress, "summary_writer", lambda folder: writers.append(Writer(folder)) or writers[-1])
    run(tmp_path, kinds=("TextLoggerHook", "TensorboardLoggerHook"))
    (writer,) = writers
    assert writer.folder == str(tmp_path / "tf_logs") and writer.closed
    assert {"train/loss", "train/grad_norm", "train/time", "train/data_time", "learning_rate"} <= {
        name for name, _, _ in writer.scalars}
    assert {step for _, _, step in writer.scalars} == {3, 6}


def test_without_tensorboard_a_warning_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "summary_writer", lambda folder: None)
    runner = run(tmp_path, kinds=("TextLoggerHook", "TensorboardLoggerHook"))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["no TensorBoard logs, because the package tensorboard is not installed "
                        "(pip install tensorboard)"]
    assert runner.iter == 6


def test_published_options_are_accepted(tmp_path):
    runner = make_runner(tmp_path, log_config={"interval": 5, "hooks": [
        {"type": "TextLoggerHook", "by_epoch": True, "ignore_last": False},
        {"type": "TensorboardLoggerHook", "log_dir": str(tmp_path / "elsewhere"), "reset_flag": True}]})
    text, board = runner.hooks[-2:]
    assert (text.by_epoch, text.ignore_last, text.interval) == (False, False, 5)
    assert board.log_dir == str(tmp_path / "elsewhere") and board.reset_flag


def test_odd_values_become_numbers_or_text():
    line = {"a": torch.tensor(2.5), "b": torch.tensor([1, 2]), "c": {1}}
    assert json.loads(json.dumps(line, default=progress._plain)) == {"a": 2.5, "b": "tensor([1, 2])", "c": "{1}"}
