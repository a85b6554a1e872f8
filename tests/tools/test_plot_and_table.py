"""Curves from logs, and tables from results files."""

import json

import pytest
from loading import load_tool
from PIL import Image

plot_log = load_tool("plot_log")
results_table = load_tool("results_table")


def write_log(folder, name, *lines):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.log.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(iteration, loss):
    return {"mode": "train", "iter": iteration, "lr": 1e-3, "loss": loss, "loss_depth": loss / 2}


def test_the_newest_log_of_a_run_counts(tmp_path):
    run = tmp_path / "run"
    write_log(run, "20260101_000000", {"seed": 0}, train(10, 5.0), train(20, 4.0), train(30, 9.0))
    write_log(run, "20260102_000000", {"seed": 0}, train(30, 3.0), {"mode": "val", "iter": 30, "RayIoU": 0.25})
    log = plot_log.read_log(str(run))
    assert plot_log.points(log["train"], "loss") == ([10, 20, 30], [5.0, 4.0, 3.0])
    assert plot_log.points(log["val"], "RayIoU") == ([30], [0.25])
    assert plot_log.points(log["train"], "loss_flow") == ([], [])


def test_pictures_of_curves(tmp_path, capsys):
    write_log(tmp_path / "a", "1", train(10, 5.0), train(20, 4.0), {"mode": "val", "iter": 20, "RayIoU": None})
    write_log(tmp_path / "b", "1", train(10, 6.0), {"mode": "val", "iter": 10, "RayIoU": 0.1})
    runs, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "deep/curve.png"
    assert plot_log.main([runs[0], "--out", str(out), "--losses", "loss", "loss_depth"]) == 0
    width = Image.open(out).width
    assert plot_log.main([*runs, "--out", str(out)]) == 0
    assert Image.open(out).width == pytest.approx(1.5 * width, abs=3)  # a third panel for RayIoU
    assert plot_log.main([f"{runs[0]}/1.log.json", "--out", str(tmp_path / "curve.svg")]) == 0
    capsys.readouterr()
    assert plot_log.main([*runs, "--losses", "loss_x", "--out", str(out)]) == 2
    assert "--losses: ['loss_x'] were not logged; found" in capsys.readouterr().err
    assert plot_log.main([runs[0], f"{runs[0]}/", "--out", str(out)]) == 2
    assert "same name" in capsys.readouterr().err


def test_logs_that_cannot_be_read(tmp_path, capsys):
    assert plot_log.main([str(tmp_path)]) == 2 and "found no *.log.json" in capsys.readouterr().err
    (tmp_path / "1.log.json").write_text('{"seed": 0}\n{"mode"')
    assert plot_log.main([str(tmp_path)]) == 2
    assert f"{tmp_path / '1.log.json'}, line 2: not JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot_log.main([str(tmp_path), "--out", "curve.bmp"])


def record(ray_iou, moving=None):
    rays = {"RayIoU": ray_iou, "RayIoU@1": 0.1, "RayIoU@2": 0.2, "RayIoU@4": 0.3, "mAVE": None, "flow_rays": 7,
            "classes": {"car": {"IoU@2": ray_iou / 2, "gt_rays": 40}, "manmade": {"IoU@2": None, "gt_rays": 5}}}
    return {"ray_iou": rays, "voxel_iou": {"miou": 12.34}, "moving": moving}


def test_tables(tmp_path, capsys):
    moving = {"ave": 1.234, "ave_zero_flow": 2.5, "rays": 99, "classes": {"car": {"ave": 1.5}}}
    files = [tmp_path / "majority.json", tmp_path / "run/results.json"]
    files[1].parent.mkdir()
    for file, content in zip(files, (record(0.05), record(0.2512, moving)), strict=True):
        file.write_text(json.dumps(content))
    assert results_table.main(["--classes", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| majority | 5.00 | 10.00 | 20.00 | 30.00 | 12.34 | – | 7 | – | – | – |" in lines
    assert "| run | 25.12 | 10.00 | 20.00 | 30.00 | 12.34 | – | 7 | 1.23 | 2.50 | 99 |" in lines
    assert "| car | 40 | 2.50 | 12.56 | – | 1.50 |" in lines and "| manmade | 5 | – | – | – | – |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 2
    assert results_table.main([str(files[0]), str(files[0])]) == 2 and "same name" in capsys.readouterr().err
    files[0].write_text("{}")
    assert results_table.main([str(files[0])]) == 2 and "expected a results file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        results_table.main([str(files[0]), "--names", "a", "b"])
