"""ms_deform_attn: loop, grid_sample, gradients, compiled against reference, refusals, registration."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled_library import needs_library

from mmdet3d.ops import ms_deform_attn, ms_deform_attn_reference

LEVELS = [(3, 5), (2, 4)]  # (H, W)


def make_case(device="cpu", dtype=torch.float64, *, sizes=(2, 7, 3, 4, 6), levels=LEVELS, seed=0, margin=0.3):
    """value, levels, locations, weights; sizes = (B, Q, M, D, P); locations reach ``margin`` beyond the maps."""
    B, Q, M, D, P = sizes
    generator = torch.Generator().manual_seed(seed)
    pixels, L = sum(h * w for h, w in levels), len(levels)
    value = torch.randn(B, pixels, M, D, generator=generator, dtype=torch.float64)
    locations = torch.rand(B, Q, M, L, P, 2, generator=generator, dtype=torch.float64) * (1 + 2 * margin) - margin
    weights = torch.rand(B, Q, M, L, P, generator=generator, dtype=torch.float64)
    return value.to(device, dtype), levels, locations.to(device, dtype), weights.to(device, dtype)


def make_local_case(device, dtype, *, sizes, queries, level, reach):
    """Queries on a grid (H, W) that sample ``level`` within ``reach`` of its length around their own place."""
    B, M, D, P = sizes
    H, W = queries
    value, levels, locations, weights = make_case("cpu", sizes=(B, H * W, M, D, P), levels=[level], margin=0)
    y, x = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
    own_place = torch.stack((x, y), dim=-1).view(1, H * W, 1, 1, 1, 2)
    locations = own_place + reach * (2 * locations - 1)
    return value.to(device, dtype), levels, locations.to(device, dtype), weights.softmax(-1).to(device, dtype)


def bench_cases(device, dtype):
    """(name, compiled, reference) callables at the sizes of the released model."""
    temporal = make_local_case(device, dtype, sizes=(2, 8, 12, 8), queries=(100, 100), level=(100, 100), reach=0.04)
    cross = make_local_case(device, dtype, sizes=(6, 8, 12, 8), queries=(40, 100), level=(16, 44), reach=0.2)
    cases = []
    for name, (value, levels, *rest) in (("temporal", temporal), ("cross", cross)):
        leaves = [t.clone().requires_grad_() for t in (value, *rest)]
        grad = torch.randn(value.shape[0], rest[0].shape[1], 96, device=device, dtype=dtype)
        pair = [ms_deform_attn, ms_deform_attn_reference]
        inputs = sum(t.nbytes for t in leaves)
        cases.append((f"ms_deform_attn {name} forward", *(_forward(f, value, levels, rest) for f in pair),
                      {"bytes": inputs + grad.nbytes}))
        cases.append((f"ms_deform_attn {name} backward", *(_backward(f, leaves, levels, grad) for f in pair),
                      {"bytes": 2 * inputs + grad.nbytes}))
    return cases


def _forward(function, value, levels, rest):
    return lambda: function(value, levels, *rest)


def _backward(function, leaves, levels, grad):
    out = function(leaves[0], levels, *leaves[1:])
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def loop(value, levels, locations, weights):
    B, Q, M, L, P, _ = locations.shape
    out = torch.zeros(B, Q, M, value.shape[-1], dtype=torch.float64)
    value, locations, weights = value.double().cpu(), locations.double().cpu(), weights.double().cpu()
    for b, q, m, lv, p in itertools.product(*map(range, (B, Q, M, L, P))):
        H, W = levels[lv]
        start = sum(h * w for h, w in levels[:lv])
        x, y = (locations[b, q, m, lv, p] * torch.tensor([W, H]) - 0.5).tolist()
        for column, row in itertools.product(range(W), range(H)):
            share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            out[b, q, m] += weights[b, q, m, lv, p] * share * value[b, start + row * W + column, m]
    return out.flatten(2)


def run_with_gradients(function, value, levels, locations, weights, grad):
    leaves = [t.clone().requires_grad_() for t in (value, locations, weights)]
    out = function(leaves[0], levels, *leaves[1:])
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out)))


def assert_near(actual, expected, tolerance):
    """Equal to within ``tolerance`` times the largest expected magnitude."""
    error = (actual.double().cpu() - expected.double().cpu()).abs().max()
    assert error <= tolerance * expected.abs().max().clamp(min=1), f"largest error {error}"


@pytest.mark.parametrize("levels", [LEVELS, [(4, 3)], [(1, 1), (1, 7), (5, 1)]])
@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
def test_forward_equals_a_loop(device, function, levels):
    case = make_case(device, levels=levels)
    out = function(*case)
    assert out.shape == (2, 7, 12)
    torch.testing.assert_close(out.cpu(), loop(*case))


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
def test_equals_grid_sample(device, function):
    value, levels, locations, weights = make_case(device, levels=[(5, 7)])
    B, Q, M, _, P, _ = locations.shape
    maps = value.view(B, 5, 7, M, 4).permute(0, 3, 4, 1, 2).flatten(0, 1)
    grid = (2 * locations - 1).permute(0, 2, 1, 3, 4, 5).reshape(B * M, Q, P, 2)
    samples = F.grid_sample(maps, grid, align_corners=False, padding_mode="zeros").view(B, M, 4, Q, P)
    expected = (samples * weights.squeeze(3).permute(0, 2, 1, 3).unsqueeze(2)).sum(-1).permute(0, 3, 1, 2)
    torch.testing.assert_close(function(value, levels, locations, weights), expected.flatten(2))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (2.5 / 4, 1.5 / 3, 12.0),  # the centre of the pixel in column 2 of row 1
        (2 / 4, 1.5 / 3, 11.5),  # between columns 1 and 2
        (2.5 / 4, 1 / 3, 7.0),  # between rows 0 and 1
        (3.0 / 4, 2 / 3, 17.5),  # between columns 2 and 3, rows 1 and 2
        (0.0, 0.5 / 3, 0.5),  # left border: half of pixel (0, 0), half of nothing
        (1.0, 1.0, 0.25 * 23.0),  # corner: a quarter of the last pixel
        (-0.125, 0.5 / 3, 0.0),  # one pixel off the map
        (4.5 / 4, 0.5 / 3, 0.0),
        (0.5, -0.5 / 3, 0.0),
        (0.5, 3.5 / 3, 0.0),
    ],
)
def test_closed_form(device, x, y, expected):
    # Pixel (row, column) of a 3 x 4 map holds 10 * row + column; pixel (0, 0) holds 1.
    value = (10.0 * torch.arange(3).view(3, 1) + torch.arange(4)).double()
    value[0, 0] = 1
    location = torch.tensor([x, y], dtype=torch.float64, device=device).view(1, 1, 1, 1, 1, 2)
    weights = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64, device=device)
    out = ms_deform_attn(value.view(1, 12, 1, 1).to(device), [(3, 4)], location, weights)
    assert out.item() == pytest.approx(2 * expected, abs=1e-12)


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
def test_gradcheck(device, function):
    value, levels, locations, weights = make_case(device, sizes=(2, 2, 2, 3, 2))
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    check = torch.autograd.gradcheck
    # The gradient of value is summed by atomic additions on CUDA.
    assert check(lambda v, s, w: function(v, levels, s, w), leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 4, 8, 12, 16, 30, 32, 88])
def test_float32_equals_float64_reference(device, channels):
    value, levels, locations, weights = make_case("cpu", torch.float32, sizes=(2, 37, 3, channels, 5))
    grad = torch.randn(2, 37, 3 * channels, dtype=torch.float64)
    doubles = value.double(), levels, locations.double(), weights.double()
    expected = run_with_gradients(ms_deform_attn_reference, *doubles, grad)
    case = value.to(device), levels, locations.to(device), weights.to(device)
    for actual, target in zip(run_with_gradients(ms_deform_attn, *case, grad), expected, strict=True):
        assert actual.dtype == torch.float32 and actual.device.type == device
        assert_near(actual, target, 1e-5)


@pytest.mark.parametrize("channels", [3, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(device, dtype, channels):
    value, levels, locations, weights = make_case(device, dtype, sizes=(1, 11, 2, channels, 5))
    grad = torch.randn(1, 11, 2 * channels).to(dtype)
    doubles = value.double().cpu(), levels, locations.double().cpu(), weights.double().cpu()
    expected = run_with_gradients(ms_deform_attn_reference, *doubles, grad.double())
    results = run_with_gradients(ms_deform_attn, value, levels, locations, weights, grad)
    for actual, target in zip(results, expected, strict=True):
        assert actual.dtype == dtype
        # Only the result is rounded: half a unit in the last place of each number.
        torch.testing.assert_close(actual.double().cpu(), target, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_noncontiguous_inputs(device):
    value, levels, locations, weights = make_case(device)
    grad = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = run_with_gradients(ms_deform_attn, value, levels, locations, weights, grad)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (value, locations, weights, grad)]
    assert not any(t.is_contiguous() for t in strided)
    value, locations, weights, grad = strided
    results = run_with_gradients(ms_deform_attn, value, levels, locations, weights, grad)
    for actual, target in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, target)


def test_inputs_at_odd_addresses(device):
    # Slices of a larger buffer that start off the alignment that vector loads need.
    value, levels, locations, weights = make_case(device, torch.float32)
    expected = ms_deform_attn(value, levels, locations, weights)
    shifted = []
    for tensor in (value, locations, weights):
        buffer = torch.zeros(tensor.numel() + 1, device=device)
        buffer[1:] = tensor.flatten()
        shifted.append(buffer[1:].view(tensor.shape))
    value, locations, weights = shifted
    torch.testing.assert_close(ms_deform_attn(value, levels, locations, weights), expected)
    grad = torch.randn(2, 7, 12)
    actual = run_with_gradients(ms_deform_attn, value, levels, locations, weights, grad)
    target = run_with_gradients(ms_deform_attn_reference, value, levels, locations, weights, grad)
    for a, t in zip(actual, target, strict=True):
        assert_near(a, t, 1e-5)


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_locations_that_are_no_numbers_contribute_nothing(device, function, bad):
    value, levels, locations, weights = make_case(device, torch.float32)
    grad = torch.randn(2, 7, 12)
    hit = torch.zeros(weights.shape, dtype=torch.bool, device=device)
    hit[:, ::2, 1, :, 1:4] = True
    broken = locations.clone()
    broken[..., 0][hit] = bad
    broken[0, ..., 1][hit[0]] = bad
    expected = run_with_gradients(function, value, levels, locations, weights * ~hit, grad)
    actual = run_with_gradients(function, value, levels, broken, weights, grad)
    for a, t in zip(actual[:3], expected[:3], strict=True):
        assert_near(a, t, 1e-6)
    assert torch.count_nonzero(actual[2][hit]) == 0 and torch.count_nonzero(actual[3][hit]) == 0


@pytest.mark.parametrize("length", [1, 2, 64, 100, 128, 1000])
def test_locations_one_rounding_step_from_the_border(device, length):
    value = torch.arange(1.0, length + 1, device=device).view(1, length, 1, 1)
    edges = torch.tensor([-0.5, 0, 0.5, length - 0.5, length, length + 0.5], dtype=torch.float64) / length
    edges = edges.float()
    x = torch.cat((edges, edges.nextafter(torch.tensor(-9.0)), edges.nextafter(torch.tensor(9.0)))).to(device)
    locations = torch.stack((x, torch.full_like(x, 0.5)), dim=-1).view(1, -1, 1, 1, 1, 2)
    case = value, [(1, length)], locations, torch.ones_like(locations[..., 0])
    grad = torch.ones(1, 18, 1)
    actual, target = (run_with_gradients(f, *case, grad) for f in (ms_deform_attn, ms_deform_attn_reference))
    assert_near(actual[0], loop(*case), 1e-4)
    # The gradient of a location jumps at pixel centres, so one rounding step may change it.
    for a, t in zip((actual[0], actual[1], actual[3]), (target[0], target[1], target[3]), strict=True):
        assert_near(a, t, 1e-5)
    assert actual[2].isfinite().all()


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
@pytest.mark.parametrize(
    "sizes", [(0, 7, 3, 4, 6), (2, 0, 3, 4, 6), (2, 7, 0, 4, 6), (2, 7, 3, 0, 6), (2, 7, 3, 4, 0)]
)
def test_empty(device, function, sizes):
    case = make_case(device, sizes=sizes)
    B, Q, M, D, _ = sizes
    results = run_with_gradients(function, *case, torch.ones(B, Q, M * D))
    assert results[0].shape == (B, Q, M * D)
    for grad, leaf in zip(results[1:], (case[0], *case[2:]), strict=True):
        assert grad.shape == leaf.shape
    assert all(torch.count_nonzero(result) == 0 for result in results)


def test_no_levels(device):
    case = make_case(device, levels=[])
    results = run_with_gradients(ms_deform_attn, *case, torch.ones(2, 7, 12))
    assert results[0].shape == (2, 7, 12) and torch.count_nonzero(results[0]) == 0


def test_many_levels(device):
    levels = [(1 + i % 3, 2 + i % 2) for i in range(20)]
    case = make_case(device, sizes=(1, 3, 2, 4, 2), levels=levels)
    torch.testing.assert_close(ms_deform_attn(*case).cpu(), loop(*case))


def test_levels_as_a_tensor_or_array(device):
    value, levels, *rest = make_case(device)
    expected = ms_deform_attn(value, levels, *rest)
    for dtype in (torch.int32, torch.int64):
        shapes = torch.tensor(levels, dtype=dtype, device=device)
        torch.testing.assert_close(ms_deform_attn(value, shapes, *rest), expected)
    torch.testing.assert_close(ms_deform_attn(value, np.array(levels), *rest), expected)


def change(position, function):
    def changed(case):
        return [function(t) if i == position else t for i, t in enumerate(case)]

    return changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (change(0, lambda t: t.int()), TypeError, r"value must be one of torch.float32.*got torch.int32"),
        (change(0, lambda t: t[0]), ValueError, r"value must have shape \(B, S, M, D\), got \(23, 3, 4\)"),
        (change(0, lambda t: t[:, 1:]), ValueError, r"S = sum of H \* W = 23 rows for spatial_shapes .* got 22"),
        (change(1, lambda t: t[:1]), ValueError, r"= 15 rows for spatial_shapes \[\(3, 5\)\], got 23"),
        (change(1, lambda t: [(5, 3), (4, 0)]), ValueError, r"spatial_shapes must be positive, got"),
        (change(1, lambda t: [(3.0, 5), (2, 4)]), TypeError, r"spatial_shapes must hold integers, got 3.0"),
        (change(1, lambda t: [3, 5]), ValueError, r"spatial_shapes must be one \(H, W\) for each level, got \[3, 5\]"),
        (change(1, lambda t: torch.ones(2, 2)), TypeError, r"spatial_shapes must hold integers .*got torch.float32"),
        (change(2, lambda t: t.float()), TypeError, r"sampling_locations must have the dtype of value, torch.float64"),
        (change(2, lambda t: t[..., 0]), ValueError, r"sampling_locations must have shape \(B, Q, M, L, P, 2\), got"),
        (change(2, lambda t: t[:1]), ValueError, r"= \(2, 7, 3, 2, 6, 2\), got \(1, 7, 3, 2, 6, 2\)"),
        (change(2, lambda t: t[:, :, :, :1]), ValueError, r"= \(2, 7, 3, 2, 6, 2\), got \(2, 7, 3, 1, 6, 2\)"),
        (change(2, lambda t: t.to("meta")), ValueError, r"sampling_locations must be on the device of value, cpu, got"),
        (change(3, lambda t: t.half()), TypeError, r"attention_weights must have the dtype of value"),
        (change(3, lambda t: t[:, 1:]), ValueError, r"attention_weights must have .* \(2, 7, 3, 2, 6\), got \(2, 6"),
        (change(3, lambda t: t.to("meta")), ValueError, r"attention_weights must be on the device of value, cpu"),
        (change(3, lambda t: None), TypeError, r"attention_weights must be a tensor, got NoneType"),
    ],
)
def test_refusals(changed, error, message):
    with pytest.raises(error, match=message):
        ms_deform_attn(*changed(make_case()))


@needs_library
def test_threads_do_not_change_the_result():
    case = make_case("cpu", torch.float32, sizes=(2, 64, 3, 12, 8))
    grad = torch.randn(2, 64, 36)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_with_gradients(ms_deform_attn, *case, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda
def test_deterministic_mode_gives_the_same_bits():
    case = make_case("cuda", torch.float32, sizes=(1, 500, 2, 12, 8))
    grad = torch.randn(1, 500, 24)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = [run_with_gradients(ms_deform_attn, *case, grad) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_registration(device):
    value, levels, locations, weights = make_case(device)
    flat = [size for level in levels for size in level]
    inputs = (value, flat, locations, weights)
    grad = torch.randn_like(value[:, :7].flatten(2))
    torch.library.opcheck(torch.ops.mmdet3d.ms_deform_attn_backward.default, (grad, *inputs))
    inputs = (value.requires_grad_(), flat, locations.requires_grad_(), weights.requires_grad_())
    torch.library.opcheck(torch.ops.mmdet3d.ms_deform_attn_forward.default, inputs)


@needs_library
def test_second_derivative_is_refused(device):
    value, *rest = make_case(device)
    value.requires_grad_()
    (grad,) = torch.autograd.grad(ms_deform_attn(value, *rest).sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="ms_deform_attn has no second derivative"):
        grad.sum().backward()


@needs_library
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(device, dynamic):
    def attend(value, locations, weights):
        return ms_deform_attn(value, LEVELS, locations, weights)

    value, levels, locations, weights = make_case(device)
    grad = torch.randn(2, 7, 12, dtype=torch.float64)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run_with_gradients(ms_deform_attn, value, levels, locations, weights, grad)
    actual = run_with_gradients(lambda v, _, s, w: compiled(v, s, w), value, levels, locations, weights, grad)
    for a, t in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, t)

    class Attend(torch.nn.Module):
        def forward(self, value, locations, weights):
            return attend(value, locations, weights)

    exported = torch.export.export(Attend(), (value, locations, weights))
    assert torch.equal(exported.module()(value, locations, weights), expected[0])
