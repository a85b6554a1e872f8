"""The benchmark runs on a CPU and writes what it measured."""

import json
from pathlib import Path

import pytest
from loading import load_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "config/stcocc/stcocc-tiny-synthetic.py")


@pytest.fixture(scope="module")
def benchmark():
    return load_tool("benchmark")


def test_frames(benchmark, tmp_path, capsys):
    record = tmp_path / "frames.json"
    assert benchmark.main([CONFIG, "--device", "cpu", "--frames", "3", "--warmup", "1", "--stages", "--json",
                           str(record)]) == 0
    values = json.loads(record.read_text())["evaluation"]
    assert values["latency"]["count"] == 3 and values["samples_per_second"] > 0 and not values["graphs"]
    stages = values["stages_ms"]
    assert set(stages) >= {"forward projection", "temporal fusion, stage 0", "flow head"}
    assert all(value > 0 for value in stages.values())
    assert "ms a frame" in capsys.readouterr().out


def test_training(benchmark, tmp_path):
    record = tmp_path / "training.json"
    assert benchmark.main([CONFIG, "--device", "cpu", "--frames", "2", "--warmup", "1", "--train", "1", "2", "--json",
                           str(record)]) == 0
    one, two = json.loads(record.read_text())["training"]
    assert (one["samples"], two["samples"]) == (1, 2) and len(one["losses"]) == 3
    assert all(0 < loss < 1e4 for loss in one["losses"] + two["losses"])


def test_errors_are_one_line(benchmark, capsys):
    assert benchmark.main(["config/none.py", "--device", "cpu"]) == 1
    assert "config file not found: config/none.py" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--frames", "0"], ["--train", "0"]])
def test_numbers_are_checked(benchmark, arguments):
    with pytest.raises(SystemExit):
        benchmark.main([CONFIG, *arguments])
