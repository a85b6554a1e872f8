"""What prepares the inputs of oa_cross_attention: projection, assignment of queries, depth consistency."""

import itertools
import math

import pytest
import torch
from compiled_library import needs_library

from mmdet3d.ops import (
    DepthFit,
    assign_queries,
    assign_queries_reference,
    depth_consistency,
    depth_consistency_reference,
    ms_deform_attn_reference,
    project_points,
    project_points_reference,
)

SIZE = (3, 5)  # (h, w)


# ---- projection -----------------------------------------------------------------------------------------------------


def projection_case(device="cpu", dtype=torch.float64):
    """points (Q, Z, 4) and image_from_points (B, N, 4, 4)."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(7, 4, 4, generator=generator, dtype=torch.float64) * 3
    matrices = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    matrices[:, :, :2] *= 2
    return points.to(device, dtype), matrices.to(device, dtype)


@pytest.mark.parametrize("project", [project_points, project_points_reference])
def test_projection_equals_a_loop(device, project):
    points, matrices = projection_case()
    position, depth, valid = (t.cpu() for t in project(points.to(device), matrices.to(device), (2.0, 5.0), 1e-5))
    assert position.shape == (3, 2, 7, 4, 2) and depth.shape == valid.shape == (3, 2, 7, 4)
    assert 5 < valid.sum() < 100
    for n, b, q, z in itertools.product(*map(range, depth.shape)):
        u, v, metres, _ = (matrices[b, n] @ points[q, z]).tolist()
        x, y = u / max(metres, 1e-5) / 2, v / max(metres, 1e-5) / 5
        assert depth[n, b, q, z].item() == pytest.approx(metres)
        assert position[n, b, q, z].tolist() == pytest.approx([x, y])
        assert valid[n, b, q, z].item() == (metres > 1e-5 and 0 < x < 1 and 0 < y < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_projection_equals_the_reference(device, dtype):
    points, matrices = projection_case(device, dtype)
    expected = project_points_reference(points, matrices, (2, 5), 0.1)
    strided = points.transpose(0, 1).contiguous().transpose(0, 1), matrices.mT.contiguous().mT
    for case in ((points, matrices), strided):
        results = project_points(*case, (2, 5), 0.1)
        for actual, target in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, target)
    nothing = project_points(points[:0], matrices, (2, 5), 0.1)
    assert [t.shape for t in nothing] == [(3, 2, 0, 4, 2), (3, 2, 0, 4), (3, 2, 0, 4)]


@pytest.mark.parametrize("changed, error, message", [
    ({0: lambda t: t.half()}, TypeError, "points must be one of torch.float32"),
    ({0: lambda t: t[..., :3]}, ValueError, r"points must have shape \(Q, Z, 4\) = \(7, 4, 4\), got \(7, 4, 3\)"),
    ({1: lambda t: t.float()}, TypeError, "image_from_points must have the dtype of points"),
    ({1: lambda t: t[0]}, ValueError, r"image_from_points must have shape \(B, N, 4, 4\), got \(3, 4, 4\)"),
    ({1: lambda t: t[..., :3, :]}, ValueError, r"image_from_points must have .*\(2, 3, 4, 4\), got \(2, 3, 3, 4\)"),
    ({1: lambda t: t.to("meta")}, ValueError, "image_from_points must be on the device of points"),
    ({2: lambda t: (0, 5)}, ValueError, r"span must be two positive lengths \(x, y\), got \(0, 5\)")])
def test_projection_refusals(changed, error, message):
    case = [changed.get(i, lambda t: t)(t) for i, t in enumerate((*projection_case(), (2, 5), 1e-5))]
    with pytest.raises(error, match=message):
        project_points(*case)


# ---- assignment -----------------------------------------------------------------------------------------------------


def masks():
    """Masks [N, B, Q], also with cameras, samples or everything empty."""
    generator = torch.Generator().manual_seed(0)
    for density in (0.1, 0.4, 0.9, 1.0):
        yield torch.rand(4, 3, 9, generator=generator) < density
    some = torch.rand(4, 3, 9, generator=generator) < 0.5
    for empty in ((slice(None), 1), (0,), (3,), (slice(1, 3),), (slice(None),)):
        mask = some.clone()
        mask[empty] = False
        yield mask
    yield torch.rand(2, 3, 3001, generator=generator) < 0.3  # several tiles of a CUDA block
    yield torch.rand(3, 2, 1024, generator=generator) < 0.7
    yield torch.rand(1, 1, 5, generator=generator) < 0.5


def assign_literally(seen):
    """Cameras write their lists to one buffer per sample, then read it."""
    source = torch.full(seen.shape, -1, dtype=torch.int32)
    for b in range(seen.shape[1]):
        buffer = {}
        lists = [camera[b].nonzero()[:, 0].tolist() for camera in seen]
        for queries in lists:
            buffer.update(enumerate(queries))
        for n, queries in enumerate(lists):
            for place, query in enumerate(queries):
                source[n, b, query] = buffer[place]
    return source


@pytest.mark.parametrize("assign", [assign_queries, assign_queries_reference])
@pytest.mark.parametrize("seen", list(masks()))
def test_assignment_reads_what_the_last_camera_wrote(device, assign, seen):
    source = assign(seen.to(device))
    assert source.dtype == torch.int32 and torch.equal(source.cpu(), assign_literally(seen))
    strided = seen.to(device).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(assign(strided), source)


@pytest.mark.parametrize("assign", [assign_queries, assign_queries_reference])
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_assignment_of_nothing(device, assign, shape):
    source = assign(torch.ones(shape, dtype=torch.bool, device=device))
    assert source.shape == shape and source.dtype == torch.int32


def test_assignment_refusals():
    with pytest.raises(TypeError, match="seen must be one of torch.bool, got torch.int32"):
        assign_queries(torch.ones(2, 3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"seen must have shape \(N, B, Q\), got \(3, 4\)"):
        assign_queries(torch.ones(3, 4, dtype=torch.bool))


# ---- depth consistency ----------------------------------------------------------------------------------------------


def depth_case(device="cpu", dtype=torch.float64, bins=88, seed=1):
    """position, anchor_depth, valid, depth of 3 cameras, 2 samples, 5 queries and 4 anchors."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    valid = uniform(3, 2, 5, 4) < 0.3
    valid[:, :, 1] = False
    depth = (uniform(2, 3, bins, *SIZE) * 8).softmax(2)
    case = uniform(3, 2, 5, 4, 2) * 1.4 - 0.2, uniform(3, 2, 5, 4) * (bins / 2 + 2), valid, depth
    return [t.to(device) if t.dtype == torch.bool else t.to(device, dtype) for t in case]


RULES = [DepthFit(1.0, 0.5), DepthFit(1.0, 0.5, squared_sigma=False), DepthFit(2.0, 0.5, distance_to_neighbours=False),
         DepthFit(1.0, 0.25, sigma=0.7, softmax_depth=False)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fit", [depth_consistency, depth_consistency_reference])
def test_consistency_equals_a_loop(device, fit, rule):
    position, metres, valid, depth = depth_case(bins=40)
    weight = fit(*(t.to(device) for t in (position, metres, valid, depth)), rule).cpu()
    assert weight.shape == (3, 2, 5, 4) and valid.any() and not valid.all()
    for n, b, q, z in itertools.product(*map(range, weight.shape)):
        if not valid[n, b, q].any():
            assert weight[n, b, q, z] == 0
            continue
        value = depth[b, n].flatten(1).T.unsqueeze(1)[None]
        where = position[n, b, q, z].view(1, 1, 1, 1, 1, 2)
        sampled = ms_deform_attn_reference(value, [SIZE], where, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64))
        if rule.softmax_depth:
            sampled = sampled.softmax(-1)
        likely = rule.first + rule.step * int(sampled.argmax())
        bins = (likely - rule.step, likely + rule.step) if rule.distance_to_neighbours else (likely,)
        mu = min(abs(float(metres[n, b, q, z]) - metre) for metre in bins)
        exponent = mu**2 / 2 * rule.sigma**2 if rule.squared_sigma else mu**2 / (2 * rule.sigma**2)
        assert weight[n, b, q, z].item() == pytest.approx(math.exp(-exponent), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("bins", [1, 5, 31, 32, 33, 88, 96, 97, 200, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_consistency_equals_the_reference(device, dtype, bins):
    case = depth_case(device, dtype, bins)
    for rule in RULES:
        expected = depth_consistency_reference(*case, rule)
        assert torch.count_nonzero(expected) > 5
        torch.testing.assert_close(depth_consistency(*case, rule), expected)


def certain_case(device, values):
    """One anchor at 3.2 m over a map whose every pixel holds ``values``; bins of 1 m from 0 m."""
    depth = torch.tensor(values, device=device).view(1, 1, -1, 1, 1).expand(-1, -1, -1, 2, 2)
    ones = torch.ones(1, 1, 1, 1, device=device)
    return ones.unsqueeze(-1).expand(-1, -1, -1, -1, 2) * 0.5, ones * 3.2, ones.bool(), depth


@pytest.mark.parametrize("values, softmax, winner", [
    ([0.2, 0.7, 0.3], True, 1), ([0.3, 0.3, 0.3], True, 0), ([0.0, 0.0, 0.0], True, 0),
    ([0.1, 0.5 - 2**-25, 0.5], True, 1),  # the softmax makes neighbours equal, and the first counts
    ([0.1, 0.5 - 2**-25, 0.5], False, 2), ([0.1, 0.5 - 2**-20, 0.5], True, 2),
    ([0.5] + 39 * [0.1] + [0.5], True, 0), (40 * [0.1] + [0.5, 0.5], True, 40), (33 * [0.1] + [0.5], False, 33)])
@pytest.mark.parametrize("fit", [depth_consistency, depth_consistency_reference])
def test_the_first_of_equal_bins_counts(device, fit, values, softmax, winner):
    rule = DepthFit(0.0, 1.0, distance_to_neighbours=False, softmax_depth=softmax, sigma=0.1)
    weight = fit(*certain_case(device, values), rule)
    assert weight.item() == pytest.approx(math.exp(-(3.2 - winner) ** 2 / 2 * 0.01), rel=1e-5)


def test_consistency_takes_half_precision_depth_and_gives_no_gradient(device):
    position, metres, valid, depth = depth_case(device, torch.float32)
    half = depth.half()
    expected = depth_consistency(position, metres, valid, half.float(), RULES[0])
    weight = depth_consistency(position, metres, valid, half.requires_grad_(), RULES[0])
    assert torch.equal(weight, expected) and not weight.requires_grad


def test_consistency_of_noncontiguous_inputs(device):
    case = depth_case(device)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in case]
    torch.testing.assert_close(depth_consistency(*strided, RULES[0]), depth_consistency(*case, RULES[0]))


@pytest.mark.parametrize("changed, error, message", [
    ({0: lambda t: t.half()}, TypeError, "position must be one of torch.float32"),
    ({0: lambda t: t[..., 0]}, ValueError, r"position must have shape \(N, B, Q, Z, 2\), got"),
    ({0: lambda t: t[..., :1]}, ValueError, r"position must have shape \(N, B, Q, Z, 2\) = \(3, 2, 5, 4, 2\)"),
    ({1: lambda t: t.float()}, TypeError, "anchor_depth must have the dtype of position"),
    ({1: lambda t: t[:, :, 1:]}, ValueError, r"anchor_depth must have .*\(3, 2, 5, 4\), got \(3, 2, 4, 4\)"),
    ({2: lambda t: t.int()}, TypeError, "valid must be one of torch.bool"),
    ({2: lambda t: t[1:]}, ValueError, r"valid must have shape .*\(3, 2, 5, 4\), got \(2, 2, 5, 4\)"),
    ({3: lambda t: t.transpose(0, 1)}, ValueError, r"depth must have shape \(B, N, D, h, w\) = \(2, 3, 88, 3, 5\)"),
    ({3: lambda t: t[:, :, :0]}, ValueError, "depth must have at least one bin"),
    ({3: lambda t: t.to("meta")}, ValueError, "depth must be on the device of position, cpu, got meta"),
    ({4: lambda t: 0.5}, TypeError, "rule must be a DepthFit, got float")])
def test_consistency_refusals(changed, error, message):
    case = [changed.get(i, lambda t: t)(t) for i, t in enumerate((*depth_case(), RULES[0]))]
    with pytest.raises(error, match=message):
        depth_consistency(*case)


# ---- all operators --------------------------------------------------------------------------------------------------


@needs_library
def test_registration(device):
    check, ops = torch.library.opcheck, torch.ops.mmdet3d
    check(ops.oa_assign_queries.default, (torch.rand(3, 2, 7, device=device) < 0.5,))
    check(ops.oa_project_points.default, (*projection_case(device), 2.0, 5.0, 1e-5))
    position, metres, valid, depth = depth_case(device)
    bins_last = depth.flatten(3).transpose(2, 3).contiguous()
    check(ops.oa_depth_consistency.default,
          (position, metres, valid, bins_last, *SIZE, 1.0, 0.5, 2.0, True, True, True))
