"""tools/train.py and the scripts that start it, on a tiny synthetic data set."""

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load_tool

from mmdet3d.core.runner import TrainRunner

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "config/stcocc/stcocc-tiny-synthetic.py")
PUBLISHED = str(ROOT / "config/stcocc/stcocc-r50-16f-openocc-12e.py")
command = load_tool("train")
SCRIPTS = {name: str(ROOT / f"tools/{name}.sh") for name in ("dist_train", "slurm_train")}


@pytest.fixture(autouse=True)
def restored():
    """What a command changes in its process."""
    logger = logging.getLogger("mmdet3d")
    before = logger.level, logger.propagate, list(logger.handlers)
    states = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    for handler in [h for h in logger.handlers if h not in before[2]]:
        logger.removeHandler(handler)
        handler.close()
    logger.level, logger.propagate = before[:2]
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


def options(world, **changes):
    values = {"data.train.ann_file": world / "stcocc-nuscenes_infos_train.pkl", "data.workers_per_gpu": 0,
              "runner.max_iters": 2, "checkpoint_config.interval": 1, "log_config.interval": 1, **changes}
    return ["--cfg-options", *(f"{key}={value}" for key, value in values.items())]


def lines(work_dir):
    """The logged iterations of all runs in a folder, by iteration."""
    found = {}
    for path in sorted(work_dir.glob("*.log.json")):
        for line in path.read_text().splitlines()[1:]:
            content = json.loads(line)
            found.setdefault(content["iter"], []).append(content)
    return found


def test_training_and_resuming(tiny_world, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command.main([CONFIG, "--work-dir", str(whole), *options(tiny_world, **{"runner.max_iters": 3})]) == 0
    text = next(whole.glob("*.log")).read_text()
    for words in ("environment:", "mmcv-full", "seed 0, deterministic: False, config:", "parameters: 1.00 M",
                  "OptimizerHook", "Iter [3/3]"):
        assert words in text, words
    from mmcv import Config
    assert Config.fromfile(str(whole / Path(CONFIG).name)).runner.max_iters == 3
    meta = torch.load(whole / "iter_3.pth", weights_only=True)["meta"]
    assert meta["seed"] == 0 and "runner" in meta["config"] and meta["CLASSES"][0] == "car"
    assert "torchvision" in meta["env_info"]

    stopped = options(tiny_world, **{"runner.max_iters": 2})
    assert command.main([CONFIG, "--work-dir", str(parts), "--auto-resume", *stopped]) == 0
    going_on = options(tiny_world, **{"runner.max_iters": 3, "data.workers_per_gpu": 1})
    assert command.main([CONFIG, "--work-dir", str(parts), "--resume", *going_on]) == 0
    assert [entry["loss"] for entry in lines(whole)[3]] == [entry["loss"] for entry in lines(parts)[3]]
    weights = [torch.load(folder / "iter_3.pth", weights_only=True)["state_dict"] for folder in (whole, parts)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    capsys.readouterr()
    assert command.main([CONFIG, "--work-dir", str(tmp_path / "none"), "--resume", *stopped]) == 1
    assert "holds no checkpoint to resume from" in capsys.readouterr().err


def test_a_resume_reads_the_checkpoint_once_and_keeps_nothing_of_it(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr("mmdet3d.apis.train.collect_env", dict)  # which takes seconds
    monkeypatch.setattr("mmdet3d.apis.train.format_env", str)
    config, folder = tmp_path / "with_averages.py", tmp_path / "work"
    config.write_text(f"_base_ = [{CONFIG!r}]\ncustom_hooks = [dict(type='MEGVIIEMAHook', interval=-1)]\n")
    train, load, read, tensors, alive = TrainRunner.train, torch.load, [], [], []

    def counted(path, *args, **kwargs):
        content = load(path, *args, **kwargs)
        read.append(Path(path).resolve().name)
        if "state_dict" in content:
            for weights in (content["state_dict"], content["training_state"]["hooks"]["ema"]["state_dict"]):
                tensors.extend(map(weakref.ref, weights.values()))
        return content

    def watched(self, batches, **kwargs):
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in tensors))
        return train(self, batches, **kwargs)

    monkeypatch.setattr(torch, "load", counted)
    monkeypatch.setattr(TrainRunner, "train", watched)
    for finished, resume in enumerate(([], ["--resume"], ["--resume", str(folder / "iter_2.pth")])):
        read.clear(), tensors.clear(), alive.clear()
        assert command.main([str(config), "--work-dir", str(folder), *resume,
                             *options(tiny_world, **{"runner.max_iters": finished + 1})]) == 0
        assert sorted(read) == ([f"iter_{finished}.pth", "rank_0.pth"] if resume else [])
        assert alive == [0] and bool(tensors) is bool(resume)


def test_published_weights_are_asked_for_before_anything_is_read(tmp_path, capsys):
    assert command.main([PUBLISHED, "--work-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "error: load_from: pretrained/forward_projection-r50-4d-stereo-pretrained.pth does not exist" in err
    assert "init_backbone=<file>" in err and "Traceback" not in err


@pytest.mark.parametrize("change, message", [
    ("runner.type=EpochBasedRunner", "runner.type: expected IterBasedRunner, got 'EpochBasedRunner'"),
    ("runner.max_iter=5", "runner: unknown ['max_iter'] (did you mean 'max_iters'?)"),
    ("runner.max_iters=0", "runner.max_iters: expected a positive whole number"),
    ("fp16.loss_scale=512", "fp16 is not supported; precision='bf16'"),
    ("precision=half", "precision: expected one of ['bf16', 'fp32'], got 'half'"),
    ("dist_params.backends=gloo", "dist_params: unknown ['backends']"),
    ("optimizer.type=AdamX", "optimizer: "), ("optimizer.lrr=1", "optimizer: "),
    ("data.train_dataloader.shuffle=True", "data.train_dataloader: unknown ['shuffle']"),
    ("data.samples_per_gpu=99", "data: 4 sequences cannot fill 99 batch slots"),
    ("revise_keys=3", "revise_keys is not supported")])
def test_configs_that_cannot_be_trained(tiny_world, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr("mmdet3d.apis.train.collect_env", dict)  # which takes seconds
    monkeypatch.setattr("mmdet3d.apis.train.format_env", str)
    assert command.main([CONFIG, "--work-dir", str(tmp_path), *options(tiny_world), change]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert message in err and err.startswith("error: ") and err.endswith("(--debug shows where)")


def test_command_line():
    args = command.parse_args(["c.py", "--local_rank", "3", "--options", "a=1", "b=None"])
    assert args.local_rank == 3 and args.cfg_options == {"a": 1, "b": None} and args.seed == 0
    args = command.parse_args(["c.py", "--local-rank=2", "--resume", "--gpu-ids", "1", "2", "--launcher", "slurm"])
    assert args.local_rank == 2 and args.resume == "latest" and args.gpu_ids == [1, 2]
    assert command.parse_args(["c.py", "--resume-from", "a.pth"]).resume == "a.pth"
    assert command.parse_args(["c.py", "--resume", "b.pth", "--gpus", "1"]).resume == "b.pth"


@pytest.mark.parametrize("arguments", [
    ["c.py", "--gpus", "1", "--gpu-id", "0"], ["c.py", "--gpus", "4"], ["c.py", "--resume", "--auto-resume"],
    ["c.py", "--cfg-options", "a=1", "--options", "b=2"], ["c.py", "--launcher", "ssh"]])
def test_options_that_exclude_each_other(arguments):
    with pytest.raises(SystemExit) as error:
        command.parse_args(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_explain_themselves(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    asked = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0 and asked.stdout.startswith("usage: bash tools/")
    missing = subprocess.run(["bash", script, "config.py"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and missing.stderr.startswith("usage: bash tools/")


def call(script, *arguments, tmp_path, **environment):
    """Arguments and some of the environment that a script hands to the interpreter or to srun."""
    for name in ("fake_python", "srun"):
        path = tmp_path / name
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$OMP_NUM_THREADS" "$@"\n')
        path.chmod(0o755)
    clean = {key: value for key, value in os.environ.items()
             if key not in ("PORT", "NNODES", "NODE_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "GPUS", "GPUS_PER_NODE")}
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False, env={
        **clean, "PYTHON": str(tmp_path / "fake_python"), "PATH": f"{tmp_path}:{clean['PATH']}", **environment})
    return done, done.stdout.splitlines()


def test_dist_train_starts_torchrun(tmp_path):
    done, (path, threads, *arguments) = call(SCRIPTS["dist_train"], "c.py", "3", "--validate", tmp_path=tmp_path)
    assert done.returncode == 0 and path.split(":")[0] == str(ROOT) and int(threads) >= 1
    assert arguments == ["-m", "mmdet3d.utils.launch", "--nnodes=1", "--rdzv-backend=c10d",
                         "--rdzv-endpoint=localhost:0", "--nproc-per-node=3", str(ROOT / "tools/train.py"), "c.py",
                         "--seed", "0", "--launcher", "pytorch", "--validate"]
    _, (_, threads, *arguments) = call(SCRIPTS["dist_train"], "c.py", "8", tmp_path=tmp_path, NNODES="2", NODE_RANK="1",
                                       MASTER_ADDR="node7", OMP_NUM_THREADS="7")
    assert threads == "7" and arguments[2:7] == ["--nnodes=2", "--node-rank=1", "--master-addr=node7",
                                                 "--master-port=29500", "--nproc-per-node=8"]
    _, (_, _, *arguments) = call(SCRIPTS["dist_train"], "c.py", "2", tmp_path=tmp_path, PORT="1234")
    assert arguments[2:6] == ["--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=1234"]
    done, _ = call(SCRIPTS["dist_train"], "c.py", "two", tmp_path=tmp_path)
    assert done.returncode == 2 and "GPUS must be a positive whole number, got 'two'" in done.stderr


def test_slurm_train_starts_srun(tmp_path):
    done, (path, _, *arguments) = call(
        SCRIPTS["slurm_train"], "part", "job", "c.py", "--auto-resume", tmp_path=tmp_path, GPUS="16",
        SRUN_ARGS="--time=1:00:00 --signal=TERM@120")
    assert done.returncode == 0 and path.split(":")[0] == str(ROOT)
    assert arguments == ["--partition=part", "--job-name=job", "--gres=gpu:8", "--ntasks=16", "--ntasks-per-node=8",
                         "--cpus-per-task=5", "--kill-on-bad-exit=1", "--time=1:00:00", "--signal=TERM@120",
                         str(tmp_path / "fake_python"), "-u", str(ROOT / "tools/train.py"), "c.py", "--seed", "0",
                         "--launcher", "slurm", "--auto-resume"]
    _, (_, _, *arguments) = call(SCRIPTS["slurm_train"], "part", "job", "c.py", tmp_path=tmp_path, GPUS="2")
    assert arguments[2:5] == ["--gres=gpu:2", "--ntasks=2", "--ntasks-per-node=2"]


def start(world, work_dir, processes, **changes):
    return subprocess.run(
        ["bash", SCRIPTS["dist_train"], CONFIG, str(processes), "--work-dir", str(work_dir),
         *options(world, **changes)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_processes(tiny_world, tmp_path):
    work_dir = tmp_path / "two"
    done = start(tiny_world, work_dir, 2, **{"data.workers_per_gpu": 1})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work_dir / "iter_2.pth").is_file() and sorted(lines(work_dir)) == [1, 2]
    assert "2 processes on cpu" in next(work_dir.glob("*.log")).read_text()
    assert len(list(work_dir.glob("*.log"))) == 1


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_job(tiny_world, tmp_path):
    done = start(tiny_world, tmp_path, 2, **{"data.samples_per_gpu": 3})
    assert done.returncode == 1
    for words in ("error: data: 4 sequences cannot fill 6 batch slots (2 processes x batch 3)", "rank ",
                  "failed first (exit status 1); all others were ended"):
        assert words in done.stderr, done.stderr[-3000:]
