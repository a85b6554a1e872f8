"""frustum_cells against loops in float32 and its reference, at the borders of the grid, and where it must refuse."""

import itertools
import math

import numpy as np
import pytest
import torch

from mmdet3d.ops import FrustumGeometry, _library, frustum_cells, frustum_cells_reference
from mmdet3d.structures import VoxelGrid

NARROW = VoxelGrid((-4, -3, -1), (6, 3, 2), (2, 1.5, 1.0))  # X, Y, Z = 5, 4, 3
GRID = VoxelGrid((-40, -40, -1), (40, 40, 5.4), (0.8, 0.8, 0.8))
SMALL = {"batch": 2, "cameras": 3, "frustum": (5, 4, 7)}
REAL = {"batch": 2, "cameras": 6, "frustum": (88, 16, 44)}  # two frames of one sample

compiled = pytest.mark.skipif(not (_library.AVAILABLE and hasattr(torch.ops.mmdet3d, "frustum_cells")),
                              reason="frustum_cells is not compiled")


def yaw(angles):
    """[..., 3, 3] turns about z."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, zero + 1], -1).unflatten(-1, (3, 3))


def make_case(device="cpu", batch=2, cameras=3, frustum=(5, 4, 7), seed=0):
    """Cameras all around whose images are turned and mirrored, samples that are mirrored, turned and moved."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, cameras, *shape, generator=generator)

    around = torch.arange(cameras) * 2 * math.pi / max(cameras, 1)
    forward = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # right, down, forward -> forward, left, up
    pixel_from_augmented = 2.2 * yaw(0.05 * draw())[..., :2, :2] * torch.tensor([-1.0, 1.0])
    camera_from_pixel = torch.tensor([[1 / 1260, 0, -0.63], [0, 1 / 1255, -0.39], [0, 0, 1]])
    bda = torch.eye(4).repeat(batch, 1, 1)
    bda[:, :3, :3] = yaw(0.3 * torch.randn(batch, generator=generator)) * torch.tensor([-1.0, 1.0, 1.0])
    bda[:, :3, 3] = torch.randn(batch, 3, generator=generator)
    geometry = FrustumGeometry(
        pixel_from_augmented, torch.tensor([704.0, -140.0]) + 9 * draw(2),
        yaw(around + 0.02 * draw()) @ forward @ camera_from_pixel, torch.tensor([1.0, 0, 1.6]) + 0.3 * draw(3), bda)
    count, height, width = frustum
    lattice = [torch.linspace(low, high, n) for low, high, n in ((0, 703, width), (0, 255, height), (1, 44.5, count))]
    return FrustumGeometry(*(t.to(device) for t in geometry)), *(t.to(device) for t in lattice)


def expected_by_loops(geometry, columns, rows, depths, grid, truncate_toward_zero=True):
    """The contract, one number at a time in float32."""
    linear, offset, rotation, translation, bda = (tensor.cpu().numpy() for tensor in geometry)
    columns, rows, depths = (tensor.cpu().numpy() for tensor in (columns, rows, depths))
    low, edge = np.float32(grid.low), np.float32(grid.cell)

    def product(matrix, vector):
        totals = []
        for row in matrix:
            total = row[0] * vector[0]
            for k in range(1, len(vector)):
                total = total + row[k] * vector[k]
            totals.append(total)
        return totals

    cells = torch.full((*offset.shape[:2], len(depths), len(rows), len(columns)), -1, dtype=torch.int32)
    for b, n, d, v, u in itertools.product(*map(range, cells.shape)):
        x, y = product(linear[b, n], (columns[u] - offset[b, n, 0], rows[v] - offset[b, n, 1]))
        point = product(rotation[b, n], (x * depths[d], y * depths[d], depths[d]))
        point = product(bda[b, :3, :3], [p + t for p, t in zip(point, translation[b, n], strict=True)])
        along = [(p + t - lo) / e for p, t, lo, e in zip(point, bda[b, :3, 3], low, edge, strict=True)]
        assert all(isinstance(value, np.float32) for value in along)
        i, j, k = (int(value) if truncate_toward_zero else math.floor(value) for value in along)
        if all(0 <= index < size for index, size in zip((i, j, k), grid.size_xyz, strict=True)):
            cells[b, n, d, v, u] = (k * grid.size_xyz[1] + j) * grid.size_xyz[0] + i
    return cells


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("function", [frustum_cells, frustum_cells_reference])
def test_equals_loops(device, function, truncate):
    expected = expected_by_loops(*make_case(**SMALL), GRID, truncate)
    assert 0.3 < (expected >= 0).float().mean() < 0.9 and len(expected.unique()) > 100
    cells = function(*make_case(device, **SMALL), GRID, truncate_toward_zero=truncate)
    assert cells.dtype == torch.int32 and torch.equal(cells.cpu(), expected)


@pytest.mark.parametrize("case", [REAL, {"batch": 1, "cameras": 5, "frustum": (17, 3, 129)},
                                  {"batch": 3, "cameras": 1, "frustum": (1, 1, 1)}])
@pytest.mark.parametrize("truncate", [True, False])
def test_equals_the_reference_on_the_cpu_in_every_point(device, case, truncate):
    for seed in range(3):
        expected = frustum_cells_reference(*make_case(**case, seed=seed), GRID, truncate_toward_zero=truncate)
        inputs = make_case(device, **case, seed=seed)
        for function in (frustum_cells, frustum_cells_reference):
            assert torch.equal(function(*inputs, GRID, truncate_toward_zero=truncate).cpu(), expected)


def voxel_of(points, grid, truncate_toward_zero=True, device="cpu"):
    """Voxels of points [P, 3]: those of P cameras, each in its point, at depth 0."""
    count = len(points)
    one = torch.eye(3).expand(1, count, 3, 3)
    cameras = FrustumGeometry(one[..., :2, :2], torch.zeros(1, count, 2), one, points[None], torch.eye(4)[None])
    cameras = FrustumGeometry(*(tensor.to(device) for tensor in cameras))
    return frustum_cells(cameras, *torch.zeros(3, 1, device=device), grid,
                         truncate_toward_zero=truncate_toward_zero).flatten().cpu()


def cell(x, y, z):
    """Flat index in NARROW."""
    return (z * 4 + y) * 5 + x


@pytest.mark.parametrize("point, index", [
    ((-4, -3, -1), cell(0, 0, 0)), ((-2, -3, -1), cell(1, 0, 0)), ((-2.01, -1.5, 0), cell(0, 1, 1)),
    ((5.99, 2.99, 1.99), cell(4, 3, 2)), ((6, 0, 0), -1), ((0, 3, 0), -1), ((0, 0, 2), -1),
    ((-6, 0, 0), -1), ((0, -4.5, 0), -1), ((0, 0, -2), -1)])
def test_voxel_of_a_point(device, point, index):
    assert voxel_of(torch.tensor([point], dtype=torch.float32), NARROW, device=device).item() == index


def test_truncation_pulls_points_just_below_the_bounds_in(device):
    # Half a voxel below the lower bound of each axis, then of all.
    points = torch.tensor([[-5.0, 0, 0], [0, -3.75, 0], [0, 0, -1.5], [-5.99, -4.49, -1.99]])
    inside = torch.tensor([cell(0, 2, 1), cell(2, 0, 1), cell(2, 2, 0), cell(0, 0, 0)], dtype=torch.int32)
    assert torch.equal(voxel_of(points, NARROW, device=device), inside)
    assert voxel_of(points, NARROW, truncate_toward_zero=False, device=device).tolist() == [-1] * 4
    assert torch.equal(voxel_of(points + 2, NARROW, device=device),
                       voxel_of(points + 2, NARROW, truncate_toward_zero=False, device=device))


def test_the_numbers_next_to_a_border(device):
    points, here = torch.zeros(4, 3), cell(0, 2, 1)
    borders = torch.tensor([-4.0, -4.0, -6.0, -6.0])
    points[:, 0] = torch.nextafter(borders, torch.tensor([-5.0, -4.0, 0.0, -6.0]))  # below, at, above, at
    assert voxel_of(points, NARROW, device=device).tolist() == [here, here, here, -1]
    assert voxel_of(points, NARROW, truncate_toward_zero=False, device=device).tolist() == [-1, here, -1, -1]


@pytest.mark.parametrize("truncate", [True, False])
def test_points_that_no_integer_can_hold_are_outside(device, truncate):
    far = torch.tensor([3e9, -3e9, 1e30, -1e30, float("inf"), -float("inf"), math.nan])
    for axis in range(3):
        points = torch.zeros(len(far), 3)
        points[:, axis] = far
        assert voxel_of(points, NARROW, truncate, device).tolist() == [-1] * len(far)


def test_indices_are_flat_in_the_order_z_y_x(device):
    centres = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (3, 4, 5)), indexing="ij"), -1).flip(-1)
    points = (centres + 0.5) * torch.tensor(NARROW.cell) + torch.tensor(NARROW.low)
    index = voxel_of(points.flatten(0, 2), NARROW, device=device)
    assert index.dtype == torch.int32 and torch.equal(index, torch.arange(60, dtype=torch.int32))


def test_the_last_row_of_the_augmentation_is_not_read(device):
    cameras, *lattice = make_case(device)
    expected = frustum_cells(cameras, *lattice, GRID)
    cameras.bda[:, 3] = math.nan
    assert torch.equal(frustum_cells(cameras, *lattice, GRID), expected)


def test_strides(device):
    cameras, *lattice = make_case(device)
    expected = frustum_cells(cameras, *lattice, GRID)
    moved = FrustumGeometry(*(t.transpose(0, -1).contiguous().transpose(0, -1) for t in cameras))
    spread = [torch.stack([t, t + 1], -1)[:, 0] for t in lattice]
    assert not any(t.is_contiguous() for t in (*moved, *spread))
    for function in (frustum_cells, frustum_cells_reference):
        assert torch.equal(function(moved, *spread, GRID), expected)


@pytest.mark.parametrize("batch, cameras, frustum", [(0, 3, (5, 4, 7)), (2, 0, (5, 4, 7)), (2, 3, (0, 4, 7)),
                                                     (2, 3, (5, 0, 7)), (2, 3, (5, 4, 0))])
def test_empty(device, batch, cameras, frustum):
    for function in (frustum_cells, frustum_cells_reference):
        cells = function(*make_case(device, batch, cameras, frustum), GRID)
        assert cells.shape == (batch, cameras, *frustum) and cells.dtype == torch.int32


def test_autocast_does_not_touch_it(device):
    inputs = make_case(device)
    expected = frustum_cells(*inputs, GRID)
    with torch.autocast(device, dtype=torch.bfloat16):
        for function in (frustum_cells, frustum_cells_reference):
            assert torch.equal(function(*inputs, GRID), expected)


def test_no_gradient_flows(device):
    cameras, *lattice = make_case(device)
    cameras.translation.requires_grad_()
    assert not frustum_cells(cameras, *lattice, GRID).requires_grad


@pytest.mark.parametrize("name, change, error, message", [
    ("cameras", tuple, TypeError, "cameras must be a FrustumGeometry, got tuple"),
    ("cameras", lambda c: c._replace(bda=c.bda.double()), TypeError,
     "cameras.bda must be one of torch.float32, got torch.float64"),
    ("cameras", lambda c: c._replace(offset=None), TypeError, "cameras.offset must be a tensor, got NoneType"),
    ("cameras", lambda c: c._replace(offset=c.offset[0]), ValueError,
     r"cameras.offset must have shape \(B, N, 2\), got \(3, 2\)"),
    ("cameras", lambda c: c._replace(offset=c.offset[..., :1]), ValueError,
     r"cameras.offset must have shape \(B, N, 2\) = \(2, 3, 2\), got \(2, 3, 1\)"),
    ("cameras", lambda c: c._replace(pixel_from_augmented=c.ego_from_pixel), ValueError,
     r"cameras.pixel_from_augmented must have shape \(B, N, 2, 2\) = \(2, 3, 2, 2\), got \(2, 3, 3, 3\)"),
    ("cameras", lambda c: c._replace(translation=c.translation[:, 1:]), ValueError,
     r"cameras.translation must have shape \(B, N, 3\) = \(2, 3, 3\), got \(2, 2, 3\)"),
    ("cameras", lambda c: c._replace(bda=c.bda[:1]), ValueError,
     r"cameras.bda must have shape \(B, 4, 4\) = \(2, 4, 4\), got \(1, 4, 4\)"),
    ("cameras", lambda c: c._replace(bda=c.bda.to("meta")), ValueError,
     "cameras.bda must be on the device of depths, cpu, got meta"),
    ("rows", lambda t: t[None], ValueError, r"rows must have shape \(h\), got \(1, 4\)"),
    ("columns", lambda t: t.half(), TypeError, "columns must be one of torch.float32, got torch.float16"),
    ("grid", lambda g: VoxelGrid((0, 0, 0), (2048, 2048, 512), (1, 1, 1)), ValueError,
     r"grid must have at most 2147483647 voxels, got \(2048, 2048, 512\) \(X, Y, Z\)"),
])
def test_refusals(name, change, error, message):
    arguments = dict(zip(("cameras", "columns", "rows", "depths", "grid"), (*make_case(), GRID), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        frustum_cells(**arguments)


def flat_case(device="cpu"):
    """The arguments as the dispatcher takes them."""
    cameras, *lattice = make_case(device)
    return [*cameras, *lattice, GRID.low, GRID.cell, GRID.size_xyz, True]


@compiled
@pytest.mark.parametrize("place, change", [
    (0, lambda t: t[..., :1]), (1, lambda t: t[0]), (1, lambda t: t[:1]), (2, lambda t: t.double()),
    (3, lambda t: t[..., :2]), (4, lambda t: t[0]), (5, lambda t: t[None]), (6, lambda t: t.int()),
    (7, lambda t: t[0]), (10, lambda size: (100, 0, 8)), (10, lambda size: (2048, 2048, 512))])
def test_the_compiled_operator_checks_what_keeps_it_in_memory(place, change):
    arguments = flat_case()
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match="frustum_cells: "):
        torch.ops.mmdet3d.frustum_cells(*arguments)


@compiled
def test_registration(device):
    torch.library.opcheck(torch.ops.mmdet3d.frustum_cells.default, tuple(flat_case(device)),
                          test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_traces_through(device):
    cameras, *lattice = make_case(device)

    def doubled(*tensors):
        return frustum_cells(FrustumGeometry(*tensors), *lattice, GRID) * 2

    traced = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(*cameras), doubled(*cameras))


def bench_cases(device, dtype):
    """(name, fast, reference): two frames of the released model, from matrices to voxels, in float32."""
    inputs = make_case(device, **REAL)
    work = {"bytes": frustum_cells(*inputs, GRID).nbytes}
    return [("frustum_cells", lambda: frustum_cells(*inputs, GRID), lambda: frustum_cells_reference(*inputs, GRID),
             work)]
