"""ray_cast against a loop in Python floats, against its reference, and against known sums over whole scans."""

import math

import numpy as np
import pytest
import torch

from mmdet3d.ops import _library
from mmdet3d.ops.ray_cast import ray_cast, ray_cast_reference

compiled = pytest.mark.skipif(
    not (_library.AVAILABLE and hasattr(torch.ops.mmdet3d, "ray_cast")), reason="ray_cast is not compiled")

FREE = 16
LABEL_WORLD = {"free_label": FREE, "low": (-40.0, -40.0, -1.0), "cell_size": 0.4}
CASE_WORLD = {"free_label": FREE, "low": (-0.8, 0.0, 0.4), "cell_size": 0.4}
CASE_SIZE = (13, 22, 5)


def make_case(device="cpu", seed=0, size=CASE_SIZE, count=6, rays=60, density=0.03):
    """Grids, origins, one set of rays per origin, grid of each origin; borders, ties, parallels and outsides occur."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.where(torch.rand(2, *size, generator=generator) < density, 3, FREE).to(torch.uint8)
    low = torch.tensor(CASE_WORLD["low"], dtype=torch.float64)
    place = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    origins = low + place * torch.tensor(size) * CASE_WORLD["cell_size"]
    on_border = torch.rand(count, 1, generator=generator) < 0.3
    origins = torch.where(on_border, (origins / 0.2).round() * 0.2, origins)
    directions = torch.randn(count, rays, 3, generator=generator)
    plain = torch.rand(count, rays, 1, generator=generator) < 0.2
    directions = torch.where(plain, directions.round(), directions)
    index = torch.randint(0, 2, (count,), generator=generator)
    return [tensor.to(device) for tensor in (grids, origins, directions, index)]


def expected_by_loop(grid, origin, ray, free_label, low, cell_size, max_steps=1001):
    """One ray, in NumPy scalars and Python floats: (cell, distance, hit, entry, axis)."""
    never, cell_size = np.finfo(np.float64).max, np.float32(cell_size)
    start = [float(np.float32((o - lo) / float(cell_size))) for o, lo in zip(origin, low, strict=True)]
    end = [float(np.float32(((r + o) - lo) / float(cell_size))) for r, o, lo in zip(ray, origin, low, strict=True)]
    vector = [e - s for e, s in zip(end, start, strict=True)]
    length = math.sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2])
    if length == 0:
        return (0, 0, 0), np.float32(-1) * cell_size, False, np.float32(-1) * cell_size, -1
    unit = [v / length for v in vector]
    cell = [int(s) for s in start]
    step = [1 if u >= 0 else -1 for u in unit]
    following = [(c + (s > 0) - g) / u if u else never for c, s, g, u in zip(cell, step, start, unit, strict=True)]
    period = [s / u if u else never for s, u in zip(step, unit, strict=True)]
    best, last_time, last_axis = None, 0.0, -1
    for _ in range(max_steps):
        inside = all(0 <= c < n for c, n in zip(cell, grid.shape, strict=True))
        if not inside and best:
            break
        x, y, z = following
        axis = (0 if x < z else 2) if x < y else (1 if y < z else 2)
        time, here = following[axis], tuple(cell)
        cell[axis] += step[axis]
        following[axis] += period[axis]
        if inside:
            hit = bool(grid[here] != free_label)
            best = (here, np.float32(time) * cell_size, hit, np.float32(last_time) * cell_size, last_axis)
            if hit:
                break
        last_time, last_axis = time, axis
    return best or ((0, 0, 0), np.float32(-1) * cell_size, False, np.float32(-1) * cell_size, -1)


@pytest.mark.parametrize("max_steps", [1001, 7, 1])
def test_equals_a_loop(device, max_steps):
    case = make_case("cpu")
    options = {**CASE_WORLD, "max_steps": max_steps}
    grids, origins, rays, index = (tensor.numpy() for tensor in case)
    expected = [[expected_by_loop(grids[index[n]], origins[n].tolist(), rays[n, r].tolist(), **options)
                 for r in range(rays.shape[1])] for n in range(len(origins))]
    for function in (ray_cast, ray_cast_reference):
        hits = function(*(tensor.to(device) for tensor in case), **options, with_entry=True)
        assert hits.voxel.device.type == device
        cells = hits.cells(CASE_SIZE).cpu()
        for n, row in enumerate(expected):
            assert cells[n].tolist() == [list(end[0]) for end in row]
            assert hits.distance[n].tolist() == [float(end[1]) for end in row]
            assert hits.hit[n].tolist() == [end[2] for end in row]
            assert hits.entry[n].tolist() == [float(end[3]) for end in row]
            assert hits.axis[n].tolist() == [end[4] for end in row]
    if max_steps == 1001:
        ends = [end for row in expected for end in row]
        kinds = {"hit": sum(end[2] for end in ends), "left": sum(not end[2] and end[1] >= 0 for end in ends),
                 "nothing": sum(end[1] == np.float32(-0.4) for end in ends), "first": sum(end[4] < 0 for end in ends)}
        assert min(kinds.values()) > 5, f"the case does not cover every kind of end: {kinds}"


def assert_same(hits, expected):
    for name, first, second in zip(hits._fields, hits, expected, strict=True):
        if first is None or second is None:
            assert first is second, name
        else:
            assert first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu()), name


@pytest.mark.parametrize("seed", range(12))
def test_compiled_equals_reference_bit_for_bit(device, seed):
    sizes = torch.randint(1, 26, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    case = make_case(device, seed, sizes, count=5, rays=400, density=[0.0, 0.02, 0.2][seed % 3])
    options = {**CASE_WORLD, "max_steps": [1001, 20][seed % 2], "with_entry": seed % 4 < 2}
    assert_same(ray_cast(*case, **options), ray_cast_reference(*case, **options))


@compiled
def test_vectors_and_plain_walk_agree(device):
    grids, origins, rays, index = make_case(device, seed=5, size=(60, 41, 9), count=4, rays=900)
    with_vectors = ray_cast(grids, origins, rays, index, **CASE_WORLD)
    few_steps = ray_cast(grids, origins, rays, index, **CASE_WORLD, max_steps=109)  # one less than X + Y + Z
    few_rays = [ray_cast(grids, origins, rays[:, i:i + 20], index, **CASE_WORLD) for i in range(0, 900, 20)]
    assert_same(with_vectors, few_steps)
    assert torch.equal(with_vectors.distance, torch.cat([hits.distance for hits in few_rays], dim=1))


def hashed_grid():
    """A floor of label 10 and scattered voxels of labels 0 to 9."""
    x, y, z = np.meshgrid(np.arange(200), np.arange(200), np.arange(16), indexing="ij")
    code = ((x * 73856093) ^ (y * 19349663) ^ (z * 83492791)) % 2**32
    grid = np.where(code % 211 == 0, code % 10, FREE)
    grid[..., 0] = 10
    return grid.astype(np.uint8)


def scan_rays():
    pitches = [-(np.pi / 2 - np.arctan(k + 1)) for k in range(10)]
    while pitches[-1] < 0.21:
        pitches.append(2 * pitches[-1] - pitches[-2])
    pitch, azimuth = np.meshgrid(pitches, np.deg2rad(np.arange(360.0)), indexing="ij")
    rays = np.stack([np.cos(pitch) * np.cos(azimuth), np.cos(pitch) * np.sin(azimuth), np.sin(pitch)], -1)
    return torch.from_numpy(rays.reshape(-1, 3).astype(np.float32))


@pytest.mark.parametrize("kind, origin, total, checksum, blocked, nothing", [
    ("empty", (0.9858, 0, 1.8402), 425232.80803871155, 847692420, 0, 0),
    ("hashed", (0.9858, 0, 1.8402), 327776.2119834423, 117400708, 8648, 0),
    ("hashed", (3.0, -2.0, 6.1), 188971.676664263, 212333538, 3740, 7919),
    ("hashed", (3.0, -2.0, -1.3), -170672.79965382814, 734562216, 14040, 0),
    ("hashed", (38.9, -38.9, 0.05), 104356.95271474123, 866664801, 3568, 0),
])
def test_known_scans(device, kind, origin, total, checksum, blocked, nothing):
    from mmdet3d.datasets.metrics import lidar_rays

    grid = torch.from_numpy(hashed_grid() if kind == "hashed" else np.full((200, 200, 16), FREE, np.uint8))
    rays = torch.from_numpy(lidar_rays())
    hits = ray_cast(grid[None].to(device), torch.tensor([origin], dtype=torch.float64, device=device),
                    rays.to(device), **LABEL_WORLD)
    assert sum(hits.distance[0].double().tolist()) == pytest.approx(total, abs=1e-9)
    value = 0
    for voxel in hits.voxel[0].tolist():
        value = (31 * value + voxel) % 1000000007
    assert value == checksum
    cells = hits.cells(tuple(grid.shape))[0]
    assert torch.equal((cells[:, 0] * 3200 + cells[:, 1] * 16 + cells[:, 2]).int(), hits.voxel[0])
    assert int(hits.hit.sum()) == blocked
    if not nothing:
        assert (hits.distance != np.float32(-0.4)).all()
    else:
        assert int((hits.distance == np.float32(-0.4)).sum()) == nothing


NOTHING = (0, float(np.float32(-0.4)), False, float(np.float32(-0.4)), -1)


@pytest.mark.parametrize("origin, ray", [
    ((0, 1, 1), (0, 0, 0)), ((0, 1, 1), (1e-30, 0, 0)), ((0, 1, 1), (math.nan, 1, 0)), ((0, 1, 1), (math.inf, 1, 0)),
    ((math.nan, 1, 1), (1, 0, 0)), ((math.inf, 1, 1), (1, 0, 0)), ((1e12, 1, 1), (-1, 0, 0)),
    ((-500, 1, 1), (1, 0, 0)), ((0, 1, 9), (1, 0, 0)), ((0, 1, 9), (0, 0, 1)),
])
def test_what_passes_no_voxel(device, origin, ray):
    grids = torch.zeros(1, *CASE_SIZE, dtype=torch.uint8, device=device)
    place = torch.tensor([origin], dtype=torch.float64, device=device)
    for copies in (1, 3000):  # few rays take the plain walk
        rays = torch.tensor([ray] * copies, dtype=torch.float32, device=device)
        for function, index in ((ray_cast, None), (ray_cast_reference, torch.zeros(1, dtype=torch.int64))):
            hits = function(grids, place, rays, None if index is None else index.to(device), **CASE_WORLD,
                            with_entry=True)
            assert tuple(value[0, -1].item() for value in hits) == NOTHING


def test_an_index_without_grid_passes_no_voxel(device):
    grids, origins, rays, _ = make_case(device)
    hits = ray_cast(grids, origins, rays, torch.tensor([0, -1, 2, 1, 2**40, 0], device=device), **CASE_WORLD)
    assert (hits.voxel[[1, 2, 4]] == 0).all() and not hits.hit[[1, 2, 4]].any() and hits.hit[[0, 3, 5]].any()


def test_shared_rays_strides_dtypes_and_one_grid(device):
    grids, origins, rays, index = make_case(device)
    expected = ray_cast(grids, origins, rays[:1].expand_as(rays), index, **CASE_WORLD)
    assert_same(ray_cast(grids, origins, rays[0], index.int(), **CASE_WORLD), expected)
    assert_same(ray_cast(grids, origins, rays[0].double(), index, **CASE_WORLD), expected)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in (grids, origins, rays[0])]
    assert_same(ray_cast(*strided, index.repeat_interleave(2)[::2], **CASE_WORLD), expected)
    alone = ray_cast(grids[1:], origins, rays[0], **CASE_WORLD)
    assert_same(alone, ray_cast(grids, origins, rays[0], torch.ones_like(index), **CASE_WORLD))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty(device, shape):
    grids = torch.zeros(1, *CASE_SIZE, dtype=torch.uint8, device=device)
    origins = torch.zeros(shape[0], 3, device=device)
    hits = ray_cast(grids, origins, torch.zeros(shape[1], 3, device=device), **CASE_WORLD, with_entry=True)
    assert all(value.shape == shape for value in hits)


def refused(error, message, change=None, **options):
    case = dict(zip(["grids", "origins", "rays", "grid_index"], make_case(), strict=True))
    case |= {name: function(case[name]) for name, function in (change or {}).items()}
    with pytest.raises(error, match=message):
        ray_cast(*case.values(), **{**CASE_WORLD, **options})


def test_refusals():
    refused(TypeError, "grids must be one of torch.uint8, got torch.int64", {"grids": lambda t: t.long()})
    refused(ValueError, r"grids must have shape \(B, X, Y, Z\), got \(13, 22, 5\)", {"grids": lambda t: t[0]})
    refused(ValueError, "grids must hold 1 to .* voxels each", {"grids": lambda t: t[:, :0]})
    refused(ValueError, "grid_index is needed to choose from 2 grids", {"grid_index": lambda t: None})
    refused(ValueError, r"origins must have shape \(N, 3\) = \(6, 3\), got \(6, 2\)", {"origins": lambda t: t[:, :2]})
    refused(TypeError, "origins must be one of .*got torch.float16", {"origins": lambda t: t.half()})
    refused(ValueError, r"rays must have shape \(N, R, 3\) = \(6, 60, 3\), got \(5,", {"rays": lambda t: t[1:]})
    refused(ValueError, r"rays must have shape \(R, 3\), got \(3,\)", {"rays": lambda t: t[0, 0]})
    refused(ValueError, "rays must be on the device of grids", {"rays": lambda t: t.to("meta")})
    refused(TypeError, "grid_index must be one of .*got torch.float32", {"grid_index": lambda t: t.float()})
    refused(ValueError, r"grid_index must have shape \(N\) = \(6,\), got \(5,\)", {"grid_index": lambda t: t[1:]})
    refused(ValueError, "free_label must be 0 to 255, got 256", free_label=256)
    refused(ValueError, "low must be three finite numbers", low=(0, 0))
    refused(ValueError, "cell_size must be positive, got 0", cell_size=0)
    refused(ValueError, "max_steps must be at least 1, got 0", max_steps=0)


@compiled
def test_the_compiled_operator_checks_what_keeps_it_in_memory():
    grids, origins, rays, index = make_case()
    options = (FREE, [0.0, 0.0, 0.0], 0.4, 1001, False)
    for changed, message in [((grids, origins[:, :2], rays, index), "origins must be"),
                             ((grids, origins, rays[1:], index), "rays must be"),
                             ((grids, origins, rays, index[1:]), "grid_index must be"),
                             ((grids[:, :0], origins, rays, index), "voxels each")]:
        with pytest.raises(RuntimeError, match=f"ray_cast: .*{message}"):
            torch.ops.mmdet3d.ray_cast(*changed, *options)


@compiled
@pytest.mark.parametrize("with_entry", [False, True])
def test_registration(device, with_entry):
    arguments = (*make_case(device), FREE, [-0.8, 0.0, 0.4], 0.4, 1001, with_entry)
    torch.library.opcheck(torch.ops.mmdet3d.ray_cast.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.cuda
def test_cuda_equals_cpu_on_whole_scans():
    assert _library.built_with_cuda(), "the operators were built without CUDA kernels"
    grids = torch.stack([torch.from_numpy(hashed_grid()), torch.full((200, 200, 16), FREE, dtype=torch.uint8)])
    generator = torch.Generator().manual_seed(3)
    origins = (torch.rand(16, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor([78.0, 78.0, 8.0])
    case = (grids, origins, scan_rays(), torch.arange(16) % 2)
    assert_same(ray_cast(*(tensor.cuda() for tensor in case), **LABEL_WORLD, with_entry=True),
                ray_cast(*case, **LABEL_WORLD, with_entry=True))


def bench_sample():
    """One sample to evaluate: prediction, ground truth, flows, eight origins."""
    gt = hashed_grid()
    generator = np.random.default_rng(0)
    for _ in range(120):
        x, y, label = *generator.integers(0, 190, 2), generator.integers(0, FREE)
        gt[x:x + 8, y:y + 4, 1:6] = label
    flow = generator.normal(0, 3, (200, 200, 16, 2)).astype(np.float16)
    x = np.linspace(-38.5, 38.5, 8)
    origins = np.stack([x, 0.1 * x, np.full(8, 1.84)], axis=1)
    return np.roll(gt, 1, axis=0), gt, flow, np.roll(flow, 1, axis=0), origins


def bench_cases(device, dtype):
    """(name, fast, reference): one sample, prediction and ground truth seen from eight origins.

    The reference of the evaluation is the caster of ``ray_cast_baseline`` with counting in NumPy, its grids in host
    memory, as the reference evaluation has them. ``tools/bench_metric.py`` times many samples, read once.
    """
    import ray_cast_baseline

    from mmdet3d.datasets.metrics import RayMetric, lidar_rays

    pred, gt, pred_flow, gt_flow, origins = bench_sample()
    rays = lidar_rays()
    grids = torch.from_numpy(np.stack([pred, gt])).to(device)
    starts = torch.from_numpy(np.tile(origins, (2, 1))).to(device)
    case = (grids, starts, torch.from_numpy(rays).double().to(device),
            torch.arange(2, device=device).repeat_interleave(8))
    here = [torch.from_numpy(array).to(device) for array in (pred, gt, pred_flow, gt_flow)]
    metric = RayMetric("openocc", device=device)
    empty = metric.state_dict()

    def evaluate():
        metric.load_state_dict(empty)
        metric.add("a", here[0], here[1], origins, here[2], here[3])
        return metric.counts

    def evaluate_baseline():
        return ray_cast_baseline.evaluate(pred, gt, pred_flow, gt_flow, origins, rays, **LABEL_WORLD, device=device)

    def cast_baseline():
        return [ray_cast_baseline.cast(labels, origin, rays, **LABEL_WORLD, device=device)
                for labels in (pred, gt) for origin in origins]

    counts = evaluate()
    ours = np.stack([counts.gt, counts.pred, *counts.tp])[:, :FREE]
    np.testing.assert_array_equal(ours, evaluate_baseline())
    return [("ray_cast, 2 grids x 8 origins / baseline", lambda: ray_cast(*case, **LABEL_WORLD), cast_baseline),
            ("RayMetric.add and read, one sample / baseline", evaluate, evaluate_baseline)]
