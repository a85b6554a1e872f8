"""tools/compare_predictions.py."""

import json

import numpy as np
import pytest
from loading import load_tool

from mmdet3d.utils.files import save_prediction

FREE = 16


@pytest.fixture(scope="module")
def tool():
    return load_tool("compare_predictions")


def write(folder, name, semantics, flow=0.0):
    semantics = np.asarray(semantics, np.uint8).reshape(2, 5, 1)
    save_prediction(folder / name, semantics, np.full((2, 5, 1, 2), flow, np.float16))


def test_agreement(tool, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, "s/x.npz", [FREE] * 8 + [3, 4], flow=1.0)
    write(b, "s/x.npz", [FREE] * 7 + [2, 3, 5], flow=1.5)
    write(a, "s/y.npz", [FREE] * 10)
    write(b, "s/y.npz", [FREE] * 10)
    record = tmp_path / "record.json"
    assert tool.main([str(a), str(b), "--json", str(record)]) == 0
    assert json.loads(record.read_text()) == {
        "files": 2, "same_class": 0.9, "same_class_least_file": 0.8, "same_class_where_occupied": pytest.approx(1 / 3),
        "largest_flow_difference": 0.5}


def test_refusals(tool, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, "s/x.npz", [FREE] * 10)
    for arrange, message in (
            (lambda: None, "no prediction (.npz) found in"),
            (lambda: write(b, "s/y.npz", [FREE] * 10), "2 predictions are in one folder only: s/x.npz, s/y.npz"),
            (lambda: ((b / "s/y.npz").unlink(), (b / "s/x.npz").write_bytes(b"no")), "is damaged")):
        arrange()
        assert tool.main([str(a), str(b)]) == 1
        assert message in capsys.readouterr().err
