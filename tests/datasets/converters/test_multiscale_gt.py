"""Coarse labels: against goldens, the real label and the rule written out block by block."""

from pathlib import Path

import numpy as np
import pytest
from loading import load_module

from mmdet3d.datasets.converters.multiscale_gt import downsample_labels, downsample_scales

downsample_literally = load_module(Path(__file__).with_name("literal_multiscale.py")).downsample_literally


def random_grid(shape, free, occupied, seed, classes=None, ignored=0.0, above=0.0):
    rng = np.random.default_rng(seed)
    grid = np.full(shape, free, np.uint8)
    mask = rng.random(shape) < occupied
    grid[mask] = rng.choice(classes if classes is not None else np.arange(free), mask.sum())
    grid[rng.random(shape) < ignored] = 255
    grid[rng.random(shape) < above] = free + 1
    return grid


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/pipeline_msgt.npz")


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_golden_grids(shared, golden, factor):
    label = shared / "data/nuscenes_real/gts/scene-unknown/29796060110c4163b07f06eff4af0753/labels.npz"
    with np.load(label) as content:
        semantics = content["semantics"]
    result = downsample_labels(semantics, factor, 17)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, golden[f"occ3d_ds{factor}"])
    np.testing.assert_array_equal(downsample_labels(golden["openocc_input"], factor, 16), golden[f"openocc_ds{factor}"])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_golden_thresholds(golden, factor):
    expected = golden[f"threshold_ds{factor}"]
    for count, wanted in enumerate(expected):
        block = np.full(factor**3, 16, np.uint8)
        block[:count] = 5
        assert downsample_labels(block.reshape((factor,) * 3), factor, 16).item() == wanted, count


def test_golden_tie(golden):
    block = golden["tie_input"].astype(np.uint8)
    assert downsample_labels(block.reshape(2, 2, 2), 2, 16).item() == golden["tie_output"].item() == 4


@pytest.mark.parametrize("factor, last_free", [(2, 0), (4, 3), (8, 25)])
def test_a_block_is_free_while_more_than_95_percent_are(factor, last_free):
    for filled, expected in ((last_free, 17), (last_free + 1, 3)):
        block = np.full(factor**3, 17, np.uint8)
        block[:filled] = 3
        assert downsample_labels(block.reshape((factor,) * 3), factor, 17).item() == expected


@pytest.mark.parametrize("factors", [(2, 4, 8), (4,), (1,), (1, 2)])
@pytest.mark.parametrize("free", [16, 17])
@pytest.mark.parametrize("options", [
    {"occupied": 0.05}, {"occupied": 0.6, "classes": [0, 3]}, {"occupied": 1.0, "ignored": 0.3},
    {"occupied": 0.3, "ignored": 0.9}, {"occupied": 0.2, "above": 0.3, "ignored": 0.1}, {"occupied": 0.0}])
def test_random_grids_equal_the_loop(factors, free, options):
    grid = random_grid((24, 32, 16), free, seed=len(factors), **options)
    before = grid.copy()
    for factor, result in zip(factors, downsample_scales(grid, factors, free), strict=True):
        np.testing.assert_array_equal(result, downsample_literally(grid, factor, free))
    np.testing.assert_array_equal(grid, before)


@pytest.mark.parametrize("shape, factor", [((6, 9, 3), 3), ((10, 5, 15), 5), ((6, 12, 18), 6), ((2, 6, 4), 2),
                                           ((14, 10, 22), 2), ((2, 4, 6), 1)])
def test_other_sizes_and_factors_equal_the_loop(shape, factor):
    for seed in range(4):
        grid = random_grid(shape, 17, 0.5, seed, ignored=0.2)
        np.testing.assert_array_equal(downsample_labels(grid, factor, 17), downsample_literally(grid, factor, 17))


@pytest.mark.parametrize("factor", [2, 4])
def test_blocks_of_ignored_labels_are_ignored(factor):
    grid = np.full((factor, factor, 3 * factor), 255, np.uint8)
    grid[..., factor:2 * factor] = 16
    grid[0, 0, factor:factor + factor // 2] = 255  # few enough at factor 4 for the block to stay free
    grid[0, 0, -1] = 16
    expected = [255, 255 if factor == 2 else 16, 255]
    assert downsample_labels(grid, factor, 16).ravel().tolist() == expected


def test_every_scale_comes_from_the_full_resolution():
    grid = np.full((4, 4, 4), 17, np.uint8)
    grid[:2] = 1  # half of the voxels, in four uniform blocks of eight
    grid[2:, :, 0] = 2  # 8 voxels, one third of each of the other four blocks, whose winner is 2
    fine, coarse = downsample_scales(grid, (2, 4), 17)
    assert fine[1, :, 0].tolist() == [2, 2] and coarse.item() == 1
    grid[2:, :, :2] = 2
    grid[:2, :, 1] = 17  # 1: 24 voxels in four blocks; 2: 16 voxels in two
    np.testing.assert_array_equal(downsample_labels(grid, 4, 17), downsample_literally(grid, 4, 17))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16, np.int32])
def test_integers_of_any_dtype(dtype):
    grid = random_grid((8, 4, 16), 16, 0.4, 1)
    np.testing.assert_array_equal(downsample_labels(grid.astype(dtype), 2, 16), downsample_labels(grid, 2, 16))
    strange = grid.astype(dtype)
    strange[0, :2] = -1 if np.dtype(dtype).kind == "i" else 300
    as_ignored = grid.copy()
    as_ignored[0, :2] = 255
    np.testing.assert_array_equal(downsample_labels(strange, 2, 16), downsample_labels(as_ignored, 2, 16))


def test_other_memory_orders():
    grid = random_grid((8, 12, 16), 17, 0.3, 2)
    expected = downsample_labels(grid, 4, 17)
    np.testing.assert_array_equal(downsample_labels(np.asfortranarray(grid), 4, 17), expected)
    np.testing.assert_array_equal(downsample_labels(grid[::-1], 4, 17), expected[::-1])


@pytest.mark.parametrize("factor", [(5, 5, 2), (2, 4, 8), (1, 3, 2)])
def test_blocks_with_sides_of_their_own(factor):
    grid = random_grid((30, 60, 16), 17, 0.08, 3, classes=[2, 5, 9], ignored=0.02)
    grid[:15] = 17
    expected = np.empty([size // side for size, side in zip(grid.shape, factor, strict=True)], np.uint8)
    for place in np.ndindex(*expected.shape):
        block = grid[tuple(slice(p * side, p * side + side) for p, side in zip(place, factor, strict=True))]
        votes = np.bincount(block[block < 17], minlength=17)
        winner = votes.argmax() if votes.any() else 255
        expected[place] = 17 if (block == 17).sum() > 0.95 * block.size else winner
    double = tuple(2 * side for side in factor)
    if any(size % side for size, side in zip(grid.shape, double, strict=True)):
        double = factor
    first, second = downsample_scales(grid, (factor, double), 17)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, downsample_labels(grid, double, 17))
    assert len(np.unique(expected)) > 2


@pytest.mark.parametrize("labels, factor, free, message", [
    (np.zeros((4, 4, 4)), 2, 17, "whole numbers, got float64"),
    (np.zeros((4, 4), np.uint8), 2, 17, r"\[X, Y, Z\], got shape \(4, 4\)"),
    (np.zeros((4, 6, 4), np.uint8), 4, 17, r"factor 4 does not divide the grid \(4, 6, 4\)"),
    (np.zeros((4, 4, 4), np.uint8), 0, 17, "factor 0"),
    (np.zeros((4, 4, 4), np.uint8), (2, 2), 17, r"factor \(2, 2\): expected one or three positive"),
    (np.zeros((4, 6, 4), np.uint8), (2, 4, 2), 17, r"factor \(2, 4, 2\) does not divide the grid \(4, 6, 4\)"),
    (np.zeros((4, 4, 4), np.uint8), 2, 255, "free_index: expected 1..254, got 255"),
])
def test_refusals(labels, factor, free, message):
    with pytest.raises((TypeError, ValueError), match=message):
        downsample_labels(labels, factor, free)
