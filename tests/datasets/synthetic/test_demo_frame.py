"""The drawn drive: schema, determinism, and that cameras see what the calibration says they see."""

import numpy as np
import pytest
from PIL import Image

from mmdet3d.datasets.geometry import pose_matrix, rigid_inverse
from mmdet3d.datasets.infos import load_infos, relative_poses, sequence_flags
from mmdet3d.datasets.labels import CAMERAS
from mmdet3d.datasets.pipelines.format import FrameSource
from mmdet3d.datasets.synthetic.demo_frame import SCENE, write_demo


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("drive"), frames=2, shrink=8)


def open_image(info_file, info, camera):
    return np.asarray(Image.open(info_file.parent / info["cams"][camera]["data_path"])).astype(int)


def test_frames_go_through_the_normal_path(drive):
    infos = load_infos(drive)
    assert [len(infos), sequence_flags(infos).tolist()] == [2, [0, 0]]
    source = FrameSource(infos, {"cams": list(CAMERAS), "input_size": (64, 176)}, drive)
    frame = source[1]
    assert frame.img_inputs[0].shape == (1, 18, 3, 64, 176) and frame.scene == SCENE
    motion = relative_poses(infos, 1, False)["curr_to_prev_ego_rt"]
    np.testing.assert_allclose(motion[:3, 3], [3.0, 0, 0], atol=1e-4)
    sizes = {Image.open(path).size for path in frame.image_files.values()}
    assert sizes == {(1600, 900)} and set(frame.image_files) == set(CAMERAS)


def test_the_same_call_draws_the_same_pictures(drive, tmp_path):
    again = write_demo(tmp_path, frames=1, shrink=8)
    for camera in CAMERAS:
        path = load_infos(again)[0]["cams"][camera]["data_path"]
        assert (tmp_path / path).read_bytes() == (drive.parent / path).read_bytes()


def project(info, camera, point):
    record = info["cams"][camera]
    pose = pose_matrix(record["sensor2ego_rotation"], record["sensor2ego_translation"])
    seen = record["cam_intrinsic"] @ (rigid_inverse(pose) @ [*point, 1.0])[:3]
    return seen[:2] / seen[2], seen[2]


@pytest.mark.parametrize("camera, point, color", [
    ("CAM_FRONT", (14.0 - 2.25, 0.3, 0.95), (178, 32, 40)),  # the red car's rear
    ("CAM_FRONT", (13.0, 2.0, 0.0), (216, 190, 70)),  # the yellow line ahead
    ("CAM_BACK", (-13.0 + 2.25, 0.1, 0.9), (40, 70, 140)),  # the blue car behind
    ("CAM_FRONT_RIGHT", (6.2, -3.6 + 0.925, 0.8), (210, 170, 40)),  # the parked car's left side
    ("CAM_BACK_LEFT", (-1.1, 6.5, 0.0), (84, 84, 84)),  # asphalt
])
def test_calibration_and_pictures_agree(drive, camera, point, color):
    info = load_infos(drive)[0]
    (u, v), depth = project(info, camera, point)
    assert depth > 0 and 0 <= u < 1600 and 0 <= v < 900
    seen, color = open_image(drive, info, camera)[int(v), int(u)], np.array(color)
    cosine = seen @ color / np.linalg.norm(seen) / np.linalg.norm(color)
    assert cosine > 0.98 and 0.5 < np.linalg.norm(seen) / np.linalg.norm(color) < 1.15


def test_left_is_left_of_right_and_the_sky_is_up(drive):
    info = load_infos(drive)[0]
    front = open_image(drive, info, "CAM_FRONT")
    assert front[20, 750, 2] > front[20, 750, 0] and front[20].mean() > front[-20].mean()
    (left, _), (right, _) = (project(info, "CAM_FRONT", (20.0, y, 1.0)) for y in (4.0, -4.0))
    assert left[0] < 800 < right[0]
