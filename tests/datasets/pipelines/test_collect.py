"""Compose, annotations and the end of a pipeline."""

import copy

import numpy as np
import pytest
import torch
from mmcv.parallel import DataContainer, collate

from mmdet3d.datasets.builder import build_pipeline
from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.pipelines.annotations import LiDARBoxes, LoadAnnotations
from mmdet3d.datasets.pipelines.collect import Collect3D, DefaultFormatBundle3D, MultiScaleFlipAug3D
from mmdet3d.datasets.pipelines.compose import Compose, generator
from mmdet3d.registry import PIPELINES, ConfigError


def test_steps_run_in_order_and_errors_name_their_place():
    pipeline = Compose([lambda results: {**results, "a": 2}, lambda results: {"b": results["a"] * 3}])
    assert pipeline({"a": 1}) == {"b": 6}
    with pytest.raises(ConfigError, match=r"pipeline\[1\]: Collect3D takes no \['key'\] \(did you mean 'keys'\?\)"):
        build_pipeline([{"type": "LoadAnnotations"}, {"type": "Collect3D", "key": ["img"]}])
    with pytest.raises(ConfigError, match=r"pipeline\[0\].type: 'LoadAnnotation' is not registered .*LoadAnnotations"):
        build_pipeline([{"type": "LoadAnnotation"}])
    inner = {"type": "MultiScaleFlipAug3D", "transforms": [{"type": "Collect3D", "keys": [], "extra": 1}]}
    with pytest.raises(ConfigError, match=r"pipeline\[0\].transforms\[0\]: Collect3D takes no \['extra'\]"):
        build_pipeline([inner])


def test_a_list_among_the_steps_stands_for_them():
    pipeline = Compose([{"type": "LoadAnnotations"}, [{"type": "LoadAnnotations"}, [dict]], dict])
    assert [type(step).__name__ for step in pipeline] == ["LoadAnnotations"] * 2 + ["type"] * 2
    with pytest.raises(ConfigError, match=r"^pipeline\[1\]\[0\]: LoadAnnotations takes no \['boxes'\]"):
        Compose([dict, [{"type": "LoadAnnotations", "boxes": 3}]])


def test_steps_of_mmdet_can_be_used():
    step = PIPELINES.build({"type": "Resize", "img_scale": (4, 3)})
    assert type(step).__module__.startswith("mmdet.")


def test_all_steps_of_a_nested_pipeline_are_listed():
    pipeline = build_pipeline([{"type": "LoadAnnotations"}, {"type": "MultiScaleFlipAug3D", "transforms": [
        {"type": "DefaultFormatBundle3D"}, {"type": "Collect3D", "keys": []}]}])
    assert [type(step).__name__ for step in pipeline] == [
        "LoadAnnotations", "MultiScaleFlipAug3D", "DefaultFormatBundle3D", "Collect3D"]


def test_random_draws_come_from_the_sample_or_the_global_generator():
    rng = np.random.RandomState(4)
    assert generator({"rng": rng}) is rng
    np.random.seed(7)  # noqa: NPY002
    assert generator({}).uniform() == generator({"rng": np.random.RandomState(7)}).uniform()


def test_annotations():
    boxes = [np.arange(1.0, 10), np.arange(2.0, 11)]
    results = LoadAnnotations()({"ann_infos": (boxes, [4, 9])})
    tensor = results["gt_bboxes_3d"].tensor
    assert tensor.dtype == torch.float32 and len(results["gt_bboxes_3d"]) == 2
    assert tensor[:, 2].tolist() == [3 - 3.0, 4 - 3.5] and tensor[1, 3:].tolist() == [5, 6, 7, 8, 9, 10]
    assert results["gt_labels_3d"].dtype == np.int64 and results["gt_labels_3d"].tolist() == [4, 9]
    assert boxes[0][2] == 3
    empty = LoadAnnotations()({"ann_infos": ([], [])})
    assert empty["gt_bboxes_3d"].tensor.shape == (0, 9) and empty["gt_labels_3d"].shape == (0,)
    assert LoadAnnotations()({"ann_infos": None}) == {"ann_infos": None} and LoadAnnotations()({}) == {}


@pytest.mark.parametrize("annotations, message", [
    (5, "expected .boxes of 9 numbers"), (([np.zeros(7)], [1]), "expected .boxes of 9 numbers"),
    (([np.zeros(9)], []), "1 boxes, but 0 labels")])
def test_damaged_annotations(annotations, message):
    with pytest.raises(DataError, match="LoadAnnotations: sample t1: ann_infos: .*" + message):
        LoadAnnotations()({"sample_idx": "t1", "ann_infos": annotations})


def formatted(**entries):
    return {"points": torch.ones(5, 3), "img_inputs": (torch.ones(2),), "gt_labels_3d": np.array([1, 2]),
            "gt_bboxes_3d": LiDARBoxes(torch.zeros(2, 9)), "sample_idx": "t", "unused": 1, **entries}


def test_bundle_wraps_what_differs_in_length():
    results = DefaultFormatBundle3D(class_names=["car"])(formatted())
    assert isinstance(results["points"], DataContainer) and not results["points"].stack
    assert results["gt_bboxes_3d"].cpu_only and results["gt_labels_3d"].data.dtype == torch.int64
    assert isinstance(results["img_inputs"], tuple)
    without = DefaultFormatBundle3D(with_label=False)(formatted())
    assert isinstance(without["gt_labels_3d"], np.ndarray) and isinstance(without["points"], DataContainer)
    assert DefaultFormatBundle3D()({}) == {}


def test_collect_keeps_keys_and_known_meta_data():
    results = Collect3D(["img_inputs"])(formatted(lidar2img=torch.eye(4), index=3))
    assert set(results) == {"img_inputs", "img_metas"} and results["img_metas"].cpu_only
    assert set(results["img_metas"].data) == {"sample_idx", "lidar2img", "index"}
    assert set(Collect3D(["points"], meta_keys=["unused"])(formatted())["img_metas"].data) == {"unused"}
    with pytest.raises(DataError, match=r"Collect3D: sample t: needs \['gt_depth'\], which no step"):
        Collect3D(["points", "gt_depth"])(formatted())


def test_test_time_form_wraps_in_lists_and_leaves_the_input_alone():
    step = MultiScaleFlipAug3D([{"type": "Collect3D", "keys": ["img_inputs"], "meta_keys": ["flip", "pcd_scale_factor",
                                                                                           "scale", "sample_idx"]}],
                               img_scale=(1333, 800))
    given = formatted()
    before = copy.copy(given)
    results = step(given)
    assert given.keys() == before.keys() and {len(value) for value in results.values()} == {1}
    assert results["img_metas"][0].data == {"flip": False, "pcd_scale_factor": 1.0, "scale": (1333, 800),
                                            "sample_idx": "t"}
    batch = collate([results, results], samples_per_gpu=2)
    assert batch["img_inputs"][0][0].shape == (2, 2) and len(batch["img_metas"][0].data[0]) == 2
    for options in ({"flip": True}, {"pts_scale_ratio": 1.1}):
        with pytest.raises(ValueError, match="test-time augmentation is not supported"):
            MultiScaleFlipAug3D([], **options)
