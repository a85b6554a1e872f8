"""Flow errors of moving objects, against a count ray by ray."""

import math

import numpy as np
import pytest
import torch

from mmdet3d.datasets.labels import OPENOCC
from mmdet3d.datasets.metrics.moving import MovingRayMetric, format_moving
from mmdet3d.datasets.metrics.ray_iou import RayMetric
from mmdet3d.structures import VoxelGrid

GRID = VoxelGrid((-6.0, -4.0, -1.0), (6.0, 4.0, 3.0), (0.4, 0.4, 0.4))
ORIGINS = np.array([[0.3, 0.2, 1.1], [2.0, -1.5, 0.4]])


def sample(seed):
    """Labels of prediction and truth, and both flows; objects move, stand or creep at just the limit."""
    generator = torch.Generator().manual_seed(seed)
    size = GRID.size_xyz
    gt = torch.randint(0, 17, size, generator=generator, dtype=torch.uint8)
    gt = torch.where(torch.rand(size, generator=generator) < 0.9, torch.tensor(16, dtype=torch.uint8), gt)
    pred = torch.where(torch.rand(size, generator=generator) < 0.1, gt.flip(0), gt)
    speed = torch.tensor([0.0, 0.5, 0.75, 4.0])[torch.randint(0, 4, size, generator=generator)]
    gt_flow = torch.stack([speed, torch.zeros(size)], -1)
    return pred, gt, torch.randn(*size, 2, generator=generator), gt_flow


def by_hand(speed, *samples):
    """Rays and sums of errors by class, from where the rays end."""
    metric = RayMetric(OPENOCC, grid=GRID)
    rays, errors, zero_errors = np.zeros(17, int), np.zeros(17), np.zeros(17)
    for pred, gt, pred_flow, gt_flow in samples:
        voxel, distance = (part.numpy() for part in metric._cast(torch.stack([pred, gt]), ORIGINS))
        first, second = pred.flatten().numpy()[voxel[0]], gt.flatten().numpy()[voxel[1]]
        flow, true = pred_flow.view(-1, 2).numpy()[voxel[0]], gt_flow.view(-1, 2).numpy()[voxel[1]]
        hit = (first == second) & (np.abs(distance[0] - distance[1]) < 2) & (np.linalg.norm(true, axis=1) > speed)
        for label in OPENOCC.flow_classes:
            of = hit & (second == label)
            rays[label] += of.sum()
            errors[label] += np.linalg.norm(flow[of] - true[of], axis=1).sum()
            zero_errors[label] += np.linalg.norm(true[of], axis=1).sum()
    return rays, errors, zero_errors


def test_counts_are_those_of_every_ray_looked_at():
    samples, metric, plain = [sample(1), sample(2)], MovingRayMetric(OPENOCC, grid=GRID), RayMetric(OPENOCC, grid=GRID)
    for number, (pred, gt, pred_flow, gt_flow) in enumerate(samples):
        for counted in (metric, plain):
            counted.add(f"token-{number}", pred, gt, ORIGINS, pred_flow, gt_flow)
    result, (rays, errors, zero_errors) = metric.result(), by_hand(0.5, *samples)
    moving = result.pop("moving")
    assert moving["speed"] == 0.5 and moving["rays"] == rays.sum() > 100
    assert rays.sum() < result["flow_rays"]
    assert moving["ave"] == pytest.approx(errors.sum() / rays.sum(), rel=1e-6)
    assert moving["ave_zero_flow"] == pytest.approx(zero_errors.sum() / rays.sum(), rel=1e-6)
    for label in OPENOCC.flow_classes:
        row = moving["classes"][OPENOCC.classes[label]]
        assert row["rays"] == rays[label] > 0
        assert row["ave"] == pytest.approx(errors[label] / rays[label], rel=1e-6)
    np.testing.assert_equal(result, plain.result())  # what is published stays as it is


def test_zero_flow_and_perfect_flow():
    pred, gt, _, gt_flow = sample(3)
    for flow, expected in ((None, None), (gt_flow, 0.0)):
        metric = MovingRayMetric(OPENOCC, grid=GRID)
        metric.add("a", gt, gt, ORIGINS, flow, gt_flow)
        moving = metric.result()["moving"]
        assert moving["ave"] == (moving["ave_zero_flow"] if expected is None else expected)
        assert 0.75 < moving["ave_zero_flow"] < 4
    still = MovingRayMetric(OPENOCC, 5.0, grid=GRID)
    still.add("a", pred, gt, ORIGINS, None, gt_flow)
    moving = still.result()["moving"]
    assert moving["rays"] == 0 and math.isnan(moving["ave"]) and "none" in format_moving(moving)
    without = MovingRayMetric(OPENOCC, grid=GRID)
    without.add("a", pred, gt, ORIGINS)
    assert without.result()["moving"]["rays"] == 0


def test_states_are_merged():
    whole, parts = MovingRayMetric(OPENOCC, 0.6, grid=GRID), []
    for number in range(2):
        pred, gt, pred_flow, gt_flow = sample(number)
        part = MovingRayMetric(OPENOCC, 0.6, grid=GRID)
        for metric in (whole, part):
            metric.add(f"token-{number}", pred, gt, ORIGINS, pred_flow, gt_flow)
        loaded = MovingRayMetric(OPENOCC, 0.6, grid=GRID)
        loaded.load_state_dict(part.state_dict())
        parts.append(loaded)
    parts[0].merge(parts[1])
    np.testing.assert_equal(parts[0].result(), whole.result())
    with pytest.raises(ValueError, match=r"objects move at 0.5 m/s here, and at 0.6 there"):
        MovingRayMetric(OPENOCC, grid=GRID).merge(parts[0])
    with pytest.raises(ValueError, match=r"objects that move at 0.6 m/s, found 0.5"):
        parts[0].load_state_dict(MovingRayMetric(OPENOCC, grid=GRID).state_dict())
    with pytest.raises(ValueError, match="at 0.6 m/s, found None"):
        parts[0].load_state_dict(RayMetric(OPENOCC, grid=GRID).state_dict())


def test_a_sample_that_is_refused_leaves_no_trace():
    pred, gt, pred_flow, gt_flow = sample(4)
    metric = MovingRayMetric(OPENOCC, grid=GRID)
    metric.add("a", pred, gt, ORIGINS, pred_flow, gt_flow)
    before = metric.result()
    broken = torch.where(gt_flow.sum(-1, keepdim=True) == 0, torch.tensor(float("nan")), pred_flow)
    with pytest.raises(ValueError, match="not finite"):
        metric.add("b", gt, gt, ORIGINS, broken, gt_flow)
    np.testing.assert_equal(metric.result(), before)
    with pytest.raises(ValueError, match="label"):
        metric.add("b", pred, torch.full_like(gt, 40), ORIGINS, pred_flow, gt_flow)
    np.testing.assert_equal(metric.result(), before)


@pytest.mark.parametrize("speed", [-1.0, float("nan")])
def test_wrong_speeds(speed):
    with pytest.raises(ValueError, match="speed: expected"):
        MovingRayMetric(OPENOCC, speed)


@pytest.mark.cuda
def test_gpu_counts_the_same():
    results = []
    for device in ("cpu", "cuda"):
        metric = MovingRayMetric(OPENOCC, grid=GRID)
        for number in range(2):
            pred, gt, pred_flow, gt_flow = (part.to(device) for part in sample(number))
            metric.add(f"token-{number}", pred, gt, ORIGINS, pred_flow, gt_flow)
        results.append(metric.result())
    one, other = results
    assert one["moving"]["rays"] == other["moving"]["rays"] > 0
    assert one["moving"]["ave"] == pytest.approx(other["moving"]["ave"], rel=1e-12)
