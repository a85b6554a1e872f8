"""Train the model of a config file.

    python tools/train.py config/stcocc/stcocc-r50-16f-openocc-12e.py
    bash tools/dist_train.sh config/stcocc/stcocc-r50-16f-openocc-12e.py 8

Logs, checkpoints and the resolved config go to work_dirs/<name of the config> or --work-dir. Ctrl-C saves and ends;
--resume goes on as if nothing had happened.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    from mmcv import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", metavar="DIR", help="folder of logs and checkpoints")
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", nargs="?", const="latest", metavar="FILE",
                          help="go on from a checkpoint; without FILE from the newest of the work directory")
    going_on.add_argument("--resume-from", dest="resume", metavar="FILE", help="the same with a file")
    going_on.add_argument("--auto-resume", action="store_true",
                          help="go on from the newest checkpoint of the work directory if there is one")
    parser.add_argument("--allow-new-layout", action="store_true",
                        help="resume with another number of processes or batch size: the order of samples begins anew")
    parser.add_argument("--allow-unsafe-checkpoint", action="store_true",
                        help="read a checkpoint that could run code: only from people you trust")
    parser.add_argument("--validate", action="store_true", help="evaluate during training")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--gpus", type=int, metavar="N", help="deprecated; 1 (several GPUs: dist_train.sh)")
    devices.add_argument("--gpu-ids", type=int, nargs="+", metavar="ID", help="deprecated; the first one is used")
    devices.add_argument("--gpu-id", type=int, metavar="ID", help="GPU of a training without launcher (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    parser.add_argument("--diff-seed", action="store_true", help="add the rank to the seed")
    parser.add_argument("--deterministic", action="store_true", help="algorithms that give the same bits in every run")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE",
                        help="change the config, such as optimizer.lr=2e-4 data.samples_per_gpu=1")
    parser.add_argument("--options", nargs="+", action=DictAction, metavar="KEY=VALUE",
                        help="deprecated name of --cfg-options")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none",
                        help="what started this process (%(default)s)")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help="set by some launchers; not read")
    parser.add_argument("--autoscale-lr", action="store_true",
                        help="multiply the learning rate by processes / GPUs of the recipe")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    args = parser.parse_args(argv)
    if args.options and args.cfg_options:
        parser.error("--options is the old name of --cfg-options: use one of them")
    if args.gpus not in (None, 1):
        parser.error(f"--gpus {args.gpus}: one process trains on one GPU; use tools/dist_train.sh CONFIG {args.gpus}")
    args.cfg_options = args.cfg_options or args.options
    return args


def read_config(args: argparse.Namespace):
    """The config with the changes of the command line."""
    from mmdet3d.apis.inference import load_config

    cfg = load_config(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def prepare_processes(cfg, device) -> None:
    """Keep worker processes from starting threads of their own, which would compete with each other."""
    import cv2

    cv2.setNumThreads(cfg.get("opencv_num_threads", 0))
    if device.type == "cuda" and cfg.data.get("workers_per_gpu", 2) > 1:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


def agreed_timestamp() -> str:
    """The time of process 0, which names the logs."""
    from torch import distributed as dist

    names = [time.strftime("%Y%m%d_%H%M%S")]
    if dist.is_initialized():
        dist.broadcast_object_list(names, src=0)
    return names[0]


def run(args: argparse.Namespace) -> None:
    """Train."""
    import torch

    from mmdet3d.apis.train import dump_config, train_model, work_dir_of
    from mmdet3d.core.parallel import init_distributed
    from mmdet3d.datasets.samplers.sequence import distributed_place
    from mmdet3d.utils.logging import setup_logger

    cfg = read_config(args)
    device = init_distributed(args.launcher, cfg.get("dist_params"))
    if args.launcher == "none" and device.type == "cuda":
        device = torch.device("cuda", args.gpu_id if args.gpu_id is not None else (args.gpu_ids or [0])[0])
        torch.cuda.set_device(device)
    prepare_processes(cfg, device)
    rank, _ = distributed_place()
    work_dir, timestamp = work_dir_of(cfg, args.work_dir), agreed_timestamp()
    setup_logger(work_dir / f"{timestamp}.log", cfg.get("log_level", "INFO"), rank)
    if rank == 0:
        dump_config(cfg, work_dir)
    train_model(cfg, work_dir=work_dir, device=device, seed=args.seed, diff_seed=args.diff_seed,
                deterministic=args.deterministic, resume=args.resume, auto_resume=args.auto_resume,
                validate=args.validate, autoscale_lr=args.autoscale_lr, allow_new_layout=args.allow_new_layout,
                allow_unsafe=args.allow_unsafe_checkpoint, timestamp=timestamp)


def report(error: Exception, debug: bool) -> None:
    """Tell what went wrong, and in which process."""
    from mmdet3d.utils.command import error_line, explains_itself

    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    text = error_line(error) if explains_itself(error) and not debug else traceback.format_exc()
    sys.stderr.write(f"{'' if rank is None else f'rank {rank}: '}{text.rstrip()}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error, 130 after Ctrl-C and 143 after SIGTERM."""
    args = parse_args(argv)
    from torch import distributed as dist

    from mmdet3d.core.interrupt import TrainingInterrupted
    from mmdet3d.core.parallel import leave_distributed

    status = 0
    try:
        run(args)
    except TrainingInterrupted as stop:
        sys.stderr.write(f"{stop}\n")
        status = stop.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything could be saved\n")
        status = 130
    except Exception as error:
        report(error, args.debug)
        status = 1
    if status == 1 and dist.is_initialized():
        os._exit(status)  # at once: the other processes may be waiting for this one
    leave_distributed()
    return status


if __name__ == "__main__":
    sys.exit(main())
