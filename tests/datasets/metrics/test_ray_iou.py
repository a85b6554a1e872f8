"""RayIoU: published numbers of a constructed case, golden rows, merging, coverage, refusals, memory."""

import gc
import hashlib
import pickle
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from mmdet3d.datasets.labels import OCC3D, OPENOCC
from mmdet3d.datasets.metrics import LABEL_GRID, RayMetric, lidar_rays
from mmdet3d.datasets.metrics.coverage import CoverageError
from mmdet3d.datasets.metrics.hit_cache import HitCache
from mmdet3d.datasets.metrics.ray_scores import format_table
from mmdet3d.structures import VoxelGrid

SMALL = VoxelGrid((-4.0, -2.0, -1.0), (4.0, 3.2, 2.2), (0.4, 0.4, 0.4))  # 20 x 13 x 8


def shifted_case():
    """A floor and scattered voxels; the prediction is one voxel ahead; true flow but no predicted one."""
    x, y, z = np.meshgrid(np.arange(200), np.arange(200), np.arange(16), indexing="ij")
    code = ((x * 73856093) ^ (y * 19349663) ^ (z * 83492791)) % 2**32
    gt = np.where(code % 211 == 0, code % 10, 16)
    gt[..., 0] = 10
    pred = np.full_like(gt, 16)
    pred[1:] = gt[:-1]
    flow = np.stack([0.1 * (x % 7), -0.2 * (y % 5)], -1).astype(np.float16)
    origins = np.array([[0.9858, 0, 1.8402], [3.0, -2.0, 1.5]])
    return pred.astype(np.uint8), gt.astype(np.uint8), origins, np.zeros_like(flow), flow


def small_case(seed, labels=OPENOCC, origins=3):
    """A few random boxes and flows on the small grid."""
    rng = np.random.default_rng(seed)
    gt = np.full(SMALL.size_xyz, labels.free_index, np.uint8)
    gt[..., 0] = 11
    for _ in range(12):
        x, y = rng.integers(0, 18), rng.integers(0, 11)
        gt[x:x + 2, y:y + 2, 1:4] = rng.integers(0, labels.free_index)
    pred = np.roll(gt, rng.integers(0, 2), axis=0)
    flows = rng.normal(0, 2, (2, *SMALL.size_xyz, 2)).astype(np.float16)
    return pred, gt, rng.uniform(-1, 1, (origins, 3)), flows[0], flows[1]


def assert_same_counts(first, second):
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_rays():
    rays = lidar_rays()
    assert rays.shape == (14040, 3) and rays.dtype == np.float32
    digest = hashlib.sha256(rays.tobytes()).hexdigest()
    assert digest == "51ea8101c0347a7e49b78ea9f881252812a15ebc8a20f8922e97fc6e41e989c7"
    rays[0] = 0
    assert lidar_rays()[0].any(), "callers must not share the array"


@pytest.mark.parametrize("as_tensors", [False, True])
def test_known_numbers(device, as_tensors):
    pred, gt, origins, pred_flow, gt_flow = shifted_case()
    metric = RayMetric("openocc", device=None if as_tensors else device)
    arrays = [torch.from_numpy(a).to(device) if as_tensors else a for a in (pred, gt, pred_flow, gt_flow)]
    metric.add("a", arrays[0], arrays[1], origins, arrays[2], arrays[3])
    counts, result = metric.counts, metric.result()
    assert counts.gt[:11].tolist() == [865, 943, 934, 916, 974, 1072, 966, 940, 1168, 1002, 7693]
    assert counts.pred.tolist() == [640, 773, 627, 683, 684, 814, 694, 710, 908, 700, 7739, 0, 0, 0, 0, 0, 2501]
    assert counts.tp[:, :11].tolist() == [
        [365, 428, 363, 354, 406, 482, 425, 389, 480, 330, 6731],
        [367, 428, 366, 354, 407, 485, 425, 389, 480, 330, 6731],
        [373, 431, 366, 365, 407, 487, 425, 391, 482, 360, 6731]]
    assert result["rays"] == 17473 and result["flow_rays"] == counts.tp[1, :8].sum()
    expected = {"RayIoU@1": 0.35226206489707096, "RayIoU@2": 0.3531280961548617, "RayIoU@4": 0.3581222364962232,
                "RayIoU": 0.35450413251605195, "mAVE": 0.5305728062702599, "occ_score": 0.36599643863742076}
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=1e-9)
    assert (result["miou"], result["mave"]) == (result["RayIoU"], result["mAVE"])
    speeds = [result["classes"][name]["AVE"] for name in OPENOCC.classes[:8]]
    known = [0.574917, 0.498649, 0.553757, 0.476507, 0.500358, 0.485386, 0.551637, 0.603371]
    np.testing.assert_allclose(speeds, known, atol=5e-7)
    assert np.isnan(result["classes"]["sidewalk"]["IoU@1"]) and np.isnan(result["classes"]["barrier"]["AVE"])


def golden_cases(shared):
    sys.path.insert(0, str(shared / "golden"))
    try:
        import fill
    finally:
        sys.path.pop(0)
    return fill.make_ray_metric_case(seed=0, samples=4)


def test_golden_rows_and_result(shared, device):
    golden = np.load(shared / "golden/rays_openocc.npz")
    np.testing.assert_array_equal(golden["rays"], lidar_rays())
    metric = RayMetric("openocc", device=device)
    for number, case in enumerate(golden_cases(shared)):
        metric.add(str(number), case["sem_pred"], case["sem_gt"], case["origins"], case["flow_pred"], case["flow_gt"])
        grids = torch.stack([torch.from_numpy(case[name]).to(device) for name in ("sem_pred", "sem_gt")])
        voxels, distances = metric._cast(grids, case["origins"])
        for row, kind in enumerate(("pred", "gt")):
            expected, voxel = golden[f"{kind}_{number}"], voxels[row].cpu().numpy()
            distance = distances[row].cpu().numpy()
            np.testing.assert_array_equal(case[f"sem_{kind}"].reshape(-1)[voxel], expected[:, 3])
            np.testing.assert_array_equal(distance, expected[:, 4])
            np.testing.assert_array_equal(case[f"flow_{kind}"].reshape(-1, 2)[voxel], expected[:, 5:])
            points = case["origins"][:, None] + distance.reshape(-1, 14040, 1) * lidar_rays()
            np.testing.assert_allclose(points.reshape(-1, 3), expected[:, :3], atol=1e-4)
    result = metric.result()
    np.testing.assert_allclose([result[key] for key in ("RayIoU", "mAVE", "occ_score")], golden["result"], atol=1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("as_tensors", [False, True])
def test_cuda_counts_equal_those_of_the_cpu_bit_for_bit(as_tensors):
    metrics = [RayMetric("openocc", grid=SMALL, device=device) for device in ("cpu", "cuda")]
    for seed in range(6):
        pred, gt, origins, *flows = small_case(seed)
        metrics[0].add(str(seed), pred, gt, origins, *flows)
        if as_tensors:
            pred, gt, *flows = (torch.from_numpy(array).cuda() for array in (pred, gt, *flows))
        metrics[1].add(str(seed), pred, gt, origins, *flows)
    assert_same_counts(metrics[0].counts, metrics[1].counts)


@pytest.mark.cuda
@pytest.mark.parametrize("as_tensors", [False, True])
def test_adding_does_not_wait_for_the_gpu(as_tensors):
    metric = RayMetric("openocc", grid=SMALL, device="cuda")
    samples = []
    for seed in range(4):
        pred, gt, origins, *flows = small_case(seed)
        if as_tensors:
            pred, gt, *flows = (torch.from_numpy(array).cuda() for array in (pred, gt, *flows))
        samples.append((pred, gt, origins, *flows))
    metric.add("first", *samples[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, sample in enumerate(samples):
            metric.add(str(number), *sample)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.result()["samples"] == 5


@pytest.mark.cuda
@pytest.mark.parametrize("position, value, message", [
    (0, 17, "pred_semantics holds label 17; .* [(]sample b"), (1, 255, "gt_semantics holds label 255; .* [(]sample b"),
    (3, np.nan, "pred_flow is not finite where [0-9]+ of [0-9]+ true-positive rays hit [(]sample b"),
])
def test_what_is_wrong_on_a_gpu_is_told_when_it_is_asked(position, value, message):
    metric, other = RayMetric("openocc", grid=SMALL, device="cuda"), RayMetric("openocc", grid=SMALL)
    empty, case = metric.state_dict(), list(small_case(3))
    metric.add("a", *case)
    metric.add("b", *(np.full_like(array, value) if i == position else array for i, array in enumerate(case)))
    metric.add("c", *small_case(4))
    for ask in (metric.settle, metric.result, metric.state_dict, lambda: metric.counts, lambda: other.merge(metric),
                lambda: metric.merge(other)):
        with pytest.raises(ValueError, match=message):
            ask()
    assert len(other.coverage) == 0
    metric.load_state_dict(empty)
    metric.add("a", *case)
    assert metric.result()["samples"] == 1


def test_ground_truth_against_itself_is_perfect():
    _, gt, origins, _, flow = small_case(1)
    metric = RayMetric("openocc", grid=SMALL)
    metric.add("a", gt, gt, origins, flow, flow)
    result = metric.result()
    assert (result["RayIoU"], result["mAVE"], result["occ_score"]) == (1.0, 0.0, 1.0)


def test_occ3d_has_no_flow_and_scores_a_tenth_for_it():
    pred, gt, origins, *_ = small_case(2, OCC3D)
    metric = RayMetric(OCC3D, grid=SMALL)
    metric.add("a", pred, gt, origins)
    result = metric.result()
    assert result["mAVE"] == 0.0 and result["occ_score"] == pytest.approx(0.9 * result["RayIoU"] + 0.1)


def test_merging_in_any_way_is_the_same():
    whole = RayMetric("openocc", grid=SMALL)
    parts = [RayMetric("openocc", grid=SMALL) for _ in range(3)]
    for seed in range(6):
        whole.add(str(seed), *small_case(seed))
        parts[seed % 3].add(str(seed), *small_case(seed))
    total = RayMetric("openocc", grid=SMALL)
    total.load_state_dict(pickle.loads(pickle.dumps(parts[0].state_dict())))
    total.merge(parts[2])
    total.merge(parts[1])
    whole.counts.flow_error, kept = whole.counts.flow_error.round(9), whole.counts.flow_error
    total.counts.flow_error = total.counts.flow_error.round(9)
    assert_same_counts(whole.counts, total.counts)
    whole.counts.flow_error = kept
    total.check_coverage([str(seed) for seed in range(6)])
    assert whole.result()["RayIoU"] == total.result()["RayIoU"] and total.result()["samples"] == 6


def test_coverage_lists_tokens():
    metric = RayMetric("openocc", grid=SMALL)
    metric.add("a", *small_case(0))
    before = pickle.dumps(metric.state_dict())
    with pytest.raises(CoverageError, match="sample a was added twice"):
        metric.add("a", *small_case(1))
    other = RayMetric("openocc", grid=SMALL)
    other.add("a", *small_case(1))
    with pytest.raises(CoverageError, match="1 samples were added twice: a"):
        metric.merge(other)
    assert pickle.dumps(metric.state_dict()) == before
    with pytest.raises(CoverageError, match="7 of 8 samples are missing: b, c, d, e, f and 2 more"):
        metric.check_coverage(list("abcdefgh"))
    with pytest.raises(CoverageError, match="1 samples do not belong to the split: a"):
        metric.check_coverage([])
    with pytest.raises(ValueError, match="cannot merge a metric of occ3d"):
        metric.merge(RayMetric("occ3d", grid=SMALL))
    with pytest.raises(ValueError, match="other classes or another grid"):
        metric.load_state_dict(RayMetric("occ3d", grid=SMALL).state_dict())
    with pytest.raises(ValueError, match="a RayMetric state has"):
        metric.load_state_dict({})


def test_no_origins_count_the_sample_only():
    metric = RayMetric("openocc", grid=SMALL)
    pred, gt, _, *flows = small_case(0)
    metric.add("a", pred, gt, np.zeros((0, 3)), *flows)
    result = metric.result()
    assert (result["samples"], result["rays"]) == (1, 0) and np.isnan(result["RayIoU"])


def test_rays_that_see_nothing_count_as_the_corner_voxel():
    pred, gt, _, *flows = small_case(0)
    for corner, rays in ((OPENOCC.free_index, 0), (5, 14040)):
        gt[0, 0, 0] = pred[0, 0, 0] = corner
        metric = RayMetric("openocc", grid=SMALL)
        metric.add("a", pred, gt, np.array([[0.0, 0.0, 900.0]]), *flows)
        assert metric.result()["rays"] == rays == metric.counts.gt[5] == metric.counts.tp[0, 5]


def test_flows_that_are_not_finite():
    pred, gt, origins, pred_flow, gt_flow = small_case(3)
    metric = RayMetric("openocc", grid=SMALL)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="pred_flow is not finite where [0-9]+ of [0-9]+ true-positive rays"):
            metric.add("a", pred, gt, origins, np.full_like(pred_flow, value), gt_flow)
    assert metric.counts.gt.sum() == 0
    metric.add("a", pred, gt, origins, pred_flow, np.full_like(gt_flow, np.nan))
    assert np.isnan(metric.result()["mAVE"]) and np.isfinite(metric.result()["RayIoU"])
    beyond_float16 = RayMetric("openocc", grid=SMALL)
    beyond_float16.add("a", pred, gt, origins, pred_flow, np.full(gt_flow.shape, 1e30))
    assert np.isinf(beyond_float16.result()["mAVE"]) and beyond_float16.result()["occ_score"] > 0


@pytest.mark.parametrize("position, change, error, message", [
    (0, lambda a: a[1:], ValueError, r"pred_semantics must have shape \(X, Y, Z\) = \(20, 13, 8\), got \(19, 13, 8\)"),
    (0, lambda a: a.astype(np.float32), TypeError, "pred_semantics must hold integer labels, got torch.float32"),
    (0, lambda a: np.where(a == 16, 17, a), ValueError, "pred_semantics holds label 17; .* labels 0 to 16"),
    (1, lambda a: np.where(a == 16, -1, a).astype(np.int64), ValueError, "gt_semantics holds label"),
    (1, lambda a: np.full_like(a, 255), ValueError, "gt_semantics holds label 255"),
    (2, lambda a: a[:, :2], ValueError, r"origins must have shape \(T, 3\), got \(3, 2\)"),
    (2, lambda a: a * np.nan, ValueError, "origins must be finite"),
    (3, lambda a: a[..., :1], ValueError, r"pred_flow must have shape \(X, Y, Z, 2\)"),
    (4, lambda a: a.astype(np.int32), TypeError, "gt_flow must hold floating point numbers"),
])
def test_refusals(position, change, error, message):
    case = list(small_case(0))
    case[position] = change(case[position])
    metric = RayMetric("openocc", grid=SMALL)
    with pytest.raises(error, match=message):
        metric.add("a", *case)
    assert len(metric.coverage) == 0


def test_wide_labels_are_accepted():
    pred, gt, *rest = small_case(4)
    metrics = [RayMetric("openocc", grid=SMALL) for _ in range(2)]
    metrics[0].add("a", pred, gt, *rest)
    metrics[1].add("a", pred.astype(np.int64), gt.astype(np.int32), *rest)
    assert_same_counts(metrics[0].counts, metrics[1].counts)


def test_random_labels_and_places_never_fail():
    rng = np.random.default_rng(0)
    for number in range(20):
        metric = RayMetric("openocc", grid=SMALL)
        pred, gt = rng.integers(0, 17, (2, *SMALL.size_xyz)).astype(np.uint8)
        metric.add("a", pred, gt, rng.uniform(-1, 1, (rng.integers(0, 4), 3)) * 10.0 ** rng.integers(0, 9))
        assert 0 <= np.nan_to_num(metric.result()["RayIoU"]) <= 1, number


@pytest.mark.slow
def test_the_state_stays_small():
    tiny = VoxelGrid((-0.8, -0.4, 0.0), (0.8, 0.8, 0.8), (0.4, 0.4, 0.4))
    metric, rng = RayMetric("openocc", grid=tiny), np.random.default_rng(0)
    tracemalloc.start()
    for number in range(1000):
        labels = rng.integers(0, 17, (2, *tiny.size_xyz)).astype(np.uint8)
        flows = rng.normal(0, 2, (2, *tiny.size_xyz, 2)).astype(np.float16)
        metric.add(f"{number:032x}", *labels, np.zeros((1 + number % 2, 3)), *flows)
        if number == 99:
            after_warm_up = tracemalloc.get_traced_memory()[0]
    gc.collect()  # empties the interpreter's own stores of small objects
    grown = tracemalloc.get_traced_memory()[0] - after_warm_up
    tracemalloc.stop()
    assert grown < 900 * 200, "only the tokens may be kept"
    whole = RayMetric("openocc")
    for number in range(6019):
        whole.coverage.claim(f"{number:032x}")
    assert len(pickle.dumps(whole.state_dict())) < 2**20
    tokens = sum(sys.getsizeof(token) for token in whole.coverage.tokens) + sys.getsizeof(whole.coverage._tokens)
    assert tokens + sum(array.nbytes for array in vars(whole.counts).values()) < 2**20


@pytest.mark.cuda
def test_the_memory_of_a_gpu_does_not_grow():
    metric = RayMetric("openocc", grid=SMALL, device="cuda")
    for number in range(1000):
        metric.add(f"{number:032x}", *small_case(number % 7, origins=1 + number % 8))
        if number == 99:
            torch.cuda.synchronize()
            after_warm_up = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= after_warm_up and metric.result()["samples"] == 1000


def test_cached_hits_change_nothing_and_depend_on_everything(tmp_path):
    cache = HitCache(tmp_path / "cache")
    plain = RayMetric("openocc", grid=SMALL)
    for _ in range(3):
        cached = RayMetric("openocc", grid=SMALL, cache=cache)
        for seed in range(2):
            cached.add(str(seed), *small_case(seed))
        files = sorted((tmp_path / "cache").rglob("*.npz"))
        assert len(files) == 2
        files[0].write_bytes(files[0].read_bytes()[:1000])  # damaged files count as absent
    for seed in range(2):
        plain.add(str(seed), *small_case(seed))
    assert_same_counts(plain.counts, cached.counts)
    _, gt, origins, *_ = small_case(0)
    keys = {cache.key(gt, origins, 16, SMALL), cache.key(gt, origins, 17, SMALL),
            cache.key(gt, origins + 1e-9, 16, SMALL), cache.key(np.roll(gt, 1), origins, 16, SMALL),
            cache.key(gt, origins, 16, LABEL_GRID), cache.key(gt, origins[:2], 16, SMALL)}
    assert len(keys) == 6


def test_random_bytes_in_the_cache_count_as_absent(tmp_path):
    cache, rng = HitCache(tmp_path), np.random.default_rng(2)
    key = "ab" * 32
    voxel, distance = np.arange(40, dtype=np.int32), np.arange(40, dtype=np.float32)
    cache.save(key, voxel, distance)
    good = cache._path(key).read_bytes()
    absent = 0
    for number in range(200):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
        cache._path(key).write_bytes(data[: None if number % 3 else rng.integers(0, len(data))].tobytes())
        found = cache.load(key, 40, 40)
        absent += found is None
        assert found is None or all(len(array) == 40 for array in found)
    np.savez(cache._path(key), voxel=voxel)
    assert cache.load(key, 40, 40) is None and absent > 100
    cache._path(key).write_bytes(good)
    np.testing.assert_array_equal(cache.load(key, 40, 40)[0], voxel)
    assert cache.load(key, 40, 39) is None and cache.load(key, 41, 40) is None


def test_flows_of_any_kind_end():
    rng = np.random.default_rng(0)
    kinds = [np.nan, np.inf, -np.inf, 6e4, 1e30, -1e300, 0.0]
    for number in range(30):
        pred, gt, origins, *_ = small_case(number % 4)
        dtypes = [np.float16, np.float32, np.float64]
        with np.errstate(over="ignore"):
            flows = [rng.choice(kinds, (*SMALL.size_xyz, 2)).astype(dtypes[(number + i) % 3]) for i in range(2)]
        metric = RayMetric("openocc", grid=SMALL)
        with pytest.raises(ValueError, match="pred_flow is not finite"):
            metric.add("a", pred, gt, origins, *flows)
        metric.add("a", pred, gt, origins, np.nan_to_num(flows[0]), flows[1])
        assert 0 < metric.result()["RayIoU"] <= 1 and len(metric.coverage) == 1


def test_table():
    metric = RayMetric("openocc", grid=SMALL)
    metric.add("a", *small_case(0))
    result = metric.result()
    lines = format_table(result).split("\n")
    assert lines[1] == "|     Class Names      | IoU@1 | IoU@2 | IoU@4 |  AVE  |"
    assert len({len(line) for line in lines[:22]}) == 1 and lines[3].startswith("|         car          |")
    assert lines[18].startswith("|      vegetation      |") and lines[20].startswith("|         MEAN         |")
    assert lines[22:] == [f"MIOU: {result['RayIoU']!r}", f"MAVE: {result['mAVE']!r}",
                          f"Occ score: {result['occ_score']!r}"]
    prettytable = pytest.importorskip("prettytable")
    table = prettytable.PrettyTable(["Class Names", "IoU@1", "IoU@2", "IoU@4", "AVE"])
    table.float_format = ".3"
    for name, row in result["classes"].items():
        table.add_row([name, *(row[key] for key in ("IoU@1", "IoU@2", "IoU@4", "AVE"))],
                      divider=name == "vegetation")
    table.add_row(["MEAN", *(result[f"RayIoU@{key}"] for key in (1, 2, 4)), result["mAVE"]])
    assert table.get_string().split("\n") == lines[:22]


def test_the_constructed_case_is_the_intended_one():
    histogram = np.bincount(shifted_case()[1].reshape(-1), minlength=17)
    assert histogram[:11].tolist() == [278, 288, 274, 288, 341, 299, 277, 289, 304, 264, 40000]
