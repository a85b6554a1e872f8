"""plane_sweep against explicit loops, against its reference, and against what the contract says about edge cases."""

import math

import pytest
import torch
from sweep_cases import (
    assert_same_cost,
    at_rest,
    convert,
    expected_by_loops,
    half_rounding,
    make_case,
    make_geometry,
    plain_cameras,
)

from mmdet3d.ops import _library
from mmdet3d.ops.plane_sweep import SweepGeometry, plane_sweep, plane_sweep_probability, plane_sweep_reference
from mmdet3d.ops.plane_sweep.geometry import sweep_positions

REAL_SIZE = (6, 256, 88, 64, 176)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

compiled = pytest.mark.skipif(
    not (_library.AVAILABLE and hasattr(torch.ops.mmdet3d, "plane_sweep")),
    reason="plane_sweep is not compiled",
)


@pytest.mark.parametrize("function", [plane_sweep, plane_sweep_reference])
@pytest.mark.parametrize("invalid_channel, by_position", [(None, False), (3, False), (None, True)])
def test_equals_loops(device, function, invalid_channel, by_position):
    case = make_case("cpu")
    expected, seen = expected_by_loops(*case, invalid_channel=invalid_channel, by_position=by_position)
    assert min(seen.values()) > 5, f"the case does not cover every kind of position: {seen}"
    current, reference, geometry, depths = case
    on_device = (current.to(device), reference.to(device), convert(geometry, device), depths.to(device))
    cost = function(*on_device, invalid_channel=invalid_channel, invalid_by_position=by_position)
    assert cost.dtype == torch.float64 and cost.device.type == device
    torch.testing.assert_close(cost.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_camera_at_rest_compares_the_maps_as_they_are(device, dtype):
    case = at_rest(device, dtype)
    cost = plane_sweep(*case, invalid_channel=None)
    difference = (case[0].to(cost.dtype) - case[1].to(cost.dtype)).abs().sum(dim=1)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float16 on a GPU: a difference is rounded, and then the sum of two.
    rtol = 2 * 2.0**-11 if dtype == torch.float16 and device == "cuda" else 1e-5
    torch.testing.assert_close(cost, difference[:, None].expand_as(cost), rtol=rtol, atol=1e-5)


def test_zero_in_the_invalid_channel_adds_the_penalty(device):
    current, reference, geometry, depths = at_rest(device)
    geometry.intrinsics[:, :2, 2] = torch.tensor([1.0, 2.0], device=device)  # between four pixels, 4 being a whole one
    inputs = (current, reference, geometry, depths)
    plain = plane_sweep(*inputs, invalid_channel=None)
    cost = plane_sweep(*inputs, invalid_channel=4, invalid_penalty=2.5)
    shown = torch.nn.functional.pad(reference[:, 4] > 0, (0, 1, 0, 1))  # (N, H + 1, W + 1)
    is_zero = ~(shown[:, :-1, :-1] | shown[:, 1:, :-1] | shown[:, :-1, 1:] | shown[:, 1:, 1:])
    assert is_zero.any() and not is_zero.all()
    torch.testing.assert_close(cost - plain, 2.5 * is_zero[:, None].expand_as(cost).double())


@pytest.mark.parametrize("point", [(3.0, 2.0, -4.0), (3.0, 2.0, 9e-4), (9.0, 0.0, 1.0), (-1.0, 2.0, 1.0),
                                   (0.0, -1.0, 1.0), (0.0, 5.0, 1.0), (math.nan, 1.0, 1.0), (math.inf, 1.0, 1.0),
                                   (1.0, 1.0, math.nan), (1e300, -1e300, 1.0), (1e300, 1e300, 1e-3)])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_behind_outside_or_not_finite_is_read_as_zero(device, point, by_position, dtype):
    current, reference, _, depths = make_case(device, dtype, (2, 7, 6, 5, 9))
    geometry = plain_cameras(device, (5, 9))._replace(older_from_pixel=torch.zeros(2, 3, 3, device=device))
    geometry.translation[:] = torch.tensor(point, dtype=torch.float64, device=device)
    for function in (plane_sweep, plane_sweep_reference):
        cost = function(current, reference, geometry, depths, invalid_channel=None, invalid_by_position=by_position)
        expected = current.abs().sum(dim=1)[:, None].expand_as(cost) + (5.0 if by_position else 0.0)
        torch.testing.assert_close(cost, expected)


def test_the_last_pixel_still_counts_in_part(device):
    current, reference, _, depths = make_case(device)
    geometry = plain_cameras(device, (4, 9))._replace(older_from_pixel=torch.zeros(2, 3, 3, device=device))
    geometry.translation[:] = torch.tensor([8.75, -0.5, 1.0], dtype=torch.float64, device=device)
    cost = plane_sweep(current, reference, geometry, depths, invalid_channel=None)
    warped = 0.25 * 0.5 * reference[:, :, :1, 8:]
    torch.testing.assert_close(cost, (current - warped).abs().sum(dim=1)[:, None].expand_as(cost))


def test_a_shear_and_a_general_last_row_are_applied_as_written(device):
    current, reference, geometry, depths = at_rest(device)
    generator = torch.Generator().manual_seed(1)
    noise = {name: 0.05 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(device)
             for name, tensor in geometry.tensors.items()}
    geometry = geometry._replace(**{name: tensor + noise[name] for name, tensor in geometry.tensors.items()})
    case = (current.cpu(), reference.cpu(), convert(geometry, "cpu"), depths.cpu())
    expected, seen = expected_by_loops(*case, invalid_channel=None)
    assert seen["inside"] > 100
    for function in (plane_sweep, plane_sweep_reference):
        cost = function(current, reference, geometry, depths, invalid_channel=None)
        torch.testing.assert_close(cost.cpu(), expected, rtol=1e-9, atol=1e-9)


def literal_positions(geometry, depths, size):
    """Positions in the older map, float32, of the steps as matrix products of points."""
    (height, width), (rows, columns) = geometry.image_size, size
    shape = (len(depths), rows, columns)
    d = depths.view(-1, 1, 1).expand(shape)
    u = torch.linspace(0, width - 1, columns).expand(shape)
    v = torch.linspace(0, height - 1, rows).view(-1, 1).expand(shape)

    def apply(matrix, points):
        return (matrix[:, None, None, None] @ points[..., None])[..., 0]

    offset = geometry.offset[:, None, None, None]
    original = apply(geometry.pixel_from_augmented, torch.stack([u, v], -1) - offset)
    point = torch.cat([original * d[..., None], d[None, ..., None].expand(*original.shape[:-1], 1)], -1)
    point = apply(geometry.older_from_pixel, point) + geometry.translation[:, None, None, None]
    image = apply(geometry.intrinsics, point)
    older = apply(geometry.augmentation, image[..., :2] / image[..., 2:]) + offset
    grid = older / torch.tensor([width - 1, height - 1]) * 2 - 1
    return (grid + 1) / 2 * torch.tensor([columns - 1, rows - 1]), point[..., 2] >= 1e-3


def test_positions_are_those_of_matrix_products_of_points():
    _, _, geometry, depths = make_case(size=(3, 1, 11, 8, 13))
    geometry, depths = convert(geometry, torch.float32), depths.float()
    grid, inside = sweep_positions(geometry, depths, (8, 13), 1e-3, torch.float32)
    at, in_front = literal_positions(geometry, depths, (8, 13))
    assert grid.dtype == torch.float32 and inside.any() and not in_front.all()
    expected = in_front & (at > -1).all(-1) & (at < torch.tensor([13, 8])).all(-1)
    assert torch.equal(inside, expected)
    found = (grid + 1) / 2 * torch.tensor([12, 7])
    torch.testing.assert_close(found[inside], at[inside], rtol=0, atol=2e-5)


def whole_pixels(size=(3, 4, 24, 6, 13)):
    """A float32 case whose positions are whole pixels but for the rounding of each step: moving cameras at rest."""
    cameras, _, _, height, width = size
    current, reference, geometry, depths = make_case(dtype=torch.float32, size=size)
    geometry = make_geometry(cameras, (height, width), torch.zeros(cameras, 3).tolist(), [0.0] * cameras)
    image_size = (4 * (height - 1) + 1, 4 * (width - 1) + 1)  # a step of 4, which every device's linspace hits
    return current, reference, convert(geometry._replace(image_size=image_size), torch.float32), depths.float()


def test_each_step_is_rounded_as_in_the_reference(device):
    """The last bit decides whether a pixel has a weight, so that one step taken otherwise shows in the penalties."""
    case = whole_pixels()
    expected = plane_sweep_reference(*case, invalid_channel=2, invalid_penalty=100.0)
    current, reference, geometry, depths = case
    in_float64 = plane_sweep_reference(current.double(), reference.double(), geometry, depths, invalid_channel=2,
                                       invalid_penalty=100.0)
    decided_by_rounding = ((expected - in_float64).abs() > 50).double().mean()
    assert decided_by_rounding > 0.02
    cost = plane_sweep(current.to(device), reference.to(device), convert(geometry, device), depths.to(device),
                       invalid_channel=2, invalid_penalty=100.0)
    torch.testing.assert_close(cost.cpu(), expected, rtol=1e-5, atol=1e-4)


def test_min_depth_is_in_metres_and_tested_first(device):
    case = at_rest(device)
    far_only = plane_sweep(*case, invalid_channel=None, invalid_by_position=True, min_depth=2.0)
    everywhere = plane_sweep(*case, invalid_channel=None, invalid_by_position=True)
    torch.testing.assert_close(far_only[:, 2:], everywhere[:, 2:])  # depths 1, 1.5 | 2, 2.5, 3
    outside = case[0].abs().sum(dim=1)[:, None].expand(-1, 2, -1, -1) + 5
    torch.testing.assert_close(far_only[:, :2], outside)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 33, 1, 5), (1, 40, 4, 6, 1), (2, 130, 37, 5, 9)])
@pytest.mark.parametrize("signed", [False, True])
def test_odd_sizes_equal_reference(device, size, signed):
    case = make_case(device, torch.float64, size, signed)
    expected = plane_sweep_reference(*case, invalid_channel=None, invalid_by_position=True)
    cost = plane_sweep(*case, invalid_channel=None, invalid_by_position=True)
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=1e-9)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_equals_reference(dtype):
    case = make_case("cpu", dtype, (2, 50, 11, 8, 13))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    expected = plane_sweep_reference(*case, invalid_channel=46)
    cost = plane_sweep(*case, invalid_channel=46)
    assert_same_cost(cost, expected, case, tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [6, 72, 256, 300])
def test_cuda_equals_reference(dtype, channels):
    assert _library.built_with_cuda(), "the operators were built without CUDA kernels"
    case = make_case("cuda", dtype, (3, channels, 41, 7, 13))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    expected = plane_sweep_reference(*case, invalid_channel=channels - 4)
    if dtype == torch.float16:
        tolerance += half_rounding(case).double() / (1 + expected.double())
    cost = plane_sweep(*case, invalid_channel=channels - 4)
    assert_same_cost(cost, expected, case, tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(1, 6, 1, 1, 1), (2, 3, 33, 1, 5), (1, 40, 4, 6, 1), (2, 130, 37, 5, 9),
                                  (3, 264, 70, 7, 13), (2, 523, 41, 9, 4)])
@pytest.mark.parametrize("signed", [False, True])
def test_float16_on_cuda_at_odd_sizes(size, signed):
    case = make_case("cuda", torch.float16, size, signed)
    expected = plane_sweep_reference(*case, invalid_channel=None, invalid_by_position=True)
    cost = plane_sweep(*case, invalid_channel=None, invalid_by_position=True)
    assert cost.dtype == torch.float32
    assert ((cost - expected).abs() <= half_rounding(case) + 2e-5 * (1 + expected)).all()


@pytest.mark.cuda
def test_float16_on_cuda_is_not_biased_at_the_range_of_features():
    """Features after a ReLU, up to 5: roundings that all went one way would show in the mean."""
    current, reference, geometry, depths = make_case("cuda", torch.float16, (3, 256, 88, 16, 44))
    case = (current.mul(1.6).clamp(max=5), reference.mul(1.6).clamp(max=5), geometry, depths)
    expected = plane_sweep_reference(*case, invalid_channel=None)
    error = plane_sweep(*case, invalid_channel=None) - expected
    assert (error.abs() <= half_rounding(case) + 2e-5 * (1 + expected)).all()
    assert error.double().mean().abs() <= 2e-5 * expected.double().mean()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skipped", [1, 5, 34])
def test_a_cost_does_not_depend_on_the_depths_before_it(dtype, skipped):
    """What a kernel keeps from one depth to the next changes nothing."""
    current, reference, geometry, depths = make_case("cuda", dtype, (3, 72, 41, 7, 13))
    expected = plane_sweep(current, reference, geometry, depths, invalid_channel=2)
    found = plane_sweep(current, reference, geometry, depths[skipped:], invalid_channel=2)
    torch.testing.assert_close(found, expected[:, skipped:], rtol=1e-6, atol=1e-6)
    backwards = plane_sweep(current, reference, geometry, depths.flip(0), invalid_channel=2).flip(1)
    torch.testing.assert_close(backwards, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 72, 41, 7, 13), (2, 256, 88, 4, 9), (2, 6, 5, 3, 40), (1, 8, 900, 2, 3)])
@pytest.mark.parametrize("options", [{"invalid_channel": 2}, {"invalid_channel": None, "invalid_by_position": True}])
def test_probabilities_are_the_softmax_of_the_negated_costs(device, dtype, size, options):
    case = make_case(device, dtype, size)
    expected = (-plane_sweep(*case, **options)).softmax(1)
    found = plane_sweep_probability(*case, **options)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_maps_are_read_where_they_lie(dtype):
    current, reference, geometry, depths = make_case("cuda", dtype, (6, 64, 41, 7, 13))
    expected = plane_sweep(current, reference, geometry, depths, invalid_channel=60)
    rows = torch.cat([current, reference]).contiguous(memory_format=torch.channels_last)
    found = plane_sweep(rows[:6], rows[6:], geometry, depths, invalid_channel=60)
    assert torch.equal(found, expected)
    probability = plane_sweep_probability(rows[:6], rows[6:], geometry, depths, invalid_channel=60)
    assert probability.is_contiguous(memory_format=torch.channels_last)


def test_probabilities_refuse_what_costs_refuse():
    current, reference, geometry, depths = make_case()
    with pytest.raises(ValueError, match="invalid_channel must be None or one of the 7 channels"):
        plane_sweep_probability(current, reference, geometry, depths, invalid_channel=7)
    with pytest.raises(RuntimeError, match="plane_sweep has no gradient"):
        plane_sweep_probability(current.requires_grad_(), reference, geometry, depths, invalid_channel=None)


def test_strided_inputs(device):
    case = make_case(device)
    expected = plane_sweep(*case, invalid_channel=3)
    current, reference, geometry, depths = case
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1)
               for tensor in (current, reference, *geometry.tensors.values())]
    strided.append(depths.repeat_interleave(2)[::2])
    assert not any(tensor.is_contiguous() for tensor in strided)
    strided = (*strided[:2], SweepGeometry(*strided[2:-1], geometry.image_size), strided[-1])
    torch.testing.assert_close(plane_sweep(*strided, invalid_channel=3), expected, rtol=0, atol=0)
    flat = plane_sweep(case[0].contiguous(memory_format=torch.channels_last), *case[1:], invalid_channel=3)
    torch.testing.assert_close(flat, expected, rtol=0, atol=0)


def test_autocast_does_not_touch_the_geometry(device):
    case = make_case(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        cost = plane_sweep(*case, invalid_channel=3)
        reference = plane_sweep_reference(*case, invalid_channel=3)
    torch.testing.assert_close(cost, plane_sweep(*case, invalid_channel=3), rtol=0, atol=0)
    assert_same_cost(cost, reference, case, 2e-5)


@pytest.mark.parametrize("size", [(0, 7, 5, 4, 9), (2, 7, 0, 4, 9), (2, 7, 5, 0, 9), (2, 7, 5, 4, 0)])
def test_empty(device, size):
    current = torch.zeros(*size[:2], *size[3:], device=device)
    geometry = plain_cameras(device, (4, 9), size[0])
    cost = plane_sweep(current, current, geometry, torch.ones(size[2], device=device), invalid_channel=3)
    assert cost.shape == (size[0], *size[2:]) and cost.numel() == 0


def refused(error, message, changes=None, **options):
    case = dict(zip(["current", "reference", "geometry", "depths"], make_case(), strict=True))
    for name, change in (changes or {}).items():
        if name in case:
            case[name] = change(case[name])
        else:
            field = getattr(case["geometry"], name)
            case["geometry"] = case["geometry"]._replace(**{name: change(field)})
    with pytest.raises(error, match=message):
        plane_sweep(*case.values(), **{"invalid_channel": None, **options})


def test_refusals():
    refused(TypeError, "current must be one of .*float64.*got torch.int64", {"current": lambda t: t.long()})
    refused(ValueError, r"current must have shape \(N, C, H, W\), got \(7, 4, 9\)", {"current": lambda t: t[0]})
    refused(TypeError, "reference must have the dtype of current", {"reference": lambda t: t.float()})
    refused(ValueError, r"reference .* = \(2, 7, 4, 9\), got \(2, 7, 4, 8\)", {"reference": lambda t: t[..., 1:]})
    refused(ValueError, "reference must be on the device of current, cpu", {"reference": lambda t: t.to("meta")})
    refused(TypeError, "geometry must be a SweepGeometry, got tuple", {"geometry": tuple})
    refused(ValueError, r"geometry.intrinsics .*\(N, 3, 3\) = \(2, 3, 3\), got \(1,", {"intrinsics": lambda t: t[:1]})
    refused(TypeError, "geometry.older_from_pixel must be a tensor, got NoneType", {"older_from_pixel": lambda t: None})
    refused(ValueError, r"geometry.translation .* = \(2, 3\), got \(2, 2\)", {"translation": lambda t: t[:, :2]})
    refused(ValueError, r"geometry.augmentation .* = \(2, 2, 2\), got \(2, 2\)", {"augmentation": lambda t: t[0]})
    refused(TypeError, "geometry.offset must be one of .*got torch.float16", {"offset": lambda t: t.half()})
    refused(ValueError, "geometry.pixel_from_augmented must be on the device of current",
            {"pixel_from_augmented": lambda t: t.to("meta")})
    refused(ValueError, r"image_size must be \(H_img, W_img\), at least 2 each, got \(1, 39\)",
            {"image_size": lambda size: (1, size[1])})
    refused(ValueError, r"image_size must be .* got \(17, 39, 3\)", {"image_size": lambda size: (*size, 3)})
    refused(TypeError, "image_size must hold integers, got 17.5", {"image_size": lambda size: (17.5, size[1])})
    refused(ValueError, r"depths must have shape \(D\), got \(1, 5\)", {"depths": lambda t: t[None]})
    refused(ValueError, "depths must be on the device of current", {"depths": lambda t: t.to("meta")})
    refused(ValueError, r"one of the 7 channels \(0 to 6\), got 7", invalid_channel=7)
    refused(ValueError, r"one of the 7 channels \(0 to 6\), got -1", invalid_channel=-1)
    refused(ValueError, "invalid_by_position=True needs invalid_channel=None", invalid_channel=3,
            invalid_by_position=True)


def test_a_gradient_is_refused_not_dropped():
    current, *others = make_case()
    current.requires_grad_()
    with pytest.raises(RuntimeError, match="plane_sweep has no gradient"):
        plane_sweep(current, *others, invalid_channel=None)
    with torch.no_grad():
        assert not plane_sweep(current, *others, invalid_channel=None).requires_grad


def flat(case):
    """The arguments as the dispatcher takes them."""
    current, reference, geometry, depths = case
    return current, reference, *geometry.tensors.values(), list(geometry.image_size), depths


@compiled
def test_the_compiled_operator_checks_what_keeps_it_in_memory():
    case = make_case()
    for arguments in [(7, False), (-1, False), (3, True)]:
        with pytest.raises(RuntimeError, match="plane_sweep: invalid_"):
            torch.ops.mmdet3d.plane_sweep(*flat(case), *arguments, 5.0, 1e-3)
    for name, tensor in case[2].tensors.items():
        changed = (*case[:2], case[2]._replace(**{name: tensor[:1]}), case[3])
        with pytest.raises(RuntimeError, match=f"plane_sweep: {name} must be"):
            torch.ops.mmdet3d.plane_sweep(*flat(changed), None, False, 5.0, 1e-3)
    changed = (*case[:2], case[2]._replace(image_size=(1, 9)), case[3])
    with pytest.raises(RuntimeError, match="image_size must be two lengths of at least 2"):
        torch.ops.mmdet3d.plane_sweep(*flat(changed), None, False, 5.0, 1e-3)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_registration(device, dtype):
    arguments = (*flat(make_case(device, dtype)), 3, False, 5.0, 1e-3)
    torch.library.opcheck(torch.ops.mmdet3d.plane_sweep.default, arguments,
                          test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_traces_through(device):
    case = make_case(device)
    traced = torch.compile(lambda *inputs: plane_sweep(*inputs, invalid_channel=3).softmax(dim=1),
                           backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(*case), plane_sweep(*case, invalid_channel=3).softmax(dim=1))


def bench_cases(device, dtype):
    """(name, fast, reference) at the size of the model: six cameras, stride 4, 88 depths."""
    case = make_case(device, dtype, REAL_SIZE)
    options = {"invalid_channel": REAL_SIZE[1] - 4}
    cameras, channels, depths, height, width = REAL_SIZE
    points = cameras * depths * height * width
    # For each channel of a point, four products are added and a magnitude.
    work = {"bytes": case[0].nbytes + case[1].nbytes + 4 * points, "flops": 9 * channels * points}
    return [
        ("plane_sweep", lambda: plane_sweep(*case, **options), lambda: plane_sweep_reference(*case, **options), work),
        ("plane_sweep_probability", lambda: plane_sweep_probability(*case, **options),
         lambda: plane_sweep_reference(*case, **options).neg_().softmax(1), work),
    ]
