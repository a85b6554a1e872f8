"""Shared fixtures: devices, the folder of golden values, and the CUDA rule (a GPU run fails instead of skipping)."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        return
    if os.environ.get("MMDET3D_REQUIRE_CUDA") == "1":
        raise pytest.UsageError("MMDET3D_REQUIRE_CUDA=1, but this PyTorch sees no CUDA device")
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Runs a test on the CPU and on a CUDA device."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """One thread for small tensors: threads that wait for busy cores cost seconds each. Restores their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared():
    """Folder with golden/, spec/golden/ and data/, named by STCOCC_SHARED (default ../shared)."""
    folder = Path(os.environ.get("STCOCC_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"golden values and sample data not found: {folder} (set STCOCC_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Folder of a synthetic data set with all files for training and evaluation: few small frames.

    Scenes of 3 frames, two to train on and two to evaluate; data.train.ann_file is
    ``stcocc-nuscenes_infos_train.pkl`` in it, that of the others ``stcocc-nuscenes_infos_val.pkl``.
    """
    from mmdet3d.datasets.synthetic.prepare import prepare_dataset
    from mmdet3d.datasets.synthetic.scene import WorldSettings

    folder = tmp_path_factory.mktemp("tiny_world")
    scenes = ("scene-0061", "scene-0553", "scene-0103", "scene-0916")  # two of the train and two of the val split
    paths = prepare_dataset(folder, WorldSettings(scenes, frames=3, image_size=(192, 108)))
    assert set(paths) == {"train", "val"}
    return folder
