"""Predictions in a folder score like those that were scored as they appeared, counter by counter."""

import evaluation_case as case
import numpy as np
import pytest
import torch

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.lidar_origins import LidarOrigins
from mmdet3d.datasets.metrics.files import FileEvaluation, find_samples
from mmdet3d.datasets.scoring import GroundTruthSource, SampleScorer, in_order, summarise
from mmdet3d.utils.files import prediction_path, save_prediction

pytestmark = pytest.mark.usefixtures("one_thread")
TREES = {"openocc": "openocc_v2", "occ3d": "gts"}
COARSE = (5, 5, 2)


def predict(truth):
    """A prediction that is partly right, and its flow, which is of everywhere."""
    generator = torch.Generator().manual_seed(truth.index)
    wrong = torch.rand(truth.semantics.shape, generator=generator) < 0.05
    semantics = torch.where(wrong, truth.semantics.roll(3, 0), truth.semantics).roll(1, 1)
    return semantics, torch.randn(*semantics.shape, 2, generator=generator).half()


@pytest.fixture(scope="module", params=[(name, blocks) for name in TREES for blocks in (COARSE, (1, 1, 1))],
                ids=lambda param: f"{param[0]}-{'fine' if param[1] == (1, 1, 1) else 'coarse'}")
def scored(request, tiny_world, tmp_path_factory):
    """Data set, folder of predictions, and their scores as an evaluation of a model computes them."""
    name, blocks = request.param
    data = case.dataset(tiny_world, dataset_name=name, label_options={"coarsen": blocks})
    folder, truth, scorer = tmp_path_factory.mktemp("pred"), GroundTruthSource(data), SampleScorer(data.labels)
    scores = []
    for index, info in enumerate(data.data_infos):
        semantics, flow = predict(truth[index])
        scores.append(scorer(truth[index], semantics, flow))
        path = prediction_path(folder, info["occ_path"].split("/")[-2], info["token"])
        save_prediction(path, semantics.numpy(), flow.numpy())
    tokens = [score.token for score in scores]
    return data, folder, tiny_world / TREES[name], scores, summarise(scores, data.labels, tokens)


def jobs_of(scored):
    data, folder, truth = scored[:3]
    origins = LidarOrigins(data.data_infos)
    found, missing = find_samples(data.data_infos, folder, truth)
    assert not missing
    return [(files, origins[files.index]) for files in found]


def test_a_folder_has_the_counters_of_the_evaluation(scored, device):
    data, *_, expected, total = scored
    jobs = jobs_of(scored)
    evaluation = FileEvaluation(data.labels.name, data.ground_truth(0)["semantics"].shape, device)
    evaluation.check_itself(jobs[0])
    scores = in_order(evaluation(job) for job in jobs[::-1])
    for one, other in zip(scores, expected, strict=True):
        assert (one.index, one.token) == (other.index, other.token)
        np.testing.assert_equal(one.rays, other.rays)
        np.testing.assert_equal(one.voxels, other.voxels)
    summary = summarise(scores, data.labels, [files.token for files, _ in jobs])
    np.testing.assert_equal(summary.counters, total.counters)
    assert summary.rays["rays"] > 10000 and 0.05 < summary.rays["RayIoU"] < 0.95 and summary.voxels["miou"] > 1
    if data.labels.name == "openocc":
        assert summary.rays["flow_rays"] > 50 and summary.moving["rays"] > 0
    else:
        assert summary.moving["rays"] == 0 and summary.rays["mAVE"] == 0


def test_without_flow_the_prediction_stands_still(scored):
    data, *_, expected, _ = scored
    files, origins = jobs_of(scored)[0]
    evaluation = FileEvaluation(data.labels.name, data.ground_truth(0)["semantics"].shape)
    truth, semantics, _ = evaluation.read(files, origins)
    without = evaluation.score(files, truth, semantics, None)
    still = evaluation.score(files, truth, semantics, np.zeros((*semantics.shape, 2), np.float32))
    np.testing.assert_equal(without.rays, still.rays)
    moves = data.labels.name == "openocc"
    assert bool((without.rays["flow_error"] != expected[0].rays["flow_error"]).any()) is moves
    assert bool(np.any(without.rays["flow_error"])) is moves


def test_all_predictions_have_the_size_of_the_first(scored):
    data, *_ = scored
    files, origins = jobs_of(scored)[0]
    evaluation = FileEvaluation(data.labels.name, (100, 100, 8))
    with pytest.raises(DataError, match=rf"{files.token}.npz: semantics must have shape \(100, 100, 8\).*, got uint8"):
        evaluation((files, origins))
