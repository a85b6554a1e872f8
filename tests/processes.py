"""Jobs of several processes, and what they leave behind."""

import os
import subprocess
import sys
from pathlib import Path


def run_job(count, script, *arguments, timeout=300):
    """``count`` processes of a Python script, one thread each; the finished process, torchrun if there are several.

    What several processes print can mix in the middle of a line: let them write files.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    return subprocess.run([sys.executable, *launcher, *map(str, (script, *arguments))], capture_output=True, text=True,
                          check=False, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})


def gloo_threads():
    """Number of threads that gloo has in this process."""
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
