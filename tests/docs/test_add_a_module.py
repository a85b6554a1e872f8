"""docs/add_a_module.md: its files are put into a copy of the project, where its tests pass and its commands work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv import Config

from mmdet3d import interfaces
from mmdet3d.models import build_model
from mmdet3d.ops import _library
from mmdet3d.registry import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/add_a_module.md").read_text()
# A paragraph that begins or ends with a path and ends with a colon, and the block after it.
FILES = {path: code for path, code in re.findall(
    r"`((?:mmdet3d|config|tests|tools)/[\w/.-]+\.(?:py|cpp))`(?:[,;][^\n]*)?:\n\n```(?:python|cpp)\n(.*?)```",
    PAGE, re.DOTALL)}
COMMANDS = [command for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
            for command in block.replace("\\\n", " ").splitlines()]
#: Not run: compiling takes minutes, and the data set is that of the other tests.
LEFT_OUT = ["python setup.py build_ext --inplace", "python tools/create_synthetic.py --small --out data/synthetic"]

# Runs commands one after the other in one process, which imports everything once.
DRIVER = """
import json, runpy, shlex, sys, time
for command in json.load(sys.stdin):
    python, *words = shlex.split(command)
    start, code = time.perf_counter(), 0
    try:
        if words[0] == "-c":
            exec(words[1], {})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    print(f"[{command}: {code}, {time.perf_counter() - start:.1f} s]", flush=True)
    if python != "python" or code:
        sys.exit(f"{command}: {code}")
"""


@pytest.fixture(scope="module")
def project(tiny_world, tmp_path_factory):
    """A copy of the project with the page's files, the compiled library and a data set."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("config", "mmdet3d", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".*"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for library in (ROOT / "mmdet3d/ops").glob("_C*.so"):
        (folder / "mmdet3d/ops" / library.name).symlink_to(library)
    (folder / "data").mkdir()
    (folder / "data/synthetic").symlink_to(tiny_world)
    for path, code in FILES.items():
        assert not (folder / path).exists(), path
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
    return folder


def run(project, commands, timeout):
    # One thread: on a busy machine, those of small tensors wait for each other most of the time.
    environment = {**os.environ, "PYTHONPATH": str(project), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=project, input=json.dumps(commands), text=True,
                          capture_output=True, env=environment, timeout=timeout, check=False)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def test_the_recipes_work(project):
    commands = [command for command in COMMANDS if command not in LEFT_OUT]
    assert set(LEFT_OUT) < set(COMMANDS) and len(commands) == len(COMMANDS) - len(LEFT_OUT) > 5
    if not _library.AVAILABLE:  # nothing to compare
        commands = [command for command in commands if "bench_ops" not in command]
    check = "from mmdet3d.utils.env import OPERATORS; assert OPERATORS['row_dot'] == ['CPU']"
    train, = (command for command in commands if "tools/train.py" in command)
    resume = train.replace("max_iters=2", "max_iters=3").replace(" --cfg-options", " --resume --cfg-options")
    output = run(project, [*commands, f'python -c "{check}"', resume], timeout=180)
    assert "1 passed, 1 skipped" in output and "2 passed" in output  # the operator is not compiled
    assert re.search(r"recall of occupied voxels: \d+\.\d\d % of [1-9]\d*\n", output)
    assert output.count("iteration 1: lowest loss so far") == 1 and "at iteration 2 with everything" in output
    state, before = (torch.load(project / f"outputs/mine/iter_{n}.pth", weights_only=True) for n in (3, 2))
    lowest, first = (one["training_state"]["hooks"]["lowest_loss"] for one in (state, before))
    assert 0 < lowest <= first
    names = state["state_dict"].keys()
    assert any(".attentions.0.gate.weight" in name for name in names) and "auxiliary_heads.0.classifier.weight" in names
    assert any(name.startswith("forward_projection.img_backbone.stages.3.") for name in names)


def test_the_page_follows_the_rules_of_the_project(project):
    assert {path.rpartition("/")[2] for path in FILES} >= {
        "gated_temporal_attention.py", "column_head.py", "row_dot.py", "row_dot.cpp", "scene_subset.py",
        "drop_camera.py", "lowest_loss.py", "occupied_recall.py", "stcocc-tiny-mine.py", "test_row_dot.py"}
    assert len(FILES) == PAGE.count("```python\n") + PAGE.count("```cpp\n")
    pytest.importorskip("ruff")
    paths = [path for path in FILES if path.endswith(".py")]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *paths], cwd=project, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_page_names_the_contracts():
    table = [line.split("|")[4] for line in PAGE.splitlines() if line.startswith("|") and line.count("|") == 5]
    names = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    assert {"TemporalAttention", "AuxiliaryHead", "StereoStages", "TrainingState", "PipelineStep"} <= names
    assert [name for name in names if not hasattr(interfaces, name)] == []


def test_the_page_shows_the_message_of_a_mistake():
    model = Config.fromfile(str(ROOT / "config/stcocc/stcocc-tiny-synthetic.py")).model
    model.temporal_fusion.histroy_num = 4
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_model(model)
    shown = re.search(r"```text\nmmdet3d.registry.ConfigError: (.*?)\n```", PAGE, re.DOTALL)[1]
    assert " ".join(shown.split()) == str(caught.value)
