"""Processes of a job: where they stand, and that they train one model."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from processes import run_job
from small_training import batch, build_model
from torch import distributed

from mmdet3d.core.parallel import DistributedModel, Place, choose_gpu, find_place, init_distributed, unwrap
from mmdet3d.registry import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
         "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_NODELIST", "SLURM_JOB_ID",
         *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return put


@pytest.fixture
def group():
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_each_launcher_says_where_a_process_stands(environment):
    assert find_place("none") == Place(0, 1, 0, 1)
    environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, SLURM_PROCID=3, SLURM_NTASKS=6,
                SLURM_LOCALID=2, SLURM_NTASKS_PER_NODE="3(x2)", OMPI_COMM_WORLD_RANK=7, OMPI_COMM_WORLD_SIZE=9,
                OMPI_COMM_WORLD_LOCAL_RANK=0, OMPI_COMM_WORLD_LOCAL_SIZE=2)
    assert find_place("pytorch") == Place(5, 8, 1, 4)
    assert find_place("slurm") == Place(3, 6, 2, 3)
    assert find_place("mpi") == Place(7, 9, 0, 2)


@pytest.mark.parametrize("launcher, message", [
    ("pytorch", "RANK is None, expected a number; was this process started by the launcher"),
    ("slurm", "SLURM_PROCID is None"), ("mpi", "OMPI_COMM_WORLD_RANK is None"),
    ("ssh", "launcher: expected one of none")])
def test_processes_that_were_not_launched(environment, launcher, message):
    with pytest.raises(ValueError, match=message):
        find_place(launcher)


def test_torchrun_without_launcher_is_refused(environment):
    environment(WORLD_SIZE=4, TORCHELASTIC_RUN_ID="x")
    with pytest.raises(ValueError, match="4 processes, which without --launcher pytorch would all do the same"):
        find_place("none")


def test_gpus_are_shared_only_on_request(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_gpu(Place(5, 8, 1, 4), "nccl") == torch.device("cuda", 1)
    assert choose_gpu(Place(3, 8, 3, 4), "gloo") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU of its own: PyTorch sees 2"):
        choose_gpu(Place(3, 8, 3, 4), "nccl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_gpu(Place(3, 8, 3, 4), "nccl", own_gpu_only=True) == torch.device("cuda", 0)
    assert chosen == [1, 1, 0]


@pytest.mark.parametrize("params, message", [
    ({"backends": "nccl"}, r"dist_params: unknown \['backends'\].*did you mean|dist_params: unknown"),
    ({"backend": "smoke"}, "dist_params.backend: expected nccl or gloo")])
def test_wrong_parameters(params, message):
    with pytest.raises(ConfigError, match=message):
        init_distributed("none", params)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_published_backend_works_without_a_gpu(environment, group):
    assert init_distributed("none", {"backend": "nccl"}) == torch.device("cpu")
    assert not distributed.is_initialized()
    environment(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    assert init_distributed("pytorch", {"backend": "nccl", "timeout": 30}) == torch.device("cpu")
    assert distributed.get_backend() == "gloo" and distributed.get_world_size() == 1


def test_jobs_meet_at_a_port_of_their_own(environment, monkeypatch, group):
    ports = []
    monkeypatch.setattr(distributed, "init_process_group", lambda *a, **k: ports.append(os.environ["MASTER_PORT"]))
    environment(SLURM_PROCID=0, SLURM_NTASKS=1, SLURM_LOCALID=0, SLURM_JOB_ID=123456, MASTER_ADDR="127.0.0.1")
    init_distributed("slurm", {"backend": "gloo"})
    init_distributed("slurm", {"backend": "gloo", "port": 5})
    assert ports == [str(20000 + 123456 % 40000), "5"]
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout="node7\nnode8\n"))
    environment(SLURM_NODELIST="node[7-8]")
    init_distributed("slurm", {"backend": "gloo"})
    assert os.environ["MASTER_ADDR"] == "node7"
    monkeypatch.delenv("MASTER_ADDR")
    environment(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=1, OMPI_COMM_WORLD_LOCAL_RANK=0,
                OMPI_COMM_WORLD_LOCAL_SIZE=1)
    with pytest.raises(ValueError, match="set the environment variable MASTER_ADDR"):
        init_distributed("mpi", {"backend": "gloo"})


def test_unwrap(tmp_path, group):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    model = build_model()
    wrapped = DistributedModel(model)
    assert unwrap(wrapped) is model and unwrap(model) is model
    assert not wrapped.broadcast_buffers and not wrapped.find_unused_parameters
    outputs = wrapped.train_step(batch(0), None)
    assert outputs["num_samples"] == 1 and outputs["loss"].requires_grad


RANKS = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths}
import torch
from processes import gloo_threads
from small_training import Loader, batches, build_model, make_runner
from mmdet3d.core.parallel import DistributedModel, init_distributed, leave_distributed
from mmdet3d.core.interrupt import TrainingInterrupted

class Every(Loader):
    def __iter__(self):
        for number, batch in enumerate(batches()):
            if number % 2 == rank:
                yield batch

def train():
    for name, options in (("plain", {{}}), ("accumulated", {{"cumulative_iters": 2}})):
        model = DistributedModel(build_model(seed=rank))  # the weights of rank 0 count
        runner = make_runner(out / name, 4, model=model, lr={{"policy": "fixed"}}, optimizer_config=options)
        runner.run([Every()])
        torch.save(model.module.state_dict(), out / f"{{name}}_{{rank}}.pth")
    stop = make_runner(out / "stop", 9, model=DistributedModel(build_model()),
                       record=lambda runner: rank == 1 and runner.iter == 2 and os.kill(os.getpid(), 15))
    try:
        stop.run([Every()])
    except TrainingInterrupted as error:
        return f"{{error.exit_status}} {{stop.iter}}"

torch.set_num_threads(1)
init_distributed("pytorch", {{"backend": "gloo", "timeout": 60}})
out, rank = Path(sys.argv[1]), torch.distributed.get_rank()
ended, before = train(), gloo_threads()
leave_distributed()
(out / f"ended_{{rank}}").write_text(f"{{ended}}, threads {{before > 0}} {{gloo_threads()}}")
"""


def test_two_processes_train_one_model_and_stop_together(tmp_path):
    """Averaged gradients of two batches are those of one process that accumulates both; no thread is left behind."""
    from small_training import Loader, make_runner

    here = Path(__file__).parent
    (tmp_path / "ranks.py").write_text(RANKS.format(paths=[str(here.parents[1]), str(here.parent), str(here)]))
    done = run_job(2, tmp_path / "ranks.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"ended_{rank}").read_text() for rank in range(2)] == ["143 3, threads True 0"] * 2
    for name, group_size in (("plain", 2), ("accumulated", 4)):
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pth") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
        alone = make_runner(tmp_path / f"{name}_alone", 8, lr={"policy": "fixed"},
                            optimizer_config={"cumulative_iters": group_size})
        alone.run([Loader()])
        for key, value in alone.model.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-8)
        assert not torch.equal(first["linear.weight"], build_model().linear.weight)
