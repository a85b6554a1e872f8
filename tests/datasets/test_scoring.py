"""Scores of samples, and of lists of results as a test loop gives them."""

import numpy as np
import pytest
import torch

from mmdet3d.datasets.labels import OCC3D, OPENOCC
from mmdet3d.datasets.metrics.coverage import CoverageError
from mmdet3d.datasets.metrics.ray_iou import RayMetric
from mmdet3d.datasets.metrics.rays import LABEL_GRID
from mmdet3d.datasets.scoring import (
    GroundTruth,
    SampleScorer,
    first_of_each,
    first_results,
    refine,
    score_results,
    summarise,
)

COARSE = (40, 20, 8)


def grids(seed, size=COARSE):
    """Labels, mostly free, and flow."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 17, size, generator=generator, dtype=torch.uint8)
    labels = torch.where(torch.rand(size, generator=generator) < 0.9, torch.tensor(16, dtype=torch.uint8), labels)
    return labels, torch.randn(*size, 2, generator=generator).half()


def truth(index):
    semantics, flow = grids(index)
    return GroundTruth(index, f"token-{index}", semantics, flow, None, np.array([[0.3, 0.2, 1.1], [4.0, -3.0, 1.0]]))


def test_refining_repeats_blocks():
    grid = torch.arange(24).view(2, 3, 4)
    fine = refine(grid, (4, 9, 4))
    assert fine.shape == (4, 9, 4)
    for x, y, z in ((0, 0, 0), (1, 2, 3), (3, 8, 1), (2, 3, 2)):
        assert fine[x, y, z] == grid[x // 2, y // 3, z]
    flow = torch.randn(2, 3, 4, 2)
    assert torch.equal(refine(flow, (2, 6, 8))[1, 5, 7], flow[1, 2, 3])
    assert refine(grid, (2, 3, 4)) is grid
    with pytest.raises(ValueError, match=r"the labels' grid \(4, 8, 4\) \(X, Y, Z\) is no multiple of \(2, 3, 4\)"):
        refine(grid, (4, 8, 4))


def test_a_score_is_that_of_the_metric_alone():
    scorer, pred, flow = SampleScorer(OPENOCC), *grids(7)
    scorer(truth(0), pred, flow)
    score, second = scorer(truth(1), pred, flow), truth(1)
    size = LABEL_GRID.size_xyz
    metric = RayMetric(OPENOCC)
    metric.add("token-1", refine(pred, size), refine(second.semantics, size), second.origins, refine(flow, size),
               refine(second.flow, size))
    wanted = metric.state_dict()
    for name in ("gt", "pred", "tp", "flow_error", "flow_rays"):
        np.testing.assert_array_equal(score.rays[name], wanted[name])
    assert (score.index, score.token, score.rays["tokens"]) == (1, "token-1", ["token-1"])
    assert np.asarray(score.voxels["confusion"]).sum() == pred.numel() and wanted["gt"].sum() > 1000


def test_the_mask_of_occ3d_counts_for_voxels():
    pred, _ = grids(1)
    mask = (torch.arange(pred.numel()).view(COARSE) % 3 == 0).to(torch.uint8)
    semantics = grids(2)[0]
    scorer = SampleScorer(OCC3D)
    score = scorer(GroundTruth(0, "a", semantics, None, mask, np.zeros((1, 3))), pred, torch.ones(*COARSE, 2))
    assert np.asarray(score.voxels["confusion"]).sum() == mask.sum()
    assert not np.asarray(score.rays["flow_error"]).any()


def test_errors_name_the_sample():
    with pytest.raises(ValueError, match="sample token-0: the labels' grid"):
        SampleScorer(OPENOCC)(truth(0), torch.zeros(7, 20, 8, dtype=torch.uint8), None)
    with pytest.raises(TypeError, match="sample token-0: pred_semantics must hold integer labels"):
        SampleScorer(OPENOCC)(truth(0), torch.zeros(COARSE), None)


def test_the_order_of_scores_decides_the_sum_only_by_rounding():
    scorer, pred, flow = SampleScorer(OPENOCC), *grids(9)
    scores = [scorer(truth(index), pred, flow) for index in range(3)]
    tokens = [score.token for score in scores]
    one, other = (summarise(part, OPENOCC, tokens) for part in (scores, scores[::-1]))
    assert one.rays["rays"] == other.rays["rays"] and one.rays["mAVE"] == pytest.approx(other.rays["mAVE"], rel=1e-12)
    assert "MIOU:" in one.table() and set(one.headline) == {"miou", "mave"}
    voxels = summarise(scores, OPENOCC, tokens, "miou")
    assert voxels.headline == {"miou": voxels.voxels["miou"]} and "===> mIoU of 3 samples" in voxels.table()
    assert [score.index for score in first_of_each([scores[2], scores[0], scores[2]])] == [2, 0]


# ---- results of a test loop -----------------------------------------------------------------------------------------


def result(*indices, seed=0):
    labels, flow = zip(*(grids(seed + index) for index in indices), strict=True)
    return {"occ_results": torch.stack(labels).numpy(), "flow_results": torch.stack(flow).numpy(),
            "index": list(indices)}


def test_the_first_result_of_a_sample_counts():
    found = list(first_results([result(1, 0), result(0, 2, seed=5)], 3))
    assert [index for index, _, _ in found] == [1, 0, 2]
    np.testing.assert_array_equal(found[1][1], grids(0)[0].numpy())
    np.testing.assert_array_equal(found[2][2], grids(7)[1].numpy())


@pytest.mark.parametrize("change, message", [
    (lambda r: r.pop("index"), r"results\[0\] lacks \['index'\]"),
    (lambda r: r.update(index=[0]), r"results\[0\] has different numbers of samples"),
    (lambda r: r.update(index=[0, 3]), r"sample index 3 is not in 0\.\.2"),
])
def test_results_that_do_not_fit(change, message):
    wrong = result(0, 1)
    change(wrong)
    with pytest.raises(ValueError, match=message):
        list(first_results([wrong], 3))


def test_results_of_all_samples_are_needed():
    source = [truth(n) for n in range(3)]

    class Data:
        labels, eval_metric = OPENOCC, "rayiou"
        data_infos = [{"token": f"token-{n}"} for n in range(3)]

        def __len__(self):
            return 3

    summary = score_results(Data(), [result(2, 0), result(1)], source)
    assert summary.rays["samples"] == 3 and summary.rays["RayIoU"] == 1.0 and summary.rays["mAVE"] == 0.0
    with pytest.raises(CoverageError, match="1 of 3 samples are missing: token-1"):
        score_results(Data(), [result(2, 0)], source)
    assert score_results(Data(), [result(2, 0)], source, allow_missing=True).missing == ("token-1",)
