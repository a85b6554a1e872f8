"""One small synthetic scene, and one small data set, shared by the tests of this folder."""

import pytest

from mmdet3d.datasets.synthetic.generate import write_dataset
from mmdet3d.datasets.synthetic.scene import WorldSettings, build_scene

SETTINGS = WorldSettings(("scene-0061",), frames=2, image_size=(112, 64), seed=3)


@pytest.fixture(scope="session")
def small_scene():
    return build_scene(SETTINGS, 0)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    write_dataset(folder, SETTINGS)
    return folder
