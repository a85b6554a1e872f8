"""The build script itself, as a machine without a GPU runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build_help(**environment):
    """Runs everything that setup.py does before it compiles."""
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "FORCE_CUDA": "0", **environment}, check=False)


@pytest.mark.parametrize("mode", ["0", "auto"])
def test_operators_are_set_up_without_a_gpu(mode):
    result = build_help(MMDET3D_CUDA=mode)
    assert result.returncode == 0, result.stderr
    assert "operators: CPU, no CUDA" in result.stderr



def test_an_unknown_mode_is_refused():
    result = build_help(MMDET3D_CUDA="yes")
    assert result.returncode != 0
    assert "MMDET3D_CUDA='yes' is not understood; use auto, 0 or 1" in result.stderr
