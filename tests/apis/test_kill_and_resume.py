"""A training that is killed at random moments goes on to the bit, and no checkpoint is ever unreadable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "core/kill_and_resume.py"


@pytest.mark.parametrize("kills, options", [
    (3, []), pytest.param(20, ["--real", "--fresh"], marks=pytest.mark.slow)])
def test_killed_again_and_again(tmp_path, kills, options):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "runs", "--kills", str(kills), *options],
                          capture_output=True, text=True, check=False, timeout=3000,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills
    assert result["unreadable"] == [] and result["left_at_the_end"] == 0
    assert result["same_losses"] and result["same_weights"]
    assert len(result["checkpoints_at_the_end"]) == 3
