"""plane_sweep against explicit loops, against its reference, and against what the contract says about edge cases."""

import itertools
import math

import pytest
import torch

from mmdet3d.ops import _library
from mmdet3d.ops.plane_sweep import plane_sweep, plane_sweep_reference

CASE_SIZE = (2, 7, 5, 4, 9)  # N, C, D, H, W
REAL_SIZE = (6, 256, 88, 64, 176)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

compiled = pytest.mark.skipif(
    not (_library.AVAILABLE and hasattr(torch.ops.mmdet3d, "plane_sweep")),
    reason="plane_sweep is not compiled",
)


def camera_pair(height, width, yaw, step):
    """Homography and epipole of a pinhole camera that drove ``step`` (3,) metres and turned by ``yaw`` radians."""
    focal = 0.8 * width
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    cos, sin = math.cos(yaw), math.sin(yaw)
    rotation = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float64)
    return intrinsics @ rotation @ intrinsics.inverse(), intrinsics @ torch.tensor(step, dtype=torch.float64)


def make_case(device="cpu", dtype=torch.float64, size=CASE_SIZE, signed=False):
    """Inputs with positions inside, at the border, outside and behind; a third of the features are exactly 0."""
    cameras, channels, num_depths, height, width = size
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, cameras, channels, height, width, generator=generator)
    current, reference = maps.mul(4).round().div(4) if signed else maps.add(0.4).relu()
    steps = [(0.3, 0.1, 1.5), (0.9, -0.1, -1.2), (-0.7, 0.05, 0.4), (0.4, 0.1, -0.6), (1.3, 0.2, 0.1), (-1.1, 0.0, 0.8)]
    pairs = [camera_pair(height, width, 0.05 * n - 0.1, steps[n % len(steps)]) for n in range(cameras)]
    homography, epipole = (torch.stack(part) for part in zip(*pairs, strict=True))
    depths = torch.linspace(1.0, 1.0 + (num_depths - 1) * 0.5, num_depths, dtype=torch.float64)
    features = (current.to(device, dtype), reference.to(device, dtype))
    return *features, homography.to(device), epipole.to(device), depths.to(device)


def expected_by_loops(current, reference, homography, epipole, depths, *, invalid_channel, by_position=False):
    """The contract, one position at a time."""
    cameras, _, height, width = current.shape
    cost = torch.zeros(cameras, len(depths), height, width, dtype=torch.float64)
    seen = {"inside": 0, "border": 0, "outside": 0, "behind": 0}
    for n, d, y, x in itertools.product(*map(range, cost.shape)):
        point = depths[d] * (homography[n] @ torch.tensor([x, y, 1.0], dtype=torch.float64)) + epipole[n]
        warped, taps = torch.zeros(current.shape[1], dtype=torch.float64), 0
        if point[2] >= 1e-3:
            px, py = (point[:2] / point[2]).tolist()
            for row, column in itertools.product(range(height), range(width)):
                weight = max(0.0, 1 - abs(px - column)) * max(0.0, 1 - abs(py - row))
                warped += weight * reference[n, :, row, column].double()
                taps += weight > 0
        kind = "behind" if point[2] < 1e-3 else {0: "outside", 4: "inside"}.get(taps, "border")
        seen[kind] += 1
        cost[n, d, y, x] = (current[n, :, y, x].double() - warped).abs().sum()
        if taps == 0 if by_position else (invalid_channel is not None and warped[invalid_channel] == 0):
            cost[n, d, y, x] += 5.0
    return cost, seen


def identity(device, dtype=torch.float64, size=CASE_SIZE):
    """``make_case`` with a camera that did not move."""
    current, reference, homography, epipole, depths = make_case(device, dtype, size)
    return current, reference, torch.eye(3, device=device).expand_as(homography), torch.zeros_like(epipole), depths


@pytest.mark.parametrize("function", [plane_sweep, plane_sweep_reference])
@pytest.mark.parametrize("invalid_channel, by_position", [(None, False), (3, False), (None, True)])
def test_equals_loops(device, function, invalid_channel, by_position):
    case = make_case("cpu")
    expected, seen = expected_by_loops(*case, invalid_channel=invalid_channel, by_position=by_position)
    assert min(seen.values()) > 5, f"the case does not cover every kind of position: {seen}"
    on_device = [tensor.to(device) for tensor in case]
    cost = function(*on_device, invalid_channel=invalid_channel, invalid_by_position=by_position)
    assert cost.dtype == torch.float64 and cost.device.type == device
    torch.testing.assert_close(cost.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_camera_at_rest_compares_the_maps_as_they_are(device, dtype):
    case = identity(device, dtype)
    cost = plane_sweep(*case, invalid_channel=None)
    difference = (case[0].to(cost.dtype) - case[1].to(cost.dtype)).abs().sum(dim=1)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(cost, difference[:, None].expand_as(cost), rtol=1e-6, atol=1e-6)


def test_zero_in_the_invalid_channel_adds_the_penalty(device):
    current, reference, homography, epipole, depths = identity(device)
    homography = homography + homography.new_tensor([[0, 0, 0.25], [0, 0, 0.5], [0, 0, 0]])  # between four pixels
    inputs = (current, reference, homography, epipole, depths)
    plain = plane_sweep(*inputs, invalid_channel=None)
    cost = plane_sweep(*inputs, invalid_channel=4, invalid_penalty=2.5)
    shown = torch.nn.functional.pad(reference[:, 4] > 0, (0, 1, 0, 1))  # (N, H + 1, W + 1)
    is_zero = ~(shown[:, :-1, :-1] | shown[:, 1:, :-1] | shown[:, :-1, 1:] | shown[:, 1:, 1:])
    assert is_zero.any() and not is_zero.all()
    torch.testing.assert_close(cost - plain, 2.5 * is_zero[:, None].expand_as(cost).double())


@pytest.mark.parametrize("point", [(3.0, 2.0, -4.0), (3.0, 2.0, 9e-4), (9.0, 0.0, 1.0), (0.0, -1.0, 1.0),
                                   (math.nan, 1.0, 1.0), (math.inf, 1.0, 1.0), (1.0, 1.0, math.nan),
                                   (1e300, -1e300, 1.0)])
@pytest.mark.parametrize("by_position", [False, True])
def test_behind_outside_or_not_finite_is_read_as_zero(device, point, by_position):
    current, reference, homography, epipole, depths = make_case(device)
    epipole[:] = torch.tensor(point, dtype=epipole.dtype, device=device)
    inputs = (current, reference, torch.zeros_like(homography), epipole, depths)
    for function in (plane_sweep, plane_sweep_reference):
        cost = function(*inputs, invalid_channel=None, invalid_by_position=by_position)
        expected = current.abs().sum(dim=1)[:, None].expand_as(cost) + (5.0 if by_position else 0.0)
        torch.testing.assert_close(cost, expected)


def test_the_last_pixel_still_counts_in_part(device):
    current, reference, homography, epipole, depths = make_case(device)
    epipole[:] = torch.tensor([8.75, -0.5, 1.0], dtype=epipole.dtype, device=device)  # width 9, height 4
    cost = plane_sweep(current, reference, torch.zeros_like(homography), epipole, depths, invalid_channel=None)
    warped = 0.25 * 0.5 * reference[:, :, :1, 8:]
    torch.testing.assert_close(cost, (current - warped).abs().sum(dim=1)[:, None].expand_as(cost))


def test_min_depth_is_in_metres_and_tested_first(device):
    case = identity(device)
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
    expected = plane_sweep_reference(*(tensor.double() for tensor in case), invalid_channel=46)
    cost = plane_sweep(*case, invalid_channel=46)
    torch.testing.assert_close(cost.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [6, 72, 256, 300])
def test_cuda_equals_reference(dtype, channels):
    assert _library.built_with_cuda(), "the operators were built without CUDA kernels"
    case = make_case("cuda", dtype, (3, channels, 41, 7, 13))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    expected = plane_sweep_reference(*(tensor.double() for tensor in case), invalid_channel=channels - 4)
    cost = plane_sweep(*case, invalid_channel=channels - 4)
    torch.testing.assert_close(cost.double(), expected, rtol=tolerance, atol=tolerance)


def test_strided_inputs(device):
    case = make_case(device)
    expected = plane_sweep(*case, invalid_channel=3)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in case[:4]]
    strided.append(case[4].repeat_interleave(2)[::2])
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(plane_sweep(*strided, invalid_channel=3), expected, rtol=0, atol=0)
    flat = plane_sweep(case[0].contiguous(memory_format=torch.channels_last), *case[1:], invalid_channel=3)
    torch.testing.assert_close(flat, expected, rtol=0, atol=0)


def test_autocast_does_not_touch_the_geometry(device):
    case = make_case(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        cost = plane_sweep(*case, invalid_channel=3)
        reference = plane_sweep_reference(*case, invalid_channel=3)
    torch.testing.assert_close(cost, plane_sweep(*case, invalid_channel=3), rtol=0, atol=0)
    torch.testing.assert_close(reference, cost, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [(0, 7, 5, 4, 9), (2, 7, 0, 4, 9), (2, 7, 5, 0, 9), (2, 7, 5, 4, 0)])
def test_empty(device, size):
    current = torch.zeros(*size[:2], *size[3:], device=device)
    geometry = (torch.zeros(size[0], 3, 3, device=device), torch.zeros(size[0], 3, device=device))
    cost = plane_sweep(current, current, *geometry, torch.ones(size[2], device=device), invalid_channel=3)
    assert cost.shape == (size[0], *size[2:]) and cost.numel() == 0


def refused(error, message, changes=None, **options):
    case = dict(zip(["current", "reference", "homography", "epipole", "depths"], make_case(), strict=True))
    for name, change in (changes or {}).items():
        case[name] = change(case[name])
    with pytest.raises(error, match=message):
        plane_sweep(*case.values(), **{"invalid_channel": None, **options})


def test_refusals():
    refused(TypeError, "current must be one of .*float64.*got torch.int64", {"current": lambda t: t.long()})
    refused(ValueError, r"current must have shape \(N, C, H, W\), got \(7, 4, 9\)", {"current": lambda t: t[0]})
    refused(TypeError, "reference must have the dtype of current", {"reference": lambda t: t.float()})
    refused(ValueError, r"reference .* = \(2, 7, 4, 9\), got \(2, 7, 4, 8\)", {"reference": lambda t: t[..., 1:]})
    refused(ValueError, "reference must be on the device of current, cpu", {"reference": lambda t: t.to("meta")})
    refused(ValueError, r"infinite_homography .* = \(2, 3, 3\), got \(1,", {"homography": lambda t: t[:1]})
    refused(TypeError, "infinite_homography must be a tensor, got list", {"homography": lambda t: t.tolist()})
    refused(ValueError, r"epipole .* = \(2, 3\), got \(2, 2\)", {"epipole": lambda t: t[:, :2]})
    refused(TypeError, "epipole must be one of .*got torch.float16", {"epipole": lambda t: t.half()})
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


@compiled
def test_the_compiled_operator_checks_what_keeps_it_in_memory():
    case = make_case()
    for arguments in [(7, False), (-1, False), (3, True)]:
        with pytest.raises(RuntimeError, match="plane_sweep: invalid_"):
            torch.ops.mmdet3d.plane_sweep(*case, *arguments, 5.0, 1e-3)
    with pytest.raises(RuntimeError, match="infinite_homography must be"):
        torch.ops.mmdet3d.plane_sweep(*case[:2], case[2][:1], *case[3:], None, False, 5.0, 1e-3)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_registration(device, dtype):
    arguments = (*make_case(device, dtype), 3, False, 5.0, 1e-3)
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
    return [("plane_sweep", lambda: plane_sweep(*case, **options), lambda: plane_sweep_reference(*case, **options))]
