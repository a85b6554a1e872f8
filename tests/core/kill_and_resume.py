"""Kills a training at random moments, lets it continue each time, and compares it with one that nobody disturbed.

    python kill_and_resume.py <folder> --kills 20 [--real] [--fresh] [--seed 0]

Prints one JSON object. A checkpoint is written after every iteration, so that many kills fall into the writing.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import training_run

from mmdet3d.core.checkpoint_files import list_checkpoints
from mmdet3d.utils.checkpoint import CheckpointError, read_checkpoint

MOST_ITERATIONS = 4
"""Iterations after the first one of a part, at most, before it is killed: 20 parts then do not reach the end."""


def launch(work_dir, options, fresh):
    """Start the training in a process group of its own; returns its id."""
    if fresh:
        return subprocess.Popen([sys.executable, training_run.__file__, str(work_dir), json.dumps(options)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True).pid
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            training_run.start(work_dir, **options)
            status = 0
        finally:
            os._exit(status)
    return child


def lines_of(work_dir):
    path = Path(work_dir) / "losses_0.txt"
    return path.read_text().count("\n") if path.exists() else 0


def wait(child, until=lambda: False, timeout=300.0):
    """Wait for the end of a process, and return its status, or until a condition holds: None."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    raise TimeoutError(f"process {child} neither ended nor went on")


def unreadable_in(work_dir):
    """Checkpoints that cannot be read, of all that are there."""
    wrong = []
    for path in [*list_checkpoints(work_dir), *work_dir.glob("*_ema.pth"), *work_dir.glob("state/*/rank_*.pth")]:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            if "state_dict" not in str(error):  # a rank file is a plain dict, and otherwise in order
                wrong.append(str(error))
    return wrong


def undisturbed(work_dir, options, fresh):
    """Train to the end; seconds from the first iteration on."""
    child = launch(work_dir, options, fresh)
    assert wait(child, until=lambda: lines_of(work_dir) > 0, timeout=1200) is None
    start = time.monotonic()
    assert wait(child, timeout=1200) == 0
    return time.monotonic() - start


def run(folder, kills, real=False, fresh=False, seed=0):
    """Returns what happened as a dict."""
    generator = random.Random(seed)
    max_iters = 6 * kills
    options = {"small": not real, "interval": 1, "keep": 3, "workers": 1, "resume": "latest", "max_iters": max_iters}
    whole, parts = folder / "whole", folder / "parts"
    for work_dir in (whole, parts):
        work_dir.mkdir(parents=True)
    pause = MOST_ITERATIONS * undisturbed(whole, options, fresh) / max_iters
    result = {"kills": 0, "leftovers": 0, "iterations_when_killed": [], "unreadable": [], "max_iters": max_iters}
    while result["kills"] < kills:
        before = lines_of(parts)
        child = launch(parts, options, fresh)
        # One in four dies before or while it resumes, the others some time after their first iteration.
        early = generator.random() < 0.25
        status = None if early else wait(child, until=lambda before=before: lines_of(parts) > before)
        if status is None:
            end = time.monotonic() + generator.uniform(0, pause)
            status = wait(child, until=lambda end=end: time.monotonic() > end)
        if status is not None:
            assert status == 0, f"a training ended with status {status}"
            break
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        result["kills"] += 1
        result["iterations_when_killed"].append(len(training_run.read_losses(parts)) if lines_of(parts) else 0)
        result["leftovers"] += len([*parts.glob(".*.tmp"), *parts.glob("state/*/.*.tmp")])
        result["unreadable"] += unreadable_in(parts)
    assert wait(launch(parts, options, fresh), timeout=1200) == 0
    found, expected = training_run.read_losses(parts), training_run.read_losses(whole)
    weights = [read_checkpoint(work_dir / f"iter_{max_iters}_ema.pth")["state_dict"] for work_dir in (parts, whole)]
    result["lines"] = lines_of(parts)
    result["same_losses"] = found == expected and len(expected) == max_iters
    result["same_weights"] = all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[1])
    result["left_at_the_end"] = len([*parts.glob(".*.tmp"), *parts.glob("state/*/.*.tmp")])
    result["checkpoints_at_the_end"] = [path.name for path in list_checkpoints(parts)]
    return result


def main():
    training_run.torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="the model of the tiny config instead of the smallest one")
    parser.add_argument("--fresh", action="store_true", help="new interpreters instead of forks of this process")
    sys.stdout.write(json.dumps(run(**vars(parser.parse_args()))) + "\n")


if __name__ == "__main__":
    main()
