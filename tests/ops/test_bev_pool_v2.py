"""bev_pool_v2: loop, gradients, compiled against reference, refusals, registration."""

import itertools

import numpy as np
import pytest
import torch
from compiled_library import needs_library

from mmdet3d.ops import PoolOrder, bev_pool_v2, bev_pool_v2_reference, bev_pool_v2_stacked, sort_by_cell

GRID = (2, 3, 4)  # (Z, Y, X)


def make_case(device="cpu", dtype=torch.float64, *, sizes=(2, 3, 5, 2, 7, 6), grid=GRID, seed=0, outside=0.3):
    """depth, context, cell_index; sizes = (B, N, D, H, W, C); a share of the points lies outside the grid."""
    B, N, D, H, W, C = sizes
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(B, N, D, H, W, generator=generator, dtype=torch.float64)
    context = torch.randn(B, N, H, W, C, generator=generator, dtype=torch.float64)
    cells = torch.randint(grid[0] * grid[1] * grid[2], (B, N, D, H, W), generator=generator)
    cells[torch.rand(cells.shape, generator=generator) < outside] = -1
    return depth.to(device, dtype), context.to(device, dtype), cells.to(device)


def make_rig_case(device, dtype, *, sizes=(1, 6, 88, 16, 44, 80), grid=(8, 100, 100)):
    """Frusta of a ring of cameras in an 80 m x 80 m x 6.4 m grid: few voxels near the cameras hold most points."""
    B, N, D, H, W, _ = sizes
    Z, Y, X = grid
    depth, context, _ = make_case(device, dtype, sizes=sizes, grid=grid)
    distance = torch.linspace(1, 45, D).view(D, 1, 1)
    right = torch.linspace(-0.63, 0.63, W).view(1, 1, W) * distance
    up = torch.linspace(0.1, -0.35, H).view(1, H, 1) * distance
    cells = torch.empty(B, N, D, H, W, dtype=torch.int64)
    for n in range(N):
        yaw = torch.tensor(2 * torch.pi * n / N)
        x = (distance * yaw.cos() - right * yaw.sin() + 40) * X / 80
        y = (distance * yaw.sin() + right * yaw.cos() + 40) * Y / 80
        z = ((up + 2.6) * Z / 6.4).expand(D, H, W)
        x, y = x.expand(D, H, W), y.expand(D, H, W)
        inside = (x >= 0) & (x < X) & (y >= 0) & (y < Y) & (z >= 0) & (z < Z)
        cells[:, n] = torch.where(inside, (z.long() * Y + y.long()) * X + x.long(), -1)
    return depth, context, cells.to(device)


def bench_cases(device, dtype):
    """(name, compiled, reference) callables at the size of the released model."""
    grid = (8, 100, 100)
    depth, context, cells = make_rig_case(device, dtype)
    order = sort_by_cell(cells, grid)
    two = make_rig_case(device, dtype, sizes=(2, 6, 88, 16, 44, 80))
    leaves = [depth.clone().requires_grad_(), context.clone().requires_grad_()]
    grad = torch.randn(1, 80, *grid, device=device, dtype=dtype)

    def backward(volume):
        return lambda: torch.autograd.grad(volume, leaves, grad, retain_graph=True)

    inputs = depth.nbytes + context.nbytes
    sorting, ordered = inputs + cells.nbytes + grad.nbytes, inputs + sum(t.nbytes for t in order) + grad.nbytes
    return [
        (
            "bev_pool_v2 forward, sorting included",
            lambda: bev_pool_v2(depth, context, cells, grid),
            lambda: bev_pool_v2_reference(depth, context, cells, grid),
            {"bytes": sorting},
        ),
        (
            "bev_pool_v2 forward, order given",
            lambda: bev_pool_v2(depth, context, cells, grid, order=order),
            lambda: bev_pool_v2_reference(depth, context, cells, grid),
            {"bytes": ordered},
        ),
        (
            "bev_pool_v2_stacked, sorting included",
            lambda: bev_pool_v2_stacked(*two, grid, 2),
            lambda: bev_pool_v2_reference(*two, grid).flatten(0, 1)[None],
            {"bytes": 2 * sorting},
        ),
        (
            "bev_pool_v2 backward",
            backward(bev_pool_v2(*leaves, cells, grid, order=order)),
            backward(bev_pool_v2_reference(*leaves, cells, grid)),
            {"bytes": 2 * inputs + cells.nbytes + grad.nbytes},
        ),
    ]


def loop(depth, context, cells, grid=GRID):
    Z, Y, X = grid
    volume = torch.zeros(depth.shape[0], context.shape[-1], Z, Y, X, dtype=torch.float64)
    for b, n, d, h, w in itertools.product(*map(range, depth.shape)):
        cell = int(cells[b, n, d, h, w])
        if 0 <= cell < Z * Y * X:
            z, y, x = cell // (Y * X), cell // X % Y, cell % X
            volume[b, :, z, y, x] += depth[b, n, d, h, w].double().cpu() * context[b, n, h, w].double().cpu()
    return volume


def run_with_gradients(function, depth, context, cells, grid, grad):
    depth, context = depth.clone().requires_grad_(), context.clone().requires_grad_()
    volume = function(depth, context, cells, grid)
    return (volume.detach(), *torch.autograd.grad(volume, (depth, context), grad.to(volume)))


def assert_near(actual, expected, tolerance):
    """Equal to within ``tolerance`` times the largest expected magnitude."""
    error = (actual.double().cpu() - expected.double().cpu()).abs().max()
    assert error <= tolerance * expected.abs().max().clamp(min=1), f"largest error {error}"


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("function", [bev_pool_v2, bev_pool_v2_reference])
def test_forward_equals_a_loop(device, function, index_dtype):
    depth, context, cells = make_case(device)
    volume = function(depth, context, cells.to(index_dtype), GRID)
    assert volume.shape == (2, 6, *GRID) and volume.is_contiguous()
    torch.testing.assert_close(volume.cpu(), loop(depth, context, cells))


def test_closed_form(device):
    depth = torch.tensor([0.25, 0.5], device=device).view(1, 1, 2, 1, 1)
    context = torch.tensor([3.0, 8.0], device=device).view(1, 1, 1, 1, 2)
    x_1_y_2_z_1 = (1 * 3 + 2) * 4 + 1
    cells = torch.full((1, 1, 2, 1, 1), x_1_y_2_z_1, device=device)
    volume = bev_pool_v2(depth, context, cells, GRID)
    assert volume[0, :, 1, 2, 1].tolist() == [2.25, 6.0]
    volume[0, :, 1, 2, 1] = 0
    assert torch.count_nonzero(volume) == 0


def test_points_of_other_samples_do_not_mix(device):
    depth, context, cells = make_case(device)
    context[1] = 0
    assert torch.count_nonzero(bev_pool_v2(depth, context, cells, GRID)[1]) == 0


def test_any_index_outside_the_grid_is_skipped(device):
    depth, context, cells = make_case(device)
    wrong = torch.tensor([-1, -7, 24, 25, 2**31 - 1, -(2**31), 2**40, 2**32 + 3], device=device)
    far, outside = cells.clone(), cells == -1
    far[outside] = wrong[torch.arange(int(outside.sum()), device=device) % len(wrong)]
    assert (far < -1).any() and (far > 2**32).any()
    expected = bev_pool_v2(depth, context, cells, GRID)
    assert torch.equal(bev_pool_v2(depth, context, far, GRID), expected)
    depth.requires_grad_()
    (grad,) = torch.autograd.grad(bev_pool_v2(depth, context, far, GRID).sum(), depth)
    assert torch.count_nonzero(grad[cells == -1]) == 0 and torch.count_nonzero(grad) > 0


def test_all_points_outside(device):
    depth, context, cells = make_case(device)
    volume = bev_pool_v2(depth, context, torch.full_like(cells, -1), GRID)
    assert volume.shape == (2, 6, *GRID) and torch.count_nonzero(volume) == 0


@pytest.mark.parametrize("function", [bev_pool_v2, bev_pool_v2_reference])
def test_gradcheck(device, function):
    depth, context, cells = make_case(device, sizes=(2, 2, 3, 1, 4, 5))
    inputs = depth.requires_grad_(), context.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, c: function(d, c, cells, GRID), inputs)


@pytest.mark.parametrize("channels", [1, 3, 32, 33, 80, 129])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_float32_equals_float64_reference(device, channels, index_dtype):
    sizes, grid = (2, 2, 9, 3, 11, channels), (3, 5, 13)  # more voxels than one tile of any kernel, and a remainder
    depth, context, cells = make_case("cpu", sizes=sizes, grid=grid)
    grad = torch.randn(2, channels, *grid, dtype=torch.float64)
    expected = run_with_gradients(bev_pool_v2_reference, depth, context, cells, grid, grad)
    inputs = depth.float().to(device), context.float().to(device), cells.to(device, index_dtype)
    for actual, target in zip(run_with_gradients(bev_pool_v2, *inputs, grid, grad), expected, strict=True):
        assert actual.dtype == torch.float32 and actual.device.type == device
        assert_near(actual, target, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(device, dtype):
    depth, context, cells = make_case(device, dtype, sizes=(1, 4, 64, 2, 7, 6))
    grad = torch.randn(1, 6, *GRID).to(dtype)
    expected = run_with_gradients(
        bev_pool_v2_reference, depth.double().cpu(), context.double().cpu(), cells.cpu(), GRID, grad.double()
    )
    results = run_with_gradients(bev_pool_v2, depth, context, cells, GRID, grad)
    for actual, target in zip(results, expected, strict=True):
        assert actual.dtype == dtype
        # Only the result is rounded: half a unit in the last place of each number.
        torch.testing.assert_close(actual.double().cpu(), target, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 3, 5, 2, 7, 6), (6, 2, 4, 3, 5, 33), (4, 1, 3, 2, 2, 160)])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ordered", [False, True])
def test_frames_become_channels(device, sizes, dtype, ordered):
    depth, context, cells = make_case(device, torch.float32, sizes=sizes)
    order = sort_by_cell(cells, GRID) if ordered else None
    volume = bev_pool_v2_stacked(depth, context, cells, GRID, 2, order=order, dtype=dtype)
    frames = bev_pool_v2(depth, context, cells, GRID).to(volume.dtype).unflatten(0, (2, -1))
    assert volume.shape == (sizes[0] // 2, 2 * sizes[-1], *GRID) and volume.dtype == (dtype or torch.float32)
    assert torch.equal(volume, torch.cat([frames[0], frames[1]], 1))
    assert device == "cpu" or volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_torch_compile_traces_through_frames_as_channels(device):
    case = make_case(device, torch.float32)
    traced = torch.compile(lambda *args: bev_pool_v2_stacked(*args, GRID, 2) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(*case), bev_pool_v2_stacked(*case, GRID, 2) + 1)


def test_gradients_of_frames_as_channels(device):
    depth, context, cells = make_case(device)
    inputs = (depth.requires_grad_(), context.requires_grad_())
    assert torch.autograd.gradcheck(lambda *leaves: bev_pool_v2_stacked(*leaves, cells, GRID, 2), inputs)


@pytest.mark.parametrize("frames", [0, 3])
def test_frames_of_different_numbers_are_refused(device, frames):
    with pytest.raises(ValueError, match=f"frames must divide the 2 samples, got {frames}"):
        bev_pool_v2_stacked(*make_case(device, torch.float32), GRID, frames)


def test_noncontiguous_inputs(device):
    depth, context, cells = make_case(device)
    grad = torch.randn(2, 6, *GRID, dtype=torch.float64)
    expected = run_with_gradients(bev_pool_v2, depth, context, cells, GRID, grad)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (depth, context, cells)]
    assert not any(t.is_contiguous() for t in strided)
    grad = grad.transpose(1, 4).contiguous().transpose(1, 4)
    for actual, target in zip(run_with_gradients(bev_pool_v2, *strided, GRID, grad), expected, strict=True):
        assert torch.equal(actual, target)
    # A gradient with stride 0, as sum() gives.
    depth.requires_grad_()
    (grad,) = torch.autograd.grad(bev_pool_v2(depth, context, cells, GRID).sum(), depth)
    torch.testing.assert_close(grad, (context.sum(-1).unsqueeze(2) * (cells >= 0)))


def test_order_is_stable_and_can_be_reused(device):
    depth, context, cells = make_case(device)
    order = sort_by_cell(cells, GRID)
    assert order.points.dtype == order.starts.dtype == torch.int32 and order.points.device.type == device
    points, starts, flat = order.points.tolist(), order.starts.tolist(), cells.flatten().tolist()
    per_sample, visited = len(flat) // 2, 0
    for voxel in range(2 * 24):
        chosen = points[starts[voxel] : starts[voxel + 1]]
        expected = [p for p in range(len(flat)) if flat[p] == voxel % 24 and p // per_sample == voxel // 24]
        assert chosen == expected
        visited += len(chosen)
    assert sorted(points[visited:]) == [p for p, cell in enumerate(flat) if cell < 0]
    for other in (depth, depth * 2):
        expected = bev_pool_v2(other, context, cells, GRID)
        assert torch.equal(bev_pool_v2(other, context, cells, GRID, order=order), expected)


@needs_library
def test_repeats_give_the_same_bits(device):
    sizes, grid = (1, 2, 40, 4, 11, 80), (2, 7, 9)
    depth, context, cells = make_case(device, torch.float32, sizes=sizes, grid=grid)
    grad = torch.randn(1, 80, *grid)
    first = run_with_gradients(bev_pool_v2, depth, context, cells, grid, grad)
    for _ in range(5):
        again = run_with_gradients(bev_pool_v2, depth, context, cells, grid, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_library
def test_threads_do_not_change_the_result():
    case = make_rig_case("cpu", torch.float32, sizes=(1, 2, 11, 3, 4, 5), grid=(4, 25, 20))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(bev_pool_v2(*case, (4, 25, 20)))
    finally:
        torch.set_num_threads(threads)
    assert torch.count_nonzero(results[0]) > 0
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("function", [bev_pool_v2, bev_pool_v2_reference])
@pytest.mark.parametrize(
    "sizes", [(0, 3, 5, 2, 7, 6), (2, 0, 5, 2, 7, 6), (2, 3, 0, 2, 7, 6), (2, 3, 5, 0, 7, 6), (2, 3, 5, 2, 7, 0)]
)
def test_empty(device, function, sizes):
    case = make_case(device, sizes=sizes)
    grad = torch.ones(sizes[0], sizes[-1], *GRID)
    volume, grad_depth, grad_context = run_with_gradients(function, *case, GRID, grad)
    assert volume.shape == (sizes[0], sizes[-1], *GRID) and torch.count_nonzero(volume) == 0
    assert grad_depth.shape == case[0].shape and torch.count_nonzero(grad_depth) == 0
    assert grad_context.shape == case[1].shape and torch.count_nonzero(grad_context) == 0


def test_grid_size_of_numpy_integers():
    case = make_case()
    assert torch.equal(bev_pool_v2(*case, np.array(GRID)), bev_pool_v2(*case, GRID))


def change(position, function):
    def changed(case):
        return [function(t) if i == position else t for i, t in enumerate(case)]

    return changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (change(0, lambda t: t.int()), TypeError, r"depth must be one of torch.float32.*got torch.int32"),
        (change(0, lambda t: t[0]), ValueError, r"depth must have shape \(B, N, D, H, W\), got \(3, 5, 2, 7\)"),
        (change(1, lambda t: t.float()), TypeError, r"context must have the dtype of depth, torch.float64, got"),
        (change(1, lambda t: t[..., 0]), ValueError, r"context must have shape \(B, N, H, W, C\), got"),
        (change(1, lambda t: t[:, :, :1]), ValueError, r"= \(2, 3, 2, 7, 6\), got \(2, 3, 1, 7, 6\)"),
        (change(1, lambda t: t.to("meta")), ValueError, r"context must be on the device of depth, cpu, got meta"),
        (change(1, lambda t: t.tolist()), TypeError, r"context must be a tensor, got list"),
        (change(2, lambda t: t.double()), TypeError, r"cell_index must be one of torch.int32, torch.int64, got"),
        (change(2, lambda t: t[:1]), ValueError, r"cell_index must have shape .* = \(2, 3, 5, 2, 7\), got \(1,"),
        (change(2, lambda t: t.to("meta")), ValueError, r"cell_index must be on the device of depth"),
        (change(3, lambda t: t[:2]), ValueError, r"grid_size must be three positive .* \(Z, Y, X\), got \(2, 3\)"),
        (change(3, lambda t: (0, 3, 4)), ValueError, r"grid_size must be three positive integers"),
        (change(3, lambda t: (2.0, 3, 4)), TypeError, r"grid_size must hold integers, got 2.0"),
        (change(3, lambda t: (2**10,) * 3), ValueError, r"at most 2147483646 of each are supported"),
    ],
)
def test_refusals(changed, error, message):
    with pytest.raises(error, match=message):
        bev_pool_v2(*changed([*make_case(), GRID]))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (lambda o: tuple(o), TypeError, r"order must be a PoolOrder made by sort_by_cell, got tuple"),
        (lambda o: PoolOrder(o.points.long(), o.starts), TypeError, r"order.points must be one of torch.int32, got"),
        (lambda o: PoolOrder(o.points[1:], o.starts), ValueError, r"order.points must have shape .*420,\), got \(419,"),
        (lambda o: PoolOrder(o.points, o.starts[1:]), ValueError, r"order.starts must have shape .*49,\), got \(48,"),
        (lambda o: PoolOrder(o.points.to("meta"), o.starts), ValueError, r"order.points must be on the device of"),
    ],
)
def test_refusals_of_order(changed, error, message):
    case = make_case()
    with pytest.raises(error, match=message):
        bev_pool_v2(*case, GRID, order=changed(sort_by_cell(case[2], GRID)))


def test_refusals_of_sort():
    cells = make_case()[2]
    with pytest.raises(TypeError, match="cell_index must be one of"):
        sort_by_cell(cells.float(), GRID)
    with pytest.raises(ValueError, match=r"cell_index must have shape \(B, N, D, H, W\)"):
        sort_by_cell(cells[0], GRID)


@needs_library
def test_wrong_order_never_leaves_the_tensors(device):
    depth, context, cells = make_case(device)
    order = sort_by_cell(cells, GRID)
    points = torch.where(order.points % 3 == 0, 2**31 - 1, order.points)
    points = torch.where(order.points % 3 == 1, -5, points)
    starts = order.starts.flip(0) * 3 - 70
    volume = bev_pool_v2(depth, context, cells, GRID, order=PoolOrder(points, order.starts))
    assert volume.isfinite().all()
    assert bev_pool_v2(depth, context, cells, GRID, order=PoolOrder(points, starts)).isfinite().all()


@needs_library
def test_registration(device):
    depth, context, cells = make_case(device)
    order = sort_by_cell(cells, GRID)
    inputs = (depth.requires_grad_(), context.requires_grad_(), cells, *order, GRID)
    torch.library.opcheck(torch.ops.mmdet3d.bev_pool_v2_forward.default, inputs)
    grad = torch.randn(2, 6, *GRID, dtype=torch.float64, device=device)
    inputs = (grad, depth.detach(), context.detach(), cells)
    torch.library.opcheck(torch.ops.mmdet3d.bev_pool_v2_backward.default, inputs)
    if device == "cpu":
        torch.library.opcheck(torch.ops.mmdet3d.bev_pool_v2_sort.default, (cells, 24))


@needs_library
def test_second_derivative_is_refused(device):
    depth, context, cells = make_case(device)
    depth.requires_grad_()
    (grad,) = torch.autograd.grad(bev_pool_v2(depth, context, cells, GRID).sum(), depth, create_graph=True)
    with pytest.raises(NotImplementedError, match="bev_pool_v2 has no second derivative"):
        grad.sum().backward()


@needs_library
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(device, dynamic):
    def pool(depth, context, cells):
        return bev_pool_v2(depth, context, cells, GRID)

    case = make_case(device)
    grad = torch.randn(2, 6, *GRID, dtype=torch.float64)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = run_with_gradients(bev_pool_v2, *case, GRID, grad)
    actual = run_with_gradients(lambda d, c, i, _: compiled(d, c, i), *case, GRID, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    class Pool(torch.nn.Module):
        def forward(self, depth, context, cells):
            return pool(depth, context, cells)

    exported = torch.export.export(Pool(), case)
    assert torch.equal(exported.module()(*case), expected[0])
