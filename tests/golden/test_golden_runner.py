"""The reference implementation's losses and gradient norms through the training loop."""

import logging

import numpy as np
import pytest
import torch
from golden_cases import build, load_module
from mmcv.runner import Hook

from mmdet3d.core.runner import TrainRunner

LOSS_TOLERANCE = 2e-3
GRADIENT_TOLERANCE = 5e-2


class Record(Hook):
    """Keeps what an iteration logged."""

    def __init__(self):
        self.lines = []

    def after_train_iter(self, runner):
        self.lines.append({**runner.outputs["log_vars"], "grad_norm": runner.log_buffer.val_history["grad_norm"][-1]})


class Frames:
    """The golden frames as batches of a loader."""

    def __init__(self, frames):
        self.frames = frames

    def __iter__(self):
        yield from self.frames


@pytest.mark.slow
def test_the_loop_gives_the_losses_of_the_reference(shared, device, tmp_path):
    fill = load_module(shared / "golden/fill.py")
    golden = np.load(shared / "golden/openocc_train.npz")
    model = build("openocc")
    fill.fill_state_dict(model, 17)
    model.train().to(device)
    frames = fill.make_sequence(seed=0, frames=2, with_gt=True)
    # the golden steps share their weights: a learning rate of 0 keeps them
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runner = TrainRunner(model, optimizer, logger=logging.getLogger("mmdet3d.test"), work_dir=tmp_path, max_iters=2)
    record = Record()
    runner.register_training_hooks({"policy": "fixed"}, {"grad_clip": {"max_norm": 5, "norm_type": 2}})
    runner.register_hook(record, "VERY_LOW")
    with fill.deterministic_noise(model):
        runner.run([Frames(frames)])
    for step, line in enumerate(record.lines):
        wanted = {key.split("/")[-1]: float(golden[key]) for key in golden.files if f"step{step}/loss/" in key}
        wanted["loss"] = float(golden[f"step{step}/total"])
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=LOSS_TOLERANCE)
        norms = [float(golden[key]) for key in golden.files if f"step{step}/grad_norm/" in key]
        assert line["grad_norm"] == pytest.approx(np.sqrt(np.sum(np.square(norms))), rel=GRADIENT_TOLERANCE)
    assert len(record.lines) == 2
