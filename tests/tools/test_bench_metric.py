"""tools/bench_metric.py prints and writes a rate."""

import json

import pytest
from loading import load_tool

bench_metric = load_tool("bench_metric")


def test_rates(tmp_path, capsys, device):
    report = tmp_path / "metric.json"
    assert bench_metric.main(["--device", device, "--samples", "2", "--rounds", "1", "--profile",
                              "--json", str(report)]) == 0
    rates = json.loads(report.read_text())["samples_per_second"]
    assert set(rates) == ({"host"} if device == "cpu" else {"device", "host"}) and min(rates.values()) > 0
    text = capsys.readouterr().out
    assert "samples/s" in text and "mmdet3d::ray_cast" in text


def test_refusals(capsys):
    with pytest.raises(SystemExit):
        bench_metric.main(["--samples", "0"])
    assert "must be at least 1" in capsys.readouterr().err
