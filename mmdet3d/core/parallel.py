"""Several processes: how they find each other, and the model that they train together."""

from __future__ import annotations

import datetime
import gc
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdet3d.registry import ConfigError, check_keys

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


class DistributedModel(DistributedDataParallel):
    """``DistributedDataParallel`` whose ``train_step`` goes through its ``forward``, so that gradients are averaged.

    Batches are not moved: the loop puts what belongs there on the device of the model.

    Args:
        module: The detector, on the device of this process.
        find_unused_parameters: Search the graph for parameters without a gradient; the models here have none.
    """

    def __init__(self, module: nn.Module, find_unused_parameters: bool = False) -> None:
        super().__init__(module, broadcast_buffers=False, find_unused_parameters=find_unused_parameters)

    def train_step(self, data: Mapping[str, Any], optimizer: Any = None) -> dict[str, Any]:
        """As ``train_step`` of the detector: ``loss``, ``log_vars`` (averaged over processes) and ``num_samples``."""
        losses = self(return_loss=True, **data)
        loss, log_vars = self.module.parse_losses(losses)
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(data["img_metas"])}

    val_step = train_step


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside a parallel wrapper, or ``model`` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job.

    Attributes:
        rank: Number of the process, 0 to ``world_size - 1``.
        world_size: Number of processes.
        local_rank: Number of the process on its machine.
        local_size: Processes on this machine, as far as the launcher says.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def _number(name: str, launcher: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ValueError(f"--launcher {launcher}: the environment variable {name} is "
                         f"{os.environ.get(name)!r}, expected a number; was this process started by the launcher?"
                         ) from None


def find_place(launcher: str) -> Place:
    """What the environment of a launcher says about this process.

    Raises:
        ValueError: ``launcher`` is unknown, or this process was not started by it.
    """
    if launcher == "pytorch":
        return Place(*(_number(name, launcher) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
                     int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if launcher == "slurm":
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE", "1").partition("(")[0]
        return Place(*(_number(name, launcher) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
                     int(tasks))
    if launcher == "mpi":
        return Place(*(_number(f"OMPI_COMM_WORLD_{name}", launcher)
                       for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    if launcher != "none":
        raise ValueError(f"launcher: expected one of {', '.join(LAUNCHERS)}, got {launcher!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} processes, which without --launcher pytorch "
                         "would all do the same work; add it")
    return Place()


def _rendezvous(launcher: str, port: int | None) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher does not; the same in all processes."""
    if launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        nodes = subprocess.run(["scontrol", "show", "hostnames", os.environ["SLURM_NODELIST"]], capture_output=True,
                               text=True, check=True).stdout.split()
        os.environ["MASTER_ADDR"] = nodes[0]
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(f"--launcher {launcher}: set the environment variable MASTER_ADDR to the first machine")
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    elif "MASTER_PORT" not in os.environ:
        job = int(os.environ.get("SLURM_JOB_ID", "9500").partition("_")[0])
        os.environ["MASTER_PORT"] = str(20000 + job % 40000)  # other jobs on these machines get other ports


def choose_gpu(place: Place, backend: str, own_gpu_only: bool = False) -> torch.device:
    """The device of a process: the GPU with its local number, or the CPU where there is none.

    Args:
        place: Where the process stands.
        backend: Backend of the process group.
        own_gpu_only: The launcher may show each process its own GPU only, as Slurm does if asked to.

    Raises:
        ValueError: NCCL is to be used by more processes than there are GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return torch.device("cpu")
    if backend == "nccl" and place.local_rank >= count and not (own_gpu_only and count == 1):
        raise ValueError(f"process {place.local_rank} of this machine has no GPU of its own: PyTorch sees {count}; "
                         f"start at most {count} processes, or set dist_params.backend=gloo to share GPUs")
    torch.cuda.set_device(place.local_rank % count)
    return torch.device("cuda", place.local_rank % count)


def init_distributed(launcher: str, dist_params: Mapping[str, Any] | None = None) -> torch.device:
    """Join the processes of a job; does nothing but choosing the device with the launcher "none".

    Args:
        launcher: "none", "pytorch" (torchrun), "slurm" or "mpi".
        dist_params: ``backend`` ("nccl", which becomes "gloo" on machines without GPU, or "gloo"), ``timeout`` in
            seconds after which a process that waits for the others in vain ends with an error (default: PyTorch's, 10
            minutes with NCCL and 30 with gloo) and ``port`` (slurm and mpi; default: MASTER_PORT, else one that
            follows from the job).

    Returns:
        The device of this process.

    Raises:
        ConfigError: ``dist_params`` has another key.
        ValueError: the launcher is unknown or did not start this process, or GPUs are missing.
    """
    params = {} if dist_params is None else dict(dist_params)
    check_keys(params, ("backend", "timeout", "port"), "dist_params")
    backend, timeout = params.get("backend", "nccl"), params.get("timeout")
    if backend not in ("nccl", "gloo"):
        raise ConfigError(f"dist_params.backend: expected nccl or gloo, got {backend!r}")
    place = find_place(launcher)
    device = choose_gpu(place, backend if launcher != "none" else "", own_gpu_only=launcher == "slurm")
    if launcher == "none":
        return device
    _rendezvous(launcher, params.get("port"))
    backend = backend if device.type == "cuda" else "gloo"
    options = {} if timeout is None else {"timeout": datetime.timedelta(seconds=float(timeout))}
    if backend == "nccl":
        options["device_id"] = device
    dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, **options)
    return device


def leave_distributed() -> None:
    """Leave the processes of a job, if this is one of them; to be called when model and runner are out of use.

    A thread of gloo releases the tensors of a collective some time after the result is there, and needs the Python
    interpreter for it. If that is shutting down by then, PyTorch aborts the process and the launcher reports a
    failure. The threads end with the last reference to the group, which models and hooks may have: these go first.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
