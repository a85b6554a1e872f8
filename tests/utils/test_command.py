import json
import math

import pytest

from mmdet3d.utils.command import error_line
from mmdet3d.utils.files import write_json


@pytest.mark.parametrize("error, line", [
    (ValueError("no such\n  thing"), "error: no such thing (--debug shows where)"),
    (FileNotFoundError("gone"), "error: gone (--debug shows where)"),
    (KeyError("a"), "error: KeyError: 'a' (--debug shows where)"),
    (RuntimeError(), "error: RuntimeError: no message (--debug shows where)"),
])
def test_an_error_is_one_line(error, line):
    assert error_line(error) == line


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "summary.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": math.nan}, allow_nan=False)
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]
