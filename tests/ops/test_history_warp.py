"""history_warp against explicit loops, grid_sample and its reference, and where it must refuse."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.ops import _library
from mmdet3d.ops.history_warp import history_warp, history_warp_reference, trilinear_taps

SIZE, SLOTS, CHANNELS, BATCH = (3, 5, 9), 4, 8, 2  # SIZE is (Z, Y, X)
VOXELS = 135
REAL = {"size": (8, 100, 100), "slots": 16, "channels": 96, "batch": 1}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

compiled = pytest.mark.skipif(not (_library.AVAILABLE and hasattr(torch.ops.mmdet3d, "history_warp")),
                              reason="history_warp is not compiled")


def pose(shift, yaw=0.0, pitch=0.0, centre=(4, 2, 1)):
    """[4, 4] float64: turned about ``centre``, then moved, in voxels."""
    turn, tilt, there = (torch.eye(4, dtype=torch.float64) for _ in range(3))
    turn[:2, :2] = torch.tensor([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    tilt[0, 0] = tilt[2, 2] = math.cos(pitch)
    tilt[0, 2], tilt[2, 0] = math.sin(pitch), -math.sin(pitch)
    there[:3, 3] = torch.tensor(centre)
    matrix = there @ turn @ tilt @ torch.linalg.inv(there)
    matrix[:3, 3] += torch.tensor(shift, dtype=torch.float64)
    return matrix


def make_case(device="cpu", dtype=torch.float32, size=SIZE, slots=SLOTS, channels=CHANNELS, batch=BATCH):
    """History and matrices: another motion for each sample, part of it out of the volume."""
    generator = torch.Generator().manual_seed(0)
    voxels = size[0] * size[1] * size[2]
    history = torch.randn(batch, voxels, slots, channels, generator=generator)
    centre = [(length - 1) / 2 for length in size[::-1]]
    poses = [pose((0.7, -1.3, 0.2), 0.1, 0.02, centre), pose((-2.4, 0.6, -0.7), -2.2, -0.1, centre)]
    matrix = torch.stack([poses[b % 2] for b in range(batch)]) if batch else torch.zeros(0, 4, 4)
    return history.to(device, dtype), matrix.float().to(device), size


def some_voxels(device="cpu", count=11, batch=BATCH, voxels=VOXELS):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(voxels, generator=generator)[:count] for _ in range(batch)]).to(device)


def expected_by_loops(history, matrix, size):
    """All slots warped in float64, one voxel and one tap at a time; how many taps were inside."""
    Z, Y, X = size
    warped, inside = torch.zeros_like(history, dtype=torch.float64), {}
    for b, (z, y, x) in itertools.product(range(len(history)), itertools.product(range(Z), range(Y), range(X))):
        at = (matrix[b].double() @ torch.tensor([x, y, z, 1.0], dtype=torch.float64))[:3].tolist()
        taps = 0
        for k, j, i in itertools.product(range(Z), range(Y), range(X)):
            weight = math.prod(max(0.0, 1 - abs(a - n)) for a, n in zip(at, (i, j, k), strict=True))
            taps += weight > 0
            warped[b, (z * Y + y) * X + x] += weight * history[b, (k * Y + j) * X + i].double()
        inside[taps] = inside.get(taps, 0) + 1
    return warped, inside


@pytest.mark.parametrize("function", [history_warp, history_warp_reference])
def test_equals_loops(device, function):
    history, matrix, size = make_case()
    expected, inside = expected_by_loops(history, matrix, size)
    assert {0, 4, 8} <= inside.keys() and inside[8] > 20, f"the case does not cover the borders: {inside}"
    voxels = some_voxels()
    new, oldest = function(history.to(device), matrix.to(device), size, oldest_at=voxels.to(device))
    assert new.shape == history.shape and oldest.shape == (BATCH, 11, CHANNELS)
    torch.testing.assert_close(new[:, :, 1:].cpu().double(), expected[:, :, :-1], rtol=1e-5, atol=1e-5)
    for b in range(BATCH):
        torch.testing.assert_close(oldest[b].cpu().double(), expected[b, voxels[b], -1], rtol=1e-5, atol=1e-5)


def test_equals_grid_sample(device):
    history, matrix, (Z, Y, X) = make_case(device, torch.float64)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (Z, Y, X)), indexing="ij")
    source = torch.stack([x, y, z, torch.ones_like(x)], -1) @ matrix.cpu().double()[:, None, None].mT
    grid = source[..., :3] / torch.tensor([X - 1, Y - 1, Z - 1]) * 2 - 1
    volume = history.flatten(2).transpose(1, 2).unflatten(2, (Z, Y, X))
    expected = F.grid_sample(volume, grid.to(device), padding_mode="zeros", align_corners=True)
    expected = expected.flatten(2).transpose(1, 2).unflatten(2, (SLOTS, CHANNELS))
    new, _ = history_warp(history, matrix, (Z, Y, X))
    torch.testing.assert_close(new[:, :, 1:], expected[:, :, :-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, slots, channels", [(SIZE, 4, 8), ((2, 7, 6), 2, 96), ((5, 4, 3), 7, 5),
                                                   ((1, 1, 1), 1, 3), ((4, 9, 8), 3, 260)])
def test_equals_reference(device, dtype, size, slots, channels):
    history, matrix, size = make_case(device, dtype, size, slots, channels)
    voxels = some_voxels(device, 1 + history.shape[1] // 3, voxels=history.shape[1])
    expected, expected_oldest = history_warp_reference(history, matrix, size, oldest_at=voxels)
    new, oldest = history_warp(history, matrix, size, oldest_at=voxels)
    assert new.dtype == oldest.dtype == dtype
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(new[:, :, 1:], expected[:, :, 1:], **tolerance)
    torch.testing.assert_close(oldest, expected_oldest, **tolerance)


@pytest.mark.cuda
def test_cuda_equals_cpu_at_the_size_of_the_model():
    history, matrix, size = make_case(**{**REAL, "slots": 7})
    voxels = some_voxels(count=12000, batch=1, voxels=history.shape[1])
    expected, expected_oldest = history_warp(history, matrix, size, oldest_at=voxels)
    new, oldest = history_warp(history.cuda(), matrix.cuda(), size, oldest_at=voxels.cuda())
    torch.testing.assert_close(new[:, :, 1:].cpu(), expected[:, :, 1:], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(oldest.cpu(), expected_oldest, rtol=2e-6, atol=2e-6)


def test_a_vehicle_at_rest_moves_slots_exactly(device):
    history, _, size = make_case(device)
    history[:, :, 1, 2] = math.inf  # times a weight of 0 would not be a number
    new, oldest = history_warp(history, torch.eye(4, device=device).repeat(BATCH, 1, 1), size,
                               oldest_at=torch.arange(VOXELS, device=device).repeat(BATCH, 1))
    assert torch.equal(new[:, :, 1:], history[:, :, :-1]) and torch.equal(oldest, history[:, :, -1])


def test_the_last_row_of_the_matrix_is_not_read(device):
    history, matrix, size = make_case(device)
    expected, _ = history_warp(history, matrix, size)
    matrix[:, 3] = math.nan
    assert torch.equal(history_warp(history, matrix, size)[0][:, :, 1:], expected[:, :, 1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2e9, 1e5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_position_far_away_or_not_finite_is_zero(device, value, axis):
    history, matrix, size = make_case(device)
    matrix[0, axis, 3] = value
    expected, _ = history_warp(history[1:], matrix[1:], size)
    for function in (history_warp, history_warp_reference):
        new, oldest = function(history, matrix, size, oldest_at=some_voxels(device))
        assert not new[0, :, 1:].any() and not oldest[0].any()
        torch.testing.assert_close(new[1, :, 1:], expected[0, :, 1:])


@compiled
def test_an_index_that_is_no_voxel_gives_zeros(device):
    history, matrix, size = make_case(device)
    voxels = torch.tensor([[-1, 67, VOXELS], [2**40, -(2**40), 67]], device=device)
    _, oldest = history_warp(history, matrix, size, oldest_at=voxels)
    assert not oldest[0, ::2].any() and not oldest[1, :2].any() and oldest[0, 1].any()


def test_one_volume_stands_for_equal_slots(device):
    history, matrix, size = make_case(device)
    one = history[:, :, :1].clone()
    expected, expected_oldest = history_warp(one.repeat(1, 1, SLOTS, 1), matrix, size, oldest_at=some_voxels(device))
    new, oldest = history_warp(one.expand(-1, -1, SLOTS, -1), matrix, size, oldest_at=some_voxels(device))
    assert torch.equal(new[:, :, 1:], expected[:, :, 1:]) and torch.equal(oldest, expected_oldest)


def test_strides_and_a_buffer_of_the_caller(device):
    history, matrix, size = make_case(device)
    expected, expected_oldest = history_warp(history, matrix, size, oldest_at=some_voxels(device))
    strided = history.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    voxels = some_voxels(device).T.contiguous().T
    matrices = matrix.mT.contiguous().mT
    wide = torch.full((BATCH, VOXELS, SLOTS + 1, CHANNELS + 3), 7.0, device=device)
    out = wide[:, :, 1:, 1 : CHANNELS + 1]
    assert not any(t.is_contiguous() for t in (strided, voxels, matrices, out))
    new, oldest = history_warp(strided, matrices, size, oldest_at=voxels, out=out)
    assert new is out and torch.equal(oldest, expected_oldest)
    assert torch.equal(out[:, :, 1:], expected[:, :, 1:])
    wide[:, :, 2:, 1 : CHANNELS + 1] = 7
    assert (wide == 7).all(), "something was written outside of slots 1 to T - 1"


def test_a_sample_of_a_batch_by_itself(device):
    history, matrix, size = make_case(device)
    expected, _ = history_warp(history, matrix, size)
    out = torch.zeros_like(history)
    for b in range(BATCH):
        history_warp(history[b : b + 1], matrix[b : b + 1], size, out=out[b : b + 1])
    assert torch.equal(out[:, :, 1:], expected[:, :, 1:])


@pytest.mark.parametrize("batch, size, channels, count", [(0, SIZE, 3, 2), (2, (0, 5, 9), 3, 0), (2, SIZE, 0, 4),
                                                          (2, SIZE, 3, 0)])
def test_empty(device, batch, size, channels, count):
    history, matrix, size = make_case(device, size=size, channels=channels, batch=batch)
    for function in (history_warp, history_warp_reference):
        voxels = torch.zeros(batch, count, dtype=torch.int64, device=device)
        new, oldest = function(history, matrix, size, oldest_at=voxels)
        assert new.shape == history.shape and oldest.shape == (batch, count, channels)
        assert function(history, matrix, size)[1] is None


def test_autocast_does_not_touch_it(device):
    history, matrix, size = make_case(device)
    expected = history_warp(history, matrix, size)[0][:, :, 1:]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(history_warp(history, matrix, size)[0][:, :, 1:], expected)
        index, weight = trilinear_taps(matrix[0], size)
    assert weight.dtype == torch.float32 and index.dtype == torch.int64


@pytest.mark.parametrize("changes, error, message", [
    ({"history": lambda t: t.int()}, TypeError, "history must be one of torch.float32, .* got torch.int32"),
    ({"history": lambda t: t[0]}, ValueError, r"history must have shape \(B, V, T, C\), got \(135, 4, 8\)"),
    ({"history": lambda t: t[:, :, :0]}, ValueError, "history must have at least one slot"),
    ({"size_zyx": (3, 5, 8)}, ValueError, r"size_zyx must be \(Z, Y, X\) with Z \* Y \* X = 135 voxels, got \(3, 5, 8"),
    ({"size_zyx": (15, 9)}, ValueError, r"= 135 voxels, got \(15, 9\)"),
    ({"size_zyx": (3, 5, 9.0)}, TypeError, "size_zyx must hold integers, got 9.0"),
    ({"matrix": lambda t: t[:, :3]}, ValueError, r"matrix must have shape \(B, 4, 4\) = \(2, 4, 4\), got \(2, 3, 4\)"),
    ({"matrix": lambda t: t.half()}, TypeError, "matrix must be one of .*float32, .*float64, got torch.float16"),
    ({"matrix": lambda t: t.to("meta")}, ValueError, "matrix must be on the device of history, cpu, got meta"),
    ({"oldest_at": torch.zeros(2, 3)}, TypeError, "oldest_at must be one of torch.int64, got torch.float32"),
    ({"oldest_at": torch.zeros(3, 3).long()}, ValueError, r"oldest_at must have shape \(B, K\) = \(2, 3\), got \(3, 3"),
    ({"out": torch.zeros(2, 135, 4, 7)}, ValueError, r"out must have shape \(B, V, T, C\) = \(2, 135, 4, 8\)"),
    ({"out": torch.zeros(2, 135, 4, 8).half()}, TypeError, "out must be one of torch.float32, got torch.float16"),
    ({"out": torch.zeros(2, 135, 8, 4).mT}, ValueError, "out must have a voxel's channels together"),
])
def test_refusals(changes, error, message):
    history, matrix, size = make_case()
    arguments = {"history": history, "matrix": matrix, "size_zyx": size}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        history_warp(**arguments)


def test_a_buffer_in_the_memory_of_the_history_is_refused():
    history, matrix, size = make_case()
    with pytest.raises(ValueError, match="out must not share memory with history"):
        history_warp(history, matrix, size, out=history)


def test_a_gradient_is_refused_not_dropped():
    history, matrix, size = make_case()
    history.requires_grad_()
    with pytest.raises(RuntimeError, match="history_warp has no gradient"):
        history_warp(history, matrix, size)
    with torch.no_grad():
        assert not history_warp(history, matrix, size)[0].requires_grad


def flat_case(device="cpu", dtype=torch.float32):
    """The arguments as the dispatcher takes them."""
    history, matrix, size = make_case(device, dtype)
    voxels = some_voxels(device)
    return [history, matrix, size, voxels, torch.zeros_like(history), history.new_zeros(BATCH, 11, CHANNELS)]


@compiled
@pytest.mark.parametrize("place, change", [
    (0, lambda t: t[0]), (1, lambda t: t[:1]), (2, lambda size: (3, 5, 10)), (3, lambda t: t.int()),
    (3, lambda t: t[:1]), (4, lambda t: t[:, 1:]), (4, lambda t: t.double()), (5, lambda t: t[:, 1:]),
    (5, lambda t: t.mT.contiguous().mT)])
def test_the_compiled_operator_checks_what_keeps_it_in_memory(place, change):
    arguments = flat_case()
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match="history_warp: "):
        torch.ops.mmdet3d.history_warp(*arguments)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_registration(device, dtype):
    torch.library.opcheck(torch.ops.mmdet3d.history_warp.default, tuple(flat_case(device, dtype)),
                          test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_traces_through(device):
    history, matrix, size = make_case(device)
    voxels = some_voxels(device)

    def both(history, matrix):
        new, oldest = history_warp(history, matrix, size, oldest_at=voxels)
        return new[:, :, 1:].tanh(), oldest.tanh()

    traced = torch.compile(both, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(traced(history, matrix), both(history, matrix), strict=True):
        torch.testing.assert_close(mine, expected)


def bench_cases(device, dtype):
    """(name, fast, reference) at the finest stage of the model; the reference is one embedding bag and a copy."""
    history, matrix, size = make_case(device, dtype, **REAL)
    voxels = some_voxels(device, 12000, 1, history.shape[1])
    rows, out = history[0].flatten(1), torch.empty_like(history)

    def bag():
        index, weight = trilinear_taps(matrix[0], size)
        warped = F.embedding_bag(index, rows, per_sample_weights=weight.to(rows.dtype), mode="sum")
        out[0, :, 1:] = warped[:, : -REAL["channels"]].unflatten(1, (-1, REAL["channels"]))
        return warped[voxels[0], -REAL["channels"] :]

    slots, row = history.shape[2], history.shape[3] * history.element_size()
    work = {"bytes": 2 * (history.nbytes * (slots - 1) // slots + voxels.shape[1] * row)}
    return [("history_warp", lambda: history_warp(history, matrix, size, oldest_at=voxels, out=out), bag, work)]
