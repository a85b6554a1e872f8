"""Voxel mIoU against golden tables, and its masks, merging and refusals."""

import numpy as np
import pytest
import torch

from mmdet3d.datasets.metrics import VoxelMIoU
from mmdet3d.datasets.metrics.coverage import CoverageError
from mmdet3d.datasets.metrics.voxel_iou import format_voxel_iou


@pytest.mark.parametrize("case, labels, masked, inputs", [
    ("occ3d_mask", "occ3d", True, ["occ3d_input"]), ("occ3d_nomask", "occ3d", False, ["occ3d_input"]),
    ("occ3d_mask_two", "occ3d", True, ["occ3d_two_input0", "occ3d_two_input1"]),
    ("openocc", "openocc", False, ["openocc_input"]),
])
def test_golden(shared, device, case, labels, masked, inputs):
    golden = np.load(shared / "golden/pipeline_miou.npz")
    metric = VoxelMIoU(labels)
    for name in inputs:
        pred, gt, mask = (torch.from_numpy(golden[f"{name}_{part}"]).to(device) for part in ("pred", "gt", "mask"))
        metric.add(name, pred, gt, mask if masked else None)
    np.testing.assert_array_equal(metric.confusion, golden[f"{case}_hist"])
    result = metric.result()
    assert result["miou"] == golden[f"{case}_miou"] and result["samples"] == golden[f"{case}_count"]
    np.testing.assert_array_equal(list(result["classes"].values()), (golden[f"{case}_iou"] * 100).round(2))
    assert format_voxel_iou(result).split("\n") == golden[f"{case}_lines"].tolist()


def test_golden_of_a_published_label(shared, device):
    golden = np.load(shared / "golden/pipeline_miou.npz")
    files = sorted((shared / "data/nuscenes_real/gts").rglob("labels.npz"))
    if not files:
        pytest.skip(f"no Occ3D label in {shared / 'data/nuscenes_real/gts'}")
    with np.load(files[0]) as arrays:
        gt, mask = (torch.from_numpy(arrays[name]).to(device) for name in ("semantics", "mask_camera"))
    metric = VoxelMIoU("occ3d")
    metric.add("a", gt.roll(1, 0), gt, mask)
    np.testing.assert_array_equal(metric.confusion, golden["official_shift_hist"])
    result = metric.result()
    assert result["miou"] == golden["official_shift_miou"] == 67.32
    assert format_voxel_iou(result).split("\n") == golden["official_shift_lines"].tolist()


def case(seed=0, shape=(5, 4, 3)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 17, shape).astype(np.uint8) for _ in range(2)]


def test_equals_a_loop_and_merges():
    metric, other = VoxelMIoU("openocc"), VoxelMIoU("openocc")
    pred, gt = case()
    gt[0, 0] = 255
    mask = np.arange(60).reshape(5, 4, 3) % 4
    metric.add("a", pred, gt, mask)
    expected = np.zeros((17, 17), int)
    for p, g, m in zip(pred.flat, gt.flat, mask.flat, strict=True):
        if m and g < 17:
            expected[g, p] += 1
    np.testing.assert_array_equal(metric.confusion, expected)
    other.load_state_dict(metric.state_dict())
    with pytest.raises(CoverageError, match="added twice: a"):
        metric.merge(other)
    third = VoxelMIoU("openocc")
    third.add("b", pred, pred)
    metric.merge(third)
    metric.check_coverage(["a", "b"])
    np.testing.assert_array_equal(metric.confusion, expected + third.confusion)
    assert third.result()["miou"] == 100.0
    with pytest.raises(ValueError, match="cannot merge a metric of occ3d"):
        metric.merge(VoxelMIoU("occ3d"))
    with pytest.raises(ValueError, match="other classes than openocc"):
        metric.load_state_dict(VoxelMIoU("occ3d").state_dict())


def test_nothing_counted_is_nan():
    assert np.isnan(VoxelMIoU("occ3d").result()["miou"])


def test_refusals():
    pred, gt = case()
    metric = VoxelMIoU("openocc")
    for arguments, error, message in [
            ((pred[1:], gt), ValueError, r"pred must have the shape of gt, \(5, 4, 3\), got \(4, 4, 3\)"),
            ((pred, gt, gt[1:]), ValueError, "mask must have the shape of gt"),
            ((np.where(pred == 4, 17, pred), gt), ValueError, "pred holds label 17"),
            ((pred.astype(float), gt), TypeError, "pred must hold integer labels"),
            ((pred, gt.astype(float)), TypeError, "gt must hold integer labels")]:
        with pytest.raises(error, match=message):
            metric.add("a", *arguments)
    metric.add("a", pred, gt)
    with pytest.raises(CoverageError, match="sample a was added twice"):
        metric.add("a", pred, gt)
