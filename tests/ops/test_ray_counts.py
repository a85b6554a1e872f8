"""ray_counts against a loop over rays and against its reference; order of sums, refused samples, checks."""

import math

import numpy as np
import pytest
import torch

from mmdet3d.ops import _library
from mmdet3d.ops.ray_counts import (
    GT_LABEL,
    PRED_FLOW,
    PRED_LABEL,
    RayTotals,
    ray_counts,
    ray_counts_reference,
)

compiled = pytest.mark.skipif(
    not (_library.AVAILABLE and hasattr(torch.ops.mmdet3d, "ray_counts")), reason="ray_counts is not compiled")

CLASSES, FREE = 7, 6
SIZE = (5, 11, 3)
RULES = {"free_label": FREE, "flow_classes": (0, 3), "thresholds": (1.0, 2.0, 4.0), "flow_threshold": 2.0}


def make_case(device="cpu", seed=0, rays=700, flow=torch.float16):
    """Arguments of ray_counts but the totals: random ends of rays, labels that often agree, distances on thresholds."""
    generator = torch.Generator().manual_seed(seed)
    voxels = math.prod(SIZE)
    labels = torch.randint(0, CLASSES, (2, *SIZE), generator=generator).to(torch.uint8)
    voxel = torch.randint(0, voxels, (2, rays), generator=generator).int()
    same = torch.rand(rays, generator=generator) < 0.6
    labels[1] = torch.where(torch.rand(SIZE, generator=generator) < 0.7, labels[0], labels[1])
    voxel[1] = torch.where(same, voxel[0], voxel[1])
    distance = torch.rand(2, rays, generator=generator) * 3
    distance[1] = distance[0] + torch.randint(-5, 6, (rays,), generator=generator)
    flows = [torch.randn(*SIZE, 2, generator=generator) * 3 for _ in range(2)]
    case = (labels, voxel, distance, flows[0].to(flow), flows[1].half())
    return [tensor.to(device) for tensor in case]


def expected_by_loop(labels, voxel, distance, pred_flow, gt_flow):
    """(6, K) counts and (K,) sums of flow errors."""
    counts, errors = np.zeros((6, CLASSES), np.int64), np.zeros(CLASSES)
    labels, pred_flow, gt_flow = labels.reshape(2, -1), pred_flow.reshape(-1, 2), gt_flow.reshape(-1, 2)
    for i in range(voxel.shape[1]):
        p, g = voxel[:, i]
        pred, gt = labels[0, p], labels[1, g]
        if gt == FREE:
            continue
        counts[0, gt] += 1
        counts[1, pred] += 1
        if pred != gt:
            continue
        error = abs(float(distance[0, i]) - float(distance[1, i]))
        counts[2:5, gt] += [error < 1, error < 2, error < 4]
        if error < 2 and gt in (0, 3):
            counts[5, gt] += 1
            errors[gt] += np.linalg.norm(gt_flow[g].astype(np.float64) - pred_flow[p].astype(np.float64))
    return counts, errors


@pytest.mark.parametrize("function", [ray_counts, ray_counts_reference])
@pytest.mark.parametrize("rays", [0, 1, 255, 256, 257, 700])
@pytest.mark.parametrize("flow", [torch.float16, torch.float32, torch.float64])
def test_equals_a_loop(device, function, rays, flow):
    totals = RayTotals(CLASSES, device)
    expected = [np.zeros((6, CLASSES), np.int64), np.zeros(CLASSES)]
    for seed in range(2):
        case = make_case(seed=seed, rays=rays, flow=flow)
        function(totals, *(tensor.to(device) for tensor in case), **RULES)
        for total, part in zip(expected, expected_by_loop(*(tensor.numpy() for tensor in case)), strict=True):
            total += part
    assert totals.counts.tolist() == expected[0].tolist() and not totals.problem.any()
    np.testing.assert_allclose(totals.flow_error.cpu(), expected[1], rtol=1e-12)
    assert rays < 200 or (expected[0] > 0)[:5, :FREE].all(), "the case does not cover every counter"


def test_without_flow_it_is_zero(device):
    labels, voxel, distance, pred_flow, gt_flow = make_case(device)
    for first, second in ((pred_flow, None), (None, gt_flow), (None, None)):
        with_zeros, without = RayTotals(CLASSES, device), RayTotals(CLASSES, device)
        zero = torch.zeros_like(gt_flow)
        ray_counts(with_zeros, labels, voxel, distance, zero if first is None else first,
                   zero if second is None else second, **RULES)
        ray_counts(without, labels, voxel, distance, first, second, **RULES)
        assert torch.equal(with_zeros.memory, without.memory)


def test_strided_tensors(device):
    case = make_case(device)
    plain, strided = RayTotals(CLASSES, device), RayTotals(CLASSES, device)
    ray_counts(plain, *case, **RULES)
    ray_counts(strided, *(tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in case), **RULES)
    assert torch.equal(plain.memory, strided.memory)


@compiled
def test_sums_do_not_depend_on_threads():
    case = make_case(rays=100_000)
    before, memories = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            totals = RayTotals(CLASSES)
            ray_counts(totals, *case, **RULES)
            memories.append(totals.memory)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(memories[0], memories[1]) and torch.equal(memories[0], memories[2])


@pytest.mark.cuda
@pytest.mark.parametrize("rays", [0, 31, 256, 5000, 112_320])
@pytest.mark.parametrize("flow", [torch.float16, torch.float32, torch.float64])
def test_cuda_equals_cpu_bit_for_bit(rays, flow):
    assert _library.built_with_cuda(), "the operators were built without CUDA kernels"
    totals = [RayTotals(CLASSES, device) for device in ("cpu", "cuda", "cuda")]
    for total in totals:
        for seed in range(3):
            ray_counts(total, *make_case(total.memory.device, seed, rays, flow), **RULES)
    assert torch.equal(totals[0].memory, totals[1].memory.cpu())
    assert torch.equal(totals[1].memory, totals[2].memory)


@pytest.mark.cuda
def test_cuda_does_not_wait():
    case, totals = make_case("cuda"), RayTotals(CLASSES, "cuda")
    ray_counts(totals, *case, **RULES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ray_counts(totals, *case, **RULES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert totals.counts.any()


@pytest.mark.parametrize("function", [ray_counts, ray_counts_reference])
@pytest.mark.parametrize("rays", [0, 700])
def test_samples_with_unknown_labels_are_not_counted(device, function, rays):
    for grid, kind in ((0, PRED_LABEL), (1, GT_LABEL)):
        totals, case = RayTotals(CLASSES, device), make_case(device, rays=rays)
        function(totals, *case, **RULES)
        before = totals.memory.clone()
        for label, sample in ((9, 4), (255, 5)):
            case[0][grid, -1, 3, 1] = label
            function(totals, *case, **RULES, sample=sample)
        assert totals.problem.tolist() == [2, 4, kind, 9, 0 if rays == 0 else totals.problem[4].item()]
        assert torch.equal(totals.memory[:-5], before[:-5])


@pytest.mark.parametrize("function", [ray_counts, ray_counts_reference])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_with_a_strange_prediction_are_not_counted(device, function, value):
    totals, case = RayTotals(CLASSES, device), make_case(device)
    function(totals, *case, **RULES)
    kept = int(totals.counts[5].sum())
    totals.memory.zero_()
    case[3][2] = value
    function(totals, *case, **RULES, sample=3)
    problem = totals.problem.tolist()
    assert problem[:3] == [1, 3, PRED_FLOW] and 0 < problem[3] < problem[4] == kept and not totals.counts.any()


@pytest.mark.parametrize("function", [ray_counts, ray_counts_reference])
def test_a_strange_truth_shows_in_the_sum(device, function):
    for value, check in ((math.nan, math.isnan), (math.inf, math.isinf)):
        totals, case = RayTotals(CLASSES, device), make_case(device)
        case[4].fill_(value)
        function(totals, *case, **RULES)
        assert check(totals.flow_error[0]) and totals.flow_error[1] == 0 and not totals.problem.any()


@compiled
def test_rays_that_end_in_no_voxel_do_not_count(device):
    case = make_case(device)
    case[1][0, :50], case[1][1, 50:100] = -1, math.prod(SIZE)
    some, rest = RayTotals(CLASSES, device), RayTotals(CLASSES, device)
    ray_counts(some, *case, **RULES)
    ray_counts(rest, case[0], case[1][:, 100:], case[2][:, 100:], *case[3:], **RULES)
    assert torch.equal(some.counts, rest.counts)


def test_taking_starts_again(device):
    totals, case = RayTotals(CLASSES, device), make_case(device)
    ray_counts(totals, *case, **RULES)
    before = totals.memory.clone()
    taken = totals.take()
    assert taken.counts.device.type == "cpu" and torch.equal(taken.memory, before.cpu())
    assert taken.flow_error.sum() > 0 and not totals.memory.any()


def refused(error, message, position=None, change=None, **options):
    case = make_case()
    if position is not None:
        case[position] = change(case[position])
    with pytest.raises(error, match=message):
        ray_counts(RayTotals(CLASSES), *case, **{**RULES, **options})


def test_refusals():
    refused(TypeError, "labels must be one of torch.uint8, got torch.int64", 0, lambda t: t.long())
    refused(ValueError, r"labels must have shape \(2, X, Y, Z\) = \(2, 5, 11, 3\), got \(1, 5, 11, 3\)", 0,
            lambda t: t[:1])
    refused(TypeError, "voxel must be one of torch.int32, got torch.int64", 1, lambda t: t.long())
    refused(ValueError, r"voxel must have shape \(2, R\)", 1, lambda t: t[0])
    refused(ValueError, r"distance must have shape \(2, R\) = \(2, 700\), got \(2, 699\)", 2, lambda t: t[:, 1:])
    refused(TypeError, "pred_flow must be one of .*got torch.bfloat16", 3, lambda t: t.bfloat16())
    refused(ValueError, r"pred_flow must have shape \(X, Y, Z, 2\)", 3, lambda t: t[1:])
    refused(TypeError, "gt_flow must be one of torch.float16, got torch.float32", 4, lambda t: t.float())
    refused(ValueError, "gt_flow must be on the device of labels", 4, lambda t: t.to("meta"))
    refused(ValueError, r"flow_classes must be among the labels.* got \[7\] of 7 labels", flow_classes=(7,))
    refused(ValueError, "thresholds must be three numbers", thresholds=(1.0, 2.0))
    with pytest.raises(ValueError, match="of which there are 1 to 64"):
        ray_counts(RayTotals(65), *make_case(), **RULES)


@compiled
def test_the_compiled_operator_checks_what_keeps_it_in_memory():
    labels, voxel, distance, *flows = make_case()
    totals = RayTotals(CLASSES)
    for changed, message in [((labels[:1], voxel, distance, *flows), "must have two rows"),
                             ((labels, voxel, distance[:, 1:], *flows), "must have two rows"),
                             ((labels, voxel, distance, flows[0][1:], None), "flow must be"),
                             ((labels, voxel.long(), distance, *flows), "voxel must be")]:
        with pytest.raises(RuntimeError, match=f"ray_counts: .*{message}"):
            torch.ops.mmdet3d.ray_counts(*changed, FREE, [0], [1.0, 2.0, 4.0], 2.0, 0, totals.counts,
                                         totals.flow_error, totals.problem)


@compiled
def test_registration(device):
    totals = RayTotals(CLASSES, device)
    outputs = [tensor.clone() for tensor in (totals.counts, totals.flow_error, totals.problem)]
    torch.library.opcheck(torch.ops.mmdet3d.ray_counts.default,
                          (*make_case(device), FREE, [0, 3], [1.0, 2.0, 4.0], 2.0, 0, *outputs),
                          test_utils=("test_schema", "test_faketensor"))
