"""A training on made-up sequences, in this process or, run as a script, in one of its own.

    python training_run.py <work_dir> '{"option": value}' [<work_dir> '{...}' ...]

Losses go to ``losses_<rank>.txt``, one line ``<iteration> <name>=<float in hexadecimal> ...`` for each iteration.
"""

import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch
from mmcv.parallel import DataContainer
from mmcv.runner import Hook
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/models/detectors")]

import tiny_model  # noqa: E402
from processes import run_job  # noqa: E402

from mmdet3d.apis.train import set_random_seed  # noqa: E402
from mmdet3d.core.checkpointing import find_latest  # noqa: E402
from mmdet3d.core.parallel import DistributedModel, leave_distributed  # noqa: E402
from mmdet3d.core.runner import TrainRunner  # noqa: E402
from mmdet3d.datasets.loader import build_dataloader  # noqa: E402
from mmdet3d.models import build_model  # noqa: E402
from mmdet3d.models.detectors.base import BaseDetector  # noqa: E402
from mmdet3d.structures import TemporalMemory  # noqa: E402

LENGTHS = (4, 3, 5, 2)


class Sequences(Dataset):
    """Frames of a few short drives; noise is added to the images, as augmentation."""

    def __init__(self, lengths=LENGTHS, nan_at=()):
        self.flag = np.repeat(np.arange(len(lengths)), lengths)
        self.steps = np.concatenate([np.arange(length) for length in lengths])
        self.nan_at = set(nan_at)
        self.rng = np.random.RandomState(0)

    def __len__(self):
        return len(self.flag)

    def seed(self, seed):
        self.rng = np.random.RandomState(seed)

    def __getitem__(self, index):
        step, sequence = int(self.steps[index]), int(self.flag[index])
        inputs, metas = tiny_model.frame(step, batch=1, sequences=(sequence,))
        targets = tiny_model.targets(10 * sequence + step, batch=1)
        inputs[0] += torch.from_numpy(self.rng.normal(0, 0.1, inputs[0].shape).astype(np.float32))
        if index in self.nan_at:
            inputs[0][0, 0, 0, 0, 0] = float("nan")
        metas[0]["sample_idx"] = f"frame-{index}"
        return {"img_inputs": tuple(tensor[0] for tensor in inputs),
                "img_metas": DataContainer(metas[0], cpu_only=True),
                **{name: value[0] for name, value in targets.items()}}


class SmallSequences(Sequences):
    """The same for :class:`Small`."""

    def __getitem__(self, index):
        image = torch.linspace(-1, 1, 24).view(2, 3, 4) * (index + 1) / 5
        image = image + torch.from_numpy(self.rng.normal(0, 0.1, (2, 3, 4)).astype(np.float32))
        if index in self.nan_at:
            image[0, 1, 2] = float("nan")
        meta = {"sample_idx": f"frame-{index}", "scene_name": f"scene-{self.flag[index]}", "index": index,
                "start_of_sequence": bool(self.steps[index] == 0)}
        return {"img_inputs": (image, *torch.eye(4).repeat(5, 1, 1)), "img_metas": DataContainer(meta, cpu_only=True)}


class Small(BaseDetector):
    """Has what matters for a training state: running statistics, draws of random numbers and a temporal memory."""

    CLASSES = ("car", "free")

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 5, 1)
        self.norm = torch.nn.BatchNorm2d(5)
        self.head = torch.nn.Linear(5, 3)
        self.memory = None

    def forward_train(self, img_metas, img_inputs):
        features = self.norm(self.conv(img_inputs[0])).mean((2, 3))
        past = 0.0 if self.memory is None else self.memory.histories[0][:, 0]
        features = torch.nn.functional.dropout(features + past, 0.3)
        batch = len(features)
        self.memory = TemporalMemory((features.detach()[:, None],), ((1, 1, 1),), 5, img_inputs[5].detach(),
                                     torch.zeros(batch, dtype=torch.long), torch.zeros(batch, 3, dtype=torch.float64))
        return {"loss_a": self.head(features).square().mean(), "loss_b": (features - 1).abs().mean(),
                "number": features.detach().sum()}

    def reset_memory(self):
        self.memory = None


class LossLog(Hook):
    """Writes down what was trained on and what came out, bit by bit."""

    def __init__(self, path):
        self.path = path

    def after_train_iter(self, runner):
        values = " ".join(f"{name}={value.hex()}" for name, value in runner.outputs["log_vars"].items())
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{runner.iter} {values}\n")


def read_losses(work_dir, rank=0):
    """{iteration: line}; an iteration that was repeated after a resume has to give the same line again."""
    losses = {}
    for line in (Path(work_dir) / f"losses_{rank}.txt").read_text().splitlines():
        iteration, _, values = line.partition(" ")
        assert losses.setdefault(int(iteration), values) == values, f"iteration {iteration} came out otherwise"
    return losses


def run_script(*runs, processes=1):
    """``(work_dir, options)`` one after the other in new processes; the finished process."""
    arguments = (word for work_dir, options in runs for word in (work_dir, json.dumps(options)))
    return run_job(processes, __file__, *arguments)


def start(work_dir, *, small=True, max_iters=6, interval=2, keep=-1, workers=0, batch=1, resume=None, seed=0,
          finite_loss=None, nan_at=(), ema=None, custom_hooks=(), cumulative_iters=1, save_memory=True, lengths=LENGTHS,
          device="cpu", deterministic=False, **resume_options):
    """Build everything, train, and return the runner."""
    set_random_seed(seed, deterministic)
    model = (Small() if small else build_model(tiny_model.config())).to(device)
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        model = DistributedModel(model)
        torch.manual_seed(seed + rank)
    dataset = (SmallSequences if small else Sequences)(lengths, nan_at)
    loader = build_dataloader(dataset, batch, workers, training=True, seed=seed, rank=rank,
                              world_size=world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if small else 1e-3, weight_decay=1e-2)
    logger = logging.getLogger("training_run")
    runner = TrainRunner(model, optimizer, logger=logger, work_dir=work_dir, max_iters=max_iters,
                         meta={"seed": seed, "exp_name": "test", "config": "model = dict()"})
    runner.train_sampler = loader.sequence_sampler
    runner.register_training_hooks(
        {"policy": "step", "warmup": "linear", "warmup_iters": 4, "warmup_ratio": 0.1, "step": [100]},
        {"grad_clip": {"max_norm": 5, "norm_type": 2}, "cumulative_iters": cumulative_iters},
        {"interval": interval, "max_keep_ckpts": keep, "save_memory": save_memory},
        custom_hooks_config=[{"type": "MEGVIIEMAHook", "init_updates": 10, "interval": 4, **(ema or {})}],
        finite_loss=finite_loss or {})
    # Before the checkpoint: a process that is killed in between repeats the iteration instead of leaving it out.
    runner.register_hook(LossLog(Path(work_dir) / f"losses_{rank}.txt"), "ABOVE_NORMAL")
    for hook, priority in custom_hooks:
        runner.register_hook(hook, priority)
    if resume is not None:
        path = find_latest(work_dir) if resume == "latest" else resume
        if path is not None:
            runner.resume(path, **resume_options)
    runner.run([loader])
    return runner


def main():
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    for work_dir, options in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        start(work_dir, **json.loads(options))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        leave_distributed()


if __name__ == "__main__":
    main()
