"""tools/create_synthetic.py from the command line."""


import pytest
from loading import load_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("create_synthetic")


def test_writes_a_small_world(tool, tmp_path, capsys):
    options = ["--out", str(tmp_path / "new"), "--scenes", "2", "--frames", "1", "--image-size", "48x27",
               "--workers", "0"]
    assert tool.main(options) == 0
    assert "2 scenes, 2 key frames" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new" / "gts").iterdir()) == ["scene-0061", "scene-0103"]
    assert (tmp_path / "new" / "v1.0-mini" / "scene.json").is_file()
    assert tool.main([*options, "--seed", "5"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [(["--image-size", "800"], "must be WIDTHxHEIGHT"),
                                              (["--version", "v1.0-test"], "invalid choice")])
def test_bad_options_are_refused(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.main(options)
    assert message in capsys.readouterr().err


def test_too_many_scenes_are_refused(tool, tmp_path, capsys):
    assert tool.main(["--out", str(tmp_path / "new"), "--scenes", "11"]) == 1
    assert "1 to 10 scenes" in capsys.readouterr().err and not (tmp_path / "new").exists()
