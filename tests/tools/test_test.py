"""The command that evaluates a checkpoint, alone and as several processes."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load_tool

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/core"))

import evaluation_case as case  # noqa: E402

command = load_tool("test")
FRAMES = sum(case.LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread; and what a command changes in its process is restored afterwards."""
    logger, threads = logging.getLogger("mmdet3d"), torch.get_num_threads()
    before = logger.level, logger.propagate, list(logger.handlers)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.level, logger.propagate, logger.handlers[:] = before


@pytest.fixture(scope="module")
def setting(tiny_world, tmp_path_factory):
    """Config, checkpoint and options that name the data."""
    checkpoint = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"state_dict": case.model(case.dataset(tiny_world)).state_dict()}, checkpoint)
    return [str(case.CONFIG), str(checkpoint)], [
        "--cfg-options", f"data.test.ann_file={case.mixed_infos(tiny_world)}", "data.workers_per_gpu=0"]


def run(setting, folder, *options):
    """Exit status, and what is in results.json if it is there."""
    status = command.main([*setting[0], "--work-dir", str(folder), *options, *setting[1]])
    file = folder / "results.json"
    return status, json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def plain(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return run(setting, folder, "--out", str(folder / "files"))[1], folder / "files"


def test_results_say_how_they_were_made(plain, setting):
    record, folder = plain
    assert record["samples"] == FRAMES and record["world_size"] == 1 and record["missing"] == []
    assert record["options"] == {
        "graphs": None,
        "samples_per_gpu": 1, "workers_per_gpu": 0, "order": "exact", "scene_start": "none",
        "noise_seed": 0, "mode": "exact", "fold": True,
        "score": True, "out": str(folder), "pairing": "token", "scenes": None, "cache": None}
    assert record["checkpoint"] == setting[0][1] and record["device"] == "cpu"
    assert record["ray_iou"]["rays"] > 0 and record["ray_iou"]["mave"] > 0
    assert {"torch", "mmdet3d", "numpy"} <= set(record["versions"])


def test_files_hold_labels_and_flow(plain):
    files = list(plain[1].rglob("*.npz"))
    assert len(files) == FRAMES
    with np.load(files[0]) as file:
        assert set(file) == {"semantics", "flow"} and file["semantics"].dtype == np.uint8
        assert file["flow"].dtype == np.float16 and file["flow"].shape == (*file["semantics"].shape, 2)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_files_score_the_same(plain, tiny_world, tmp_path, workers):
    """With tools/rayiou.py, which knows the coarser grid of the model from the files."""
    record, folder = plain
    status = load_tool("rayiou").main([
        "--pred", str(folder), "--gt", str(tiny_world / "openocc_v2"), "--infos", str(case.mixed_infos(tiny_world)),
        "--dataset", "openocc", "--workers", workers, "--json", str(tmp_path / "files.json")])
    found = json.loads((tmp_path / "files.json").read_text())
    assert status == 0 and found["grid"] == [40, 40, 8]
    for scores in ("ray_iou", "voxel_iou", "moving"):
        assert found[scores] == record[scores], scores
    assert record["moving"]["rays"] > 0 and record["ray_iou"]["flow_rays"] > 0


def test_the_table_of_the_reference_is_printed(setting, tmp_path, capsys):
    status, record = run(setting, tmp_path, "--eval", "bbox", "--tmpdir", "x", "--gpu-collect", "--local-rank", "0")
    text = capsys.readouterr().out
    assert status == 0 and re.search(r"\| +Class Names +\| IoU@1 \| IoU@2 \| IoU@4 \| +AVE +\|", text)
    assert f"MIOU: {record['ray_iou']['miou']!r}" in text and f"'mave': {record['ray_iou']['mave']!r}" in text
    assert f"{FRAMES} samples in" in text and "noise: by sample, seed 0" in text


def test_other_options_reach_the_evaluation(setting, tmp_path, capsys):
    status, record = run(setting, tmp_path, "--carry-over", "--noise", "generator", "--samples-per-gpu", "2", "--order",
                         "published", "--seed", "3")
    options = record["options"]
    assert status == 0 and options["scene_start"] == "carried" and options["noise_seed"] is None
    assert options["order"] == "published"
    assert options["samples_per_gpu"] == 2 and "start of a scene: carried" in capsys.readouterr().out


def test_folded_batch_norm_changes_roundings_only(plain, setting, tmp_path):
    status, record = run(setting, tmp_path, "--no-fuse-conv-bn", "--out", str(tmp_path / "files"))
    assert status == 0 and record["options"]["fold"] is False
    assert record["voxel_iou"]["miou"] == pytest.approx(plain[0]["voxel_iou"]["miou"], abs=0.1)
    files = sorted(plain[1].rglob("*.npz"))
    same = [np.mean(np.load(path)["semantics"] == np.load(tmp_path / "files" / path.relative_to(plain[1]))["semantics"])
            for path in files]
    assert min(same) > 0.99


def test_averaged_weights_of_a_training(setting, plain, tmp_path, capsys):
    """Those of the checkpoint are the ones evaluated otherwise; the trained ones beside them are zero."""
    assert run(setting, tmp_path, "--averaged") == (2, None)
    assert "tiny.pth: holds no averaged weights" in capsys.readouterr().err
    weights = torch.load(setting[0][1], weights_only=True)["state_dict"]
    torch.save({"state_dict": {key: torch.zeros_like(value) for key, value in weights.items()},
                "training_state": {"hooks": {"ema": {"state_dict": weights, "updates": 3}}}}, tmp_path / "x.pth")
    status, record = run([[setting[0][0], str(tmp_path / "x.pth")], setting[1]], tmp_path, "--averaged")
    assert status == 0 and record["averaged"] is True and plain[0]["averaged"] is False
    assert record["ray_iou"] == plain[0]["ray_iou"]


def test_format_only_compares_nothing(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, record = run(setting, tmp_path, "--format-only", "--eval", "bbox")
    assert status == 0 and "ray_iou" not in record and "Class Names" not in capsys.readouterr().out
    assert len(list((tmp_path / "results").rglob("*.npz"))) == FRAMES


@pytest.mark.parametrize("options, message", [
    (["--out", "all.pkl"], "expected a folder; predictions are written one file a sample"),
    (["--gpu-ids", "0", "1"], "for several: bash tools/dist_test.sh"),
    (["--gpu-id", "0", "--device", "cpu"], "give one of them"),
    (["--device", "cpu", "--launcher", "pytorch"], "every process takes the GPU with its local number"),
    (["--pairing", "index"], "--pairing index needs --scenes FILE"),
    (["--samples-per-gpu", "0"], "--samples-per-gpu must be at least 1, got 0"),
])
def test_options_that_do_not_fit(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse_args(["config.py", "weights.pth", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_errors_are_one_line(setting, tmp_path, capsys):
    wrong = [[setting[0][0], str(tmp_path / "absent.pth")], setting[1]]
    assert run(wrong, tmp_path) == (2, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "absent.pth: no such file" in lines[0]


def launch(script, *arguments, **environment):
    env = {key: value for key, value in os.environ.items() if key not in ("PORT", "NNODES", "NODE_RANK", "MASTER_ADDR")}
    return subprocess.run(["bash", str(ROOT / "tools" / script), *arguments], capture_output=True, text=True,
                          timeout=600, check=False,
                          env={**env, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment})


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(plain, setting, tmp_path):
    done = launch("dist_test.sh", *setting[0], "2", "--work-dir", str(tmp_path), "--out", str(tmp_path / "files"),
                  *setting[1])
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["world_size"] == 2
    assert record["ray_iou"] == plain[0]["ray_iou"] and record["voxel_iou"] == plain[0]["voxel_iou"]
    assert done.stdout.count("Class Names") == 1
    for path in plain[1].rglob("*.npz"):
        with np.load(path) as one, np.load(tmp_path / "files" / path.relative_to(plain[1])) as other:
            np.testing.assert_array_equal(one["semantics"], other["semantics"])
            np.testing.assert_array_equal(one["flow"], other["flow"])


@pytest.mark.slow
def test_the_error_of_one_process_ends_the_job(setting, tiny_world, tmp_path):
    """A damaged label file: the process that meets it says so, and the other one, which waits, is ended."""
    import pickle

    broken = pickle.loads(case.mixed_infos(tiny_world).read_bytes())
    broken["infos"][-1]["occ_path"] = "./gts/no-scene/no-sample"
    path = tiny_world / "broken.pkl"
    path.write_bytes(pickle.dumps(broken))
    done = launch("dist_test.sh", *setting[0], "2", "--work-dir", str(tmp_path), "--cfg-options",
                  f"data.test.ann_file={path}", "data.workers_per_gpu=0")
    assert done.returncode != 0 and not (tmp_path / "results.json").exists()
    told = [line for line in done.stderr.splitlines() if re.match(r"rank \d: error: ", line)]
    assert len(told) == 1 and "no-sample" in told[0]


@pytest.mark.parametrize("script, needed", [("dist_test.sh", "CONFIG CHECKPOINT GPUS"),
                                            ("slurm_test.sh", "PARTITION JOB_NAME CONFIG CHECKPOINT")])
def test_scripts_say_what_they_need(script, needed):
    done = launch(script, "one")
    assert done.returncode == 2 and needed in done.stderr
    assert launch(script, "--help").returncode == 0


def test_the_number_of_processes_is_checked():
    done = launch("dist_test.sh", "config", "weights", "two")
    assert done.returncode == 2 and "GPUS must be a positive whole number, got 'two'" in done.stderr


def test_slurm_gets_what_was_asked_for(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = launch("slurm_test.sh", "part", "job", "c.py", "w.pth", "--out", "files", GPUS="4",
                  SRUN_ARGS="--time=1 -x n", PATH=f"{tmp_path}:{os.environ['PATH']}")
    words = done.stdout.split()
    assert {"--partition=part", "--job-name=job", "--ntasks=4", "--gres=gpu:4", "--time=1", "-x"} <= set(words)
    assert words[-6:] == ["c.py", "w.pth", "--launcher", "slurm", "--out", "files"]
