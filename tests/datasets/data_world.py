"""A tiny data set on disk for tests: single-coloured images, lidar points, labels; and the published pipelines."""

import pickle
from pathlib import Path

import numpy as np
from mmcv import Config
from PIL import Image

CAMERAS = ("CAM_FRONT", "CAM_BACK")
GRID = (16, 24, 8)
CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "config/stcocc"
PUBLISHED = {"openocc": CONFIG_FOLDER / "stcocc-r50-16f-openocc-12e.py",
             "occ3d": CONFIG_FOLDER / "stcocc-r50-16f-occ3d-36e.py"}
DATA_CONFIG = {"cams": list(CAMERAS), "Ncams": 2, "input_size": (16, 32), "resize": (-0.06, 0.11), "rot": (-5.4, 5.4),
               "flip": True, "crop_h": (0.0, 0.0), "resize_test": 0.0}
FLIPS = {"rot_lim": (0, 0), "scale_lim": (1, 1), "flip_dx_ratio": 0.5, "flip_dy_ratio": 0.5}


def make_info(folder, scene, frame, index):
    """One record; its camera's position in x is its index, its pictures are coloured by camera and index."""
    token = f"{scene}-{frame}"
    pose = {"ego2global_translation": [100.0 + index, 5.0, 0.5], "ego2global_rotation": [0.9, 0.0, 0.0, 0.1 * frame]}
    cams = {}
    for c, name in enumerate(CAMERAS):
        path = f"samples/{name}_{token}.png"
        Image.new("RGB", (40, 30), (10 * c, 7, 20 * index)).save(folder / path)
        cams[name] = {"data_path": path, "cam_intrinsic": np.diag([30.0 + c, 31.0, 1.0]) + np.eye(3, k=2) * 20,
                      "sensor2ego_translation": [c, 0, 1.5], "sensor2ego_rotation": [0.5, -0.5, 0.5, -0.5], **pose}
    points = np.random.RandomState(index).uniform(-20, 20, (50, 5)).astype("<f4")
    points.tofile(folder / f"samples/{token}.bin")
    return {"token": token, "timestamp": 1000 * index, "scene_token": scene,
            "prev": f"{scene}-{frame - 1}" if frame else "", "occ_path": f"gts/{scene}/{token}",
            "lidar_path": f"samples/{token}.bin", "sweeps": [], "cams": cams, "can_bus": np.arange(18.0),
            "lidar2ego_translation": [1, 0, 1.8], "lidar2ego_rotation": [1.0, 0, 0, 0],
            "ann_infos": ([np.arange(9.0) + 1], [3]), **pose}


def write_labels(folder, seed, free):
    """A random ``labels.npz`` with semantics, mask_camera and flow; returns the arrays."""
    rng = np.random.RandomState(seed)
    semantics = np.full(GRID, free, np.uint8)
    filled = rng.uniform(size=GRID) < 0.3
    semantics[filled] = rng.randint(0, free, filled.sum())
    arrays = {"semantics": semantics, "mask_camera": (rng.uniform(size=GRID) < 0.5).astype(np.uint8),
              "flow": rng.normal(size=(*GRID, 2)).astype(np.float32)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "labels.npz", **arrays)
    return arrays


def make_world(folder, lengths=(4, 3)):
    """Write a data set of scenes with ``lengths`` frames; returns the info file."""
    (folder / "samples").mkdir(parents=True)
    infos = []
    for scene, length in enumerate(lengths):
        for frame in range(length):
            infos.append(make_info(folder, f"scene-{scene}", frame, len(infos)))
    for index, info in enumerate(infos):
        write_labels(folder / info["occ_path"], index, 17)
        write_labels(folder / info["occ_path"].replace("gts", "openocc_v2"), index, 16)
    path = folder / "infos.pkl"
    path.write_bytes(pickle.dumps({"infos": infos, "metadata": {"version": "x"}}))
    return path


def train_steps(labels="LoadOccGTFromFileCVPR2023", **label_options):
    """The steps of the published train pipelines, for the tiny data set."""
    keys = ["img_inputs", "gt_depth", *(f"voxel_semantics{s}" for s in ("", "_1_2", "_1_4", "_1_8"))]
    return [
        {"type": "PrepareImageInputs", "is_train": True, "data_config": DATA_CONFIG, "sequential": True},
        {"type": "LoadAnnotations"},
        {"type": labels, "scale_1_2": True, "scale_1_4": True, "scale_1_8": True, "compute_scales": True,
         "grid_size": GRID, **label_options},
        {"type": "BEVAug", "bda_aug_conf": FLIPS, "classes": ["car"], "is_train": True},
        {"type": "LoadPointsFromFile", "coord_type": "LIDAR"},
        {"type": "PointToMultiViewDepth", "grid_config": {"depth": [1.0, 45.0, 0.5]}},
        {"type": "DefaultFormatBundle3D", "class_names": ["car"]},
        {"type": "Collect3D", "keys": keys + ["voxel_flows"] * ("OpenOcc" in labels)},
    ]


def test_steps(**image_options):
    """The steps of the published test pipelines, for the tiny data set."""
    return [
        {"type": "PrepareImageInputs", "is_train": False, "data_config": DATA_CONFIG, "sequential": True,
         **image_options},
        {"type": "LoadAnnotations"},
        {"type": "BEVAug", "bda_aug_conf": FLIPS, "classes": ["car"], "is_train": False},
        {"type": "LoadPointsFromFile", "coord_type": "LIDAR"},
        {"type": "MultiScaleFlipAug3D", "img_scale": (1333, 800), "pts_scale_ratio": 1, "flip": False, "transforms": [
            {"type": "DefaultFormatBundle3D", "class_names": ["car"], "with_label": False},
            {"type": "Collect3D", "keys": ["points", "img_inputs"]}]},
    ]


def published(name, split):
    """``data.train`` or ``data.test`` of a published config, as plain dicts."""
    return Config.fromfile(str(PUBLISHED[name])).data[split].to_dict()


def real_infos(shared, folder, file, occ_path=None):
    """A copy of an info file of the real frames with absolute paths, all labels at ``occ_path``; returns its path."""
    data = shared / "data/nuscenes_real"
    content = pickle.loads((data / f"stcocc-nuscenes_infos_{file}.pkl").read_bytes())
    for info in content["infos"]:
        info["lidar_path"] = str(data / info["lidar_path"])
        info["occ_path"] = str(occ_path or info["occ_path"])
        for camera in info["cams"].values():
            camera["data_path"] = str(data / camera["data_path"])
    path = folder / f"{file}.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def link_labels(shared, folder):
    """A folder with the official Occ3D label and the coarse ones of the golden values."""
    source = next((shared / "data/nuscenes_real/gts").rglob("labels.npz"))
    folder.mkdir(parents=True)
    (folder / "labels.npz").symlink_to(source)
    golden = np.load(shared / "golden/pipeline_msgt.npz")
    for n in (2, 4, 8):
        np.savez_compressed(folder / f"labels_1_{n}.npz", semantics=golden[f"occ3d_ds{n}"], flow=golden[f"occ3d_ds{n}"])
    return folder
