"""The same frames give the same arrays through tools/infer.py, tools/test.py and the Python interface."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load_tool
from mmcv import Config

from mmdet3d.apis.inference import init_model, open_frames, predict
from mmdet3d.core.predictor import Predictor
from mmdet3d.models import build_model
from mmdet3d.utils.files import prediction_path
from mmdet3d.utils.transfer import to_numpy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/core"))

import evaluation_case as case  # noqa: E402

FULL_SIZE = ROOT / "config/stcocc/stcocc-r50-16f-openocc-12e.py"


@pytest.fixture(autouse=True)
def logger_restored():
    """What the commands change in their process."""
    logger = logging.getLogger("mmdet3d")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.level, logger.propagate, logger.handlers[:] = before


@pytest.fixture(scope="module")
def weights(tiny_world, tmp_path_factory):
    """Config and checkpoint of the tiny model, whose predictions are of all classes."""
    checkpoint = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"state_dict": case.model(case.dataset(tiny_world)).state_dict()}, checkpoint)
    return case.CONFIG, checkpoint


@pytest.fixture(scope="module")
def full_size_weights(tmp_path_factory):
    """Config and checkpoint of the published model with random weights."""
    checkpoint = tmp_path_factory.mktemp("weights") / "full.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": build_model(Config.fromfile(str(FULL_SIZE)).model).state_dict()}, checkpoint)
    return FULL_SIZE, checkpoint


def arrays_of(folder):
    """(semantics, flow) of every prediction, by its name below the folder."""
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as file:
            found[str(path.relative_to(folder))] = file["semantics"], file["flow"]
    return found


def through_test(weights, infos, folder, device, *options):
    config, checkpoint = weights
    status = load_tool("test").main([
        str(config), str(checkpoint), "--device", device, "--work-dir", str(folder / "test"), "--out",
        str(folder / "test_files"), "--format-only", *options, "--cfg-options", f"data.test.ann_file={infos}",
        "data.workers_per_gpu=0"])
    assert status == 0
    return arrays_of(folder / "test_files")


def through_infer(weights, infos, folder, device, *options):
    config, checkpoint = weights
    status = load_tool("infer").main([
        str(config), "--checkpoint", str(checkpoint), "--infos", str(infos), "--device", device, "--no-picture",
        "--out", str(folder / "infer_files"), *options])
    assert status == 0
    return arrays_of(folder / "infer_files")


def through_python(weights, infos, device, mode):
    """apis.predict in a loop; another mode with a predictor of one's own."""
    model, memory, found = init_model(*weights, device=device), None, {}
    predictor = Predictor(model, mode=mode)
    for frame in open_frames(model, infos):
        if mode == "exact":
            result, memory = predict(model, frame, memory)
            semantics, flow = result["occ_results"][0], result["flow_results"][0]
        else:
            semantics, flow, memory = predictor(frame.img_inputs, frame.img_metas, memory)
            semantics, flow = to_numpy(semantics[0], flow[0])
        found[str(prediction_path("", frame.scene, frame.token))] = semantics, flow
    return found


def assert_same(*doors):
    first = doors[0]
    assert len(first) == sum(case.LENGTHS) and len({name.split("/")[0] for name in first}) == len(case.LENGTHS)
    for other in doors[1:]:
        assert other.keys() == first.keys()
        for name, arrays in first.items():
            for mine, theirs in zip(arrays, other[name], strict=True):
                assert mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes(), name


def test_the_tiny_model(weights, tiny_world, tmp_path, one_thread):
    infos = case.mixed_infos(tiny_world)
    tested = through_test(weights, infos, tmp_path, "cpu")
    assert_same(tested, through_infer(weights, infos, tmp_path, "cpu"), through_python(weights, infos, "cpu", "exact"))
    assert any(flow.any() for _, flow in tested.values())
    assert len({label for semantics, _ in tested.values() for label in np.unique(semantics)}) > 5


@pytest.mark.parametrize("start", ["primed", "carried"])
def test_other_starts_of_scenes(weights, tiny_world, tmp_path, one_thread, start):
    infos = case.mixed_infos(tiny_world)
    options = "--scene-start", start
    tested = through_test(weights, infos, tmp_path, "cpu", *options)
    assert_same(tested, through_infer(weights, infos, tmp_path, "cpu", *options))


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_full_size_model_on_a_gpu(full_size_weights, tiny_world, tmp_path, mode):
    infos, options = case.mixed_infos(tiny_world), ("--mode", mode)
    tested = through_test(full_size_weights, infos, tmp_path, "cuda", *options)
    assert_same(tested, through_infer(full_size_weights, infos, tmp_path, "cuda", *options),
                through_python(full_size_weights, infos, "cuda", mode))
