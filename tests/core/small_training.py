"""A model that trains in no time, batches for it, and a runner around both."""

import logging

import torch
from mmcv.runner import Hook

from mmdet3d.core.runner import TrainRunner
from mmdet3d.models.detectors.base import BaseDetector

LR = {"policy": "step", "warmup": "linear", "warmup_iters": 200, "warmup_ratio": 0.001, "step": [96060]}


class Line(BaseDetector):
    """Fits a line; the loss of a batch is the mean square error of its samples."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward_train(self, img_inputs, img_metas):
        return {"loss_line": (self.linear(img_inputs[0]) - 1).square().mean(), "seen": img_inputs[0].sum()}


def batch(number, size=1):
    images = torch.randn(size, 3, generator=torch.Generator().manual_seed(number))
    return {"img_inputs": [images, *[torch.eye(4)] * 5], "img_metas": [{"index": number}] * size}


def batches(size=1):
    number = 0
    while True:
        yield batch(number, size)
        number += 1


class Loader:
    """Endless, as the loader of sequences."""

    def __init__(self, size=1):
        self.size, self.closed = size, False

    def __iter__(self):
        return batches(self.size)


class Record(Hook):
    """Calls a function after every iteration."""

    def __init__(self, function):
        self.function = function

    def after_train_iter(self, runner):
        self.function(runner)


def build_model(seed=0):
    torch.manual_seed(seed)
    return Line()


def make_runner(work_dir, max_iters=4, *, model=None, optimizer=None, lr=LR, record=None, precision="fp32", **hooks):
    """With the published optimizer and learning rate unless said otherwise; ``record`` runs after every iteration."""
    model = build_model() if model is None else model
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2)
    runner = TrainRunner(model, optimizer, logger=logging.getLogger("mmdet3d.small_training"), work_dir=work_dir,
                         max_iters=max_iters, precision=precision)
    runner.register_training_hooks(lr, **hooks)
    if record is not None:
        runner.register_hook(Record(record), "VERY_LOW")
    return runner
