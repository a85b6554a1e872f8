"""oa_cross_attention and what prepares its inputs: loops, gradients, compiled against reference, refusals."""

import itertools
import math

import pytest
import torch

from mmdet3d.ops import (
    DepthFit,
    assign_queries,
    assign_queries_reference,
    depth_consistency,
    depth_consistency_reference,
    ms_deform_attn_reference,
    oa_cross_attention,
    oa_cross_attention_reference,
    project_points,
    project_points_reference,
)
from mmdet3d.ops._library import AVAILABLE

SIZE = (3, 5)  # (h, w)
needs_library = pytest.mark.skipif(not AVAILABLE, reason="operators are not compiled")
attentions = pytest.mark.parametrize("attend", [oa_cross_attention, oa_cross_attention_reference])


def make_case(device="cpu", dtype=torch.float64, *, sizes=(3, 2, 7, 2, 4, 6), size=SIZE, seed=0, seen=0.5):
    """Arguments of the attention; sizes = (N, B, Q, M, D, P). Query 4 is seen by no camera."""
    N, B, Q, M, D, P = sizes
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = uniform(N, B, Q) < seen
    mask[:, :, 4:5] = False
    floats = (uniform(B, Q, M, P, 2) * 4 - 2, uniform(M, P, 2) * 2 - 1, uniform(B, Q, M, P),
              uniform(N, B, Q, P, 2) * 1.2 - 0.1, uniform(N, B, Q, P), uniform(B, Q, P))
    value = uniform(N, B, size[0] * size[1], M, D) - 0.5
    others = [t.to(device, torch.float64 if dtype == torch.float64 else torch.float32) for t in floats]
    return value.to(device, dtype), size, *others, assign_queries(mask).to(device)


def run_with_gradients(attend, value, size, *others, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (value, *others[:3])]
    out = attend(leaves[0], size, *leaves[1:], *others[3:])
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out)))


def full_size(device, dtype):
    """Inputs at the size of the finest stage; a query is seen by about one of six cameras."""
    N, B, Q, Z, bins = 6, 1, 10000, 8, 88
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    angle = torch.arange(Q) % 100 / 100 * N  # neighbouring queries are seen by the same camera
    seen = ((angle - torch.arange(N).view(N, 1, 1)) % N < 1.2).expand(N, B, Q).contiguous()
    valid = seen.unsqueeze(-1) & (uniform(N, B, Q, Z) < 0.8)
    position, metres = uniform(N, B, Q, Z, 2), uniform(N, B, Q, Z) * 50
    depth = (uniform(B, N, bins, 16, 44) * 4).softmax(2)
    floats = (uniform(B, Q, 8, Z, 2) * 4 - 2, uniform(8, Z, 2), uniform(B, Q, 8, Z).softmax(-1), position,
              uniform(N, B, Q, Z), uniform(B, Q, Z))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    geometry = [t.to(device, wide) for t in (position, metres)] + [valid.to(device), depth.to(device, wide)]
    attention = [uniform(N, B, 704, 8, 12).to(device, dtype), (16, 44), *(t.to(device, wide) for t in floats)]
    return seen.to(device), geometry, attention


def bench_cases(device, dtype):
    """(name, compiled, reference) callables at the sizes of the finest stage of the released model."""
    seen, geometry, attention = full_size(device, dtype)
    attention.append(assign_queries(seen))
    grad = torch.rand(1, 10000, 96, device=device, dtype=attention[2].dtype)
    rule = DepthFit(1.0, 0.5)
    points = torch.rand(10000, 8, 4, device=device, dtype=attention[2].dtype)
    projection = points, torch.rand(1, 6, 4, 4, device=device, dtype=points.dtype), (256, 704), 1e-5

    def pair(make):
        return [make(attend) for attend in (oa_cross_attention, oa_cross_attention_reference)]

    inputs = sum(attention[i].nbytes for i in (0, 2, 3, 4))

    def backward(attend):
        leaves = [t.clone().requires_grad_() for t in (attention[0], *attention[2:5])]
        out = attend(leaves[0], attention[1], *leaves[1:], *attention[5:])
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return [
        ("project_points", lambda: project_points(*projection), lambda: project_points_reference(*projection)),
        ("assign_queries", lambda: assign_queries(seen), lambda: assign_queries_reference(seen)),
        ("depth_consistency", lambda: depth_consistency(*geometry, rule),
         lambda: depth_consistency_reference(*geometry, rule)),
        ("oa_cross_attention forward", *pair(lambda attend: lambda: attend(*attention)),
         {"bytes": inputs + grad.nbytes}),
        ("oa_cross_attention backward", *pair(backward), {"bytes": 2 * inputs + grad.nbytes}),
    ]


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


# ---- attention ------------------------------------------------------------------------------------------------------


def attend_literally(value, size, base, slope, weights, position, consistency, visibility, source):
    N, B, _, M, D = value.shape
    _, Q, _, P, _ = base.shape
    out = torch.zeros(B, Q, M, D, dtype=torch.float64)
    for b, q in itertools.product(range(B), range(Q)):
        cameras = [n for n in range(N) if 0 <= source[n, b, q] < Q]
        for n, m, p in itertools.product(cameras, range(M), range(P)):
            visible = visibility[b, source[n, b, q]]
            offset = base[b, q, m, p] + visible.mean() * slope[m, p]
            where = position[n, b, q, p] + offset / torch.tensor([size[1], size[0]])
            x, y = (where * torch.tensor([size[1], size[0]]) - 0.5).tolist()
            weight = weights[b, q, m, p] * consistency[n, b, q, p] * visible[p] / len(cameras)
            for row, column in itertools.product(range(size[0]), range(size[1])):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                out[b, q, m] += weight * share * value[n, b, row * size[1] + column, m]
    return out.flatten(2)


@attentions
def test_attention_equals_a_loop(device, attend):
    value, size, *others = case = make_case()
    assert len({int(count) for count in (others[-1] >= 0).sum(0).flatten()}) > 2  # of cameras that see a query
    expected = attend_literally(*case)
    out = attend(value.to(device), size, *(t.to(device) for t in others))
    torch.testing.assert_close(out.cpu(), expected)
    assert torch.count_nonzero(out[:, 4]) == 0 and torch.count_nonzero(out) > 0


@attentions
def test_what_is_no_query_does_not_attend(device, attend):
    value, size, *others, source = make_case(device)
    expected = attend(value, size, *others, source)
    for wrong in (-2, 7, 2**31 - 1, -(2**31)):
        other = torch.where(source < 0, wrong, source)
        torch.testing.assert_close(attend(value, size, *others, other), expected)


@attentions
def test_gradcheck(device, attend):
    value, size, *others = make_case(device, sizes=(3, 2, 5, 2, 3, 2))
    leaves = [t.requires_grad_() for t in (value, *others[:3])]
    assert torch.autograd.gradcheck(
        lambda v, *rest: attend(v, size, *rest, *others[3:]), leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 4, 8, 12, 16, 30])
def test_float32_equals_float64_reference(device, channels):
    case = make_case(dtype=torch.float32, sizes=(4, 2, 37, 3, channels, 5))
    grad = torch.randn(2, 37, 3 * channels, dtype=torch.float64)
    doubles = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in case]
    expected = run_with_gradients(oa_cross_attention_reference, *doubles, grad=grad)
    on_device = [t.to(device) if isinstance(t, torch.Tensor) else t for t in case]
    results = run_with_gradients(oa_cross_attention, *on_device, grad=grad)
    for actual, target in zip(results, expected, strict=True):
        assert actual.dtype == torch.float32 and actual.device.type == device
        error = (actual.cpu().double() - target).abs().max()
        assert error <= 2e-5 * target.abs().max().clamp(min=1), f"largest error {error}"


@attentions
@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_summed_in_float32(device, attend, dtype, channels):
    value, *others = make_case(device, dtype, sizes=(3, 2, 11, 2, channels, 5))
    grad = torch.randn(2, 11, 2 * channels)
    expected = run_with_gradients(oa_cross_attention_reference, value.float(), *others, grad=grad)
    results = run_with_gradients(attend, value, *others, grad=grad)
    assert results[0].dtype == torch.float32 and results[1].dtype == dtype
    for actual, target in zip((results[0], *results[2:]), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1].float(), expected[1], rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_noncontiguous_inputs_and_odd_addresses(device):
    value, size, *others = make_case(device, torch.float32)
    grad = torch.randn(2, 7, 8)
    expected = run_with_gradients(oa_cross_attention, value, size, *others, grad=grad)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (value, *others)]
    shifted = []
    for tensor in (value, *others):
        buffer = tensor.new_zeros(tensor.numel() + 1)
        buffer[1:] = tensor.flatten()
        shifted.append(buffer[1:].view(tensor.shape))
    for first, *rest in (strided, shifted):
        leaves = [t.detach().requires_grad_() for t in (first, *rest[:3])]
        out = oa_cross_attention(leaves[0], size, *leaves[1:], *rest[3:])
        results = (out, *torch.autograd.grad(out, leaves, grad.to(out)))
        for actual, target in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-5)


@attentions
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_positions_that_are_no_numbers_contribute_nothing(device, attend, bad):
    value, size, base, slope, weights, position, consistency, visibility, source = make_case(device, torch.float32)
    grad = torch.randn(2, 7, 8)
    hit = torch.zeros_like(consistency, dtype=torch.bool)
    hit[:, :, ::2, 1:4] = True
    broken = torch.where(hit.unsqueeze(-1), bad, position)
    rest = (consistency * ~hit, visibility, source)
    expected = run_with_gradients(attend, value, size, base, slope, weights, position, *rest, grad=grad)
    rest = (consistency, visibility, source)
    actual = run_with_gradients(attend, value, size, base, slope, weights, broken, *rest, grad=grad)
    for a, t in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, t, rtol=1e-4, atol=1e-5)


@attentions
@pytest.mark.parametrize("axis", range(1, 6))
def test_empty(device, attend, axis):
    sizes = [3, 2, 7, 2, 4, 6]
    sizes[axis] = 0
    case = make_case(device, sizes=sizes)
    _, B, Q, M, D, _ = sizes
    results = run_with_gradients(attend, *case, grad=torch.ones(B, Q, M * D))
    assert results[0].shape == (B, Q, M * D)
    for grad, leaf in zip(results[1:], (case[0], *case[2:5]), strict=True):
        assert grad.shape == leaf.shape
    assert all(torch.count_nonzero(result) == 0 for result in results)


@attentions
def test_no_camera(device, attend):
    assert torch.equal(attend(*make_case(device, sizes=(0, 2, 7, 2, 4, 6))).cpu(), torch.zeros(2, 7, 8).double())


def test_only_trained_inputs_get_gradients(device):
    value, size, *others = make_case(device)
    leaves = [t.requires_grad_() for t in (value, *others[:-1])]
    oa_cross_attention(value, size, *others).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == 4 * [True] + 3 * [False]
    unseen = torch.full_like(others[-1], -1)
    out = oa_cross_attention(value, size, *others[:-1], unseen)
    grads = torch.autograd.grad(out.sum(), leaves[:4])
    assert torch.count_nonzero(out) == 0 and all(torch.count_nonzero(grad) == 0 for grad in grads)


def change(position, function):
    return lambda case: [function(t) if i == position else t for i, t in enumerate(case)]


@pytest.mark.parametrize(("changed", "error", "message"), [
    (change(0, lambda t: t.int()), TypeError, r"value must be one of torch.float32.*got torch.int32"),
    (change(0, lambda t: t[0]), ValueError, r"value must have shape \(N, B, S, M, D\), got \(2, 15, 2, 4\)"),
    (change(0, lambda t: t[:, :, 1:]), ValueError, r"S = h \* w = 15 rows for size \(3, 5\), got 14"),
    (change(1, lambda t: (3.0, 5)), TypeError, "size must hold integers, got 3.0"),
    (change(1, lambda t: (0, 5)), ValueError, r"size must be positive, got \(0, 5\)"),
    (change(1, lambda t: 15), ValueError, r"size must be \(h, w\), got 15"),
    (change(2, lambda t: t[:1]), ValueError, r"base_offsets must have .*\(2, 7, 2, 6, 2\), got \(1, 7, 2, 6, 2\)"),
    (change(2, lambda t: t[..., 0]), ValueError, r"base_offsets must have shape \(B, Q, M, P, 2\), got"),
    (change(3, lambda t: t[:1]), ValueError, r"offset_slope must have shape \(M, P, 2\) = \(2, 6, 2\)"),
    (change(4, lambda t: t.long()), TypeError, "attention_weights must be one of torch.float32"),
    (change(4, lambda t: t[:, 1:]), ValueError, r"attention_weights must have .*\(2, 7, 2, 6\), got \(2, 6, 2, 6\)"),
    (change(5, lambda t: t.transpose(0, 1)), ValueError, r"position must have .*\(3, 2, 7, 6, 2\), got \(2, 3"),
    (change(6, lambda t: t[..., 1:]), ValueError, r"consistency must have .*\(3, 2, 7, 6\), got \(3, 2, 7, 5\)"),
    (change(7, lambda t: t.to("meta")), ValueError, "visibility must be on the device of value, cpu, got meta"),
    (change(8, lambda t: t.long()), TypeError, "source must be one of torch.int32, got torch.int64"),
    (change(8, lambda t: t[1:]), ValueError, r"source must have shape \(N, B, Q\) = \(3, 2, 7\), got \(2, 2, 7\)")])
def test_refusals(changed, error, message):
    with pytest.raises(error, match=message):
        oa_cross_attention(*changed(make_case()))


@needs_library
def test_threads_do_not_change_the_result():
    case = make_case(dtype=torch.float32, sizes=(3, 2, 64, 3, 12, 8))
    grad = torch.randn(2, 64, 36)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_with_gradients(oa_cross_attention, *case, grad=grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda
def test_deterministic_mode_gives_the_same_bits():
    case = make_case("cuda", torch.float32, sizes=(3, 1, 500, 2, 12, 8))
    grad = torch.randn(1, 500, 24)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = [run_with_gradients(oa_cross_attention, *case, grad=grad) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda
def test_operators_can_be_captured_in_a_graph():
    seen, geometry, attention = full_size("cuda", torch.float32)

    def run():
        consistency = depth_consistency(*geometry, DepthFit(1.0, 0.5))
        return oa_cross_attention(*attention[:6], consistency, attention[7], assign_queries(seen))

    expected = run()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.cuda
def test_cuda_equals_the_cpu_at_full_size():
    on_cpu, on_cuda = ([*full_size(device, torch.float32)] for device in ("cpu", "cuda"))
    for case in (on_cpu, on_cuda):
        case[2].append(assign_queries(case[0]))
    assert torch.equal(on_cpu[2][-1], on_cuda[2][-1].cpu())
    fits = [depth_consistency(*case[1], DepthFit(1.0, 0.5)).cpu() for case in (on_cpu, on_cuda)]
    # Where two bins are equally probable but for rounding, the weights may differ.
    assert (fits[0] - fits[1]).abs().gt(1e-4).float().mean() < 1e-4
    grad = torch.rand(1, 10000, 96)
    results = [run_with_gradients(oa_cross_attention, *case[2], grad=grad) for case in (on_cpu, on_cuda)]
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs.cpu()).abs().max() <= 1e-4 * mine.abs().max()


@needs_library
def test_registration(device):
    value, size, *others = make_case(device)
    check, ops = torch.library.opcheck, torch.ops.mmdet3d
    check(ops.oa_cross_attention_backward.default, (torch.randn_like(others[0][..., 0, 0]).repeat(1, 1, 4), value,
                                                    *size, *others))
    leaves = [t.requires_grad_() for t in (value, *others[:3])]
    check(ops.oa_cross_attention_forward.default, (leaves[0], *size, *leaves[1:], *others[3:]))
    check(ops.oa_assign_queries.default, (others[-1] >= 0,))
    check(ops.oa_project_points.default, (*projection_case(device), 2.0, 5.0, 1e-5))
    position, metres, valid, depth = depth_case(device)
    bins_last = depth.flatten(3).transpose(2, 3).contiguous()
    check(ops.oa_depth_consistency.default,
          (position, metres, valid, bins_last, *SIZE, 1.0, 0.5, 2.0, True, True, True))


@needs_library
def test_second_derivative_is_refused(device):
    value, *rest = make_case(device)
    value.requires_grad_()
    (grad,) = torch.autograd.grad(oa_cross_attention(value, *rest).sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="oa_cross_attention has no second derivative"):
        grad.sum().backward()


@needs_library
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    value, _, *others = make_case(device)
    seen = others[-1] >= 0

    def attend(value, *others):
        return oa_cross_attention(value, SIZE, *others, assign_queries(seen))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = attend(value, *others[:-1])
    leaves = [value.requires_grad_(), *others[:-1]]
    out = compiled(*leaves)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), value), torch.autograd.grad(
        oa_cross_attention(value, SIZE, *others).sum(), value))
