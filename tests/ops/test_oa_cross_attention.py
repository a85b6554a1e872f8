"""oa_cross_attention: loops, gradients, compiled against reference, refusals. test_oa_inputs.py has its inputs."""

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
    oa_cross_attention,
    oa_cross_attention_reference,
    project_points,
    project_points_reference,
)

SIZE = (3, 5)  # (h, w)
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
