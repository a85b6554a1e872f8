"""What a job of several processes says and returns when it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, pathlib, signal, sys, time
what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
if what == "fail" and os.environ["RANK"] == "1":
    sys.exit(3)
if what == "done":
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: ((folder / f"asked_{os.environ['RANK']}").touch(), sys.exit(143)))
(folder / f"ready_{os.environ['RANK']}").touch()
time.sleep(100)
"""


def launch(tmp_path, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-m", "mmdet3d.utils.launch", "--standalone", "--nproc-per-node=2", str(script), what,
         str(tmp_path)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_a_failed_process_ends_the_others(tmp_path):
    process = launch(tmp_path, "fail")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "process 1 failed first (exit status 3); all others were ended"
    assert "Traceback" not in err


def test_a_signal_reaches_all_processes(tmp_path):
    process = launch(tmp_path, "wait")
    while len(list(tmp_path.glob("ready_*"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "Traceback" not in err
    assert len(list(tmp_path.glob("asked_*"))) == 2


def test_success(tmp_path):
    process = launch(tmp_path, "done")
    process.communicate(timeout=300)
    assert process.returncode == 0
