"""What a long training meets: mixed precision, several processes, and a batch whose cameras see no query at all."""

import pytest
import torch
from tiny_model import build, training_batch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mmdet3d.models.attention.camera_anchors import project_anchors


def two_steps(model, precision=torch.float32, blind=False):
    """Losses of two training steps; with ``blind`` everything lies behind the cameras."""
    losses = []
    for step in range(2):
        batch = training_batch(step)
        if blind:
            for meta in batch["img_metas"]:
                meta["lidar2img"] = -meta["lidar2img"]
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss, _ = model_losses(model, batch)
        model.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.item())
    return losses


def model_losses(model, batch):
    losses = model(**batch)
    total = sum(value for name, value in losses.items() if "loss" in name)
    return total, losses


def test_training_under_autocast_stays_close_to_full_precision():
    exact, mixed = (two_steps(build().train(), precision) for precision in (torch.float32, torch.bfloat16))
    assert mixed == pytest.approx(exact, rel=0.05)
    assert mixed != exact


def test_inference_under_autocast():
    model = build()
    batch = training_batch(0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, _ = model.run(batch["img_inputs"], batch["img_metas"])
    memory = prediction.memory
    assert model.decode(prediction)[0].any()
    assert all(history.dtype == torch.bfloat16 for history in memory.histories)
    with torch.no_grad():  # and on without
        memory = model.run(batch["img_inputs"], batch["img_metas"], memory)[0].memory
    assert all(history.dtype == torch.float32 for history in memory.histories)


def test_geometry_keeps_its_precision_under_autocast():
    points = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0))
    matrix = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    exact = project_anchors(points, matrix, (64, 176))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = project_anchors(points, matrix, (64, 176))
    assert all(torch.equal(a, b) for a, b in zip(exact, mixed, strict=True))


def test_every_parameter_gets_a_gradient_although_no_camera_sees_anything():
    model = build().train()
    two_steps(model, blind=True)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("blind", [False, True])
def test_data_parallel_training(blind, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(build().train(), broadcast_buffers=False)
        assert len(two_steps(model, blind=blind)) == 2
    finally:
        distributed.destroy_process_group()
