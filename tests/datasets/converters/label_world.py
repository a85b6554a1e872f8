"""A small, sound data set on disk for the tests of the tools: images, lidar, labels of both kinds, info file."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from mmdet3d.datasets.labels import CAMERAS

GRID = (16, 24, 8)
FREE = {"gts": 17, "openocc_v2": 16}


def write_labels(folder: Path, tree: str, rng: np.random.Generator) -> None:
    free = FREE[tree]
    semantics = np.where(rng.random(GRID) < 0.3, rng.integers(0, free, GRID), free).astype(np.uint8)
    semantics[:8, :8] = free
    folder.mkdir(parents=True)
    if tree == "gts":
        masks = {name: rng.integers(0, 2, GRID).astype(np.uint8) for name in ("mask_lidar", "mask_camera")}
        np.savez_compressed(folder / "labels.npz", semantics=semantics, **masks)
    else:
        flow = rng.normal(size=(*GRID, 2)).astype(np.float32)
        flow[0, 0, 0] = 255
        np.savez_compressed(folder / "labels.npz", semantics=semantics, flow=flow)


def make_info(scene: int, frame: int, index: int) -> dict:
    token = f"{scene}-{frame}"
    time = 1_000_000 * index + 100_000_000 * scene
    pose = {"ego2global_translation": [10.0 * index, 5.0, 0.5], "ego2global_rotation": [0.6, 0.0, 0.0, 0.8]}
    cams = {name: {"data_path": f"samples/{name}_{token}.jpg", "timestamp": time + 1000 * camera,
                   "cam_intrinsic": np.array([[30.0, 0, 32], [0, 31, 20], [0, 0, 1]]),
                   "sensor2ego_translation": [1.0, 0, 1.5], "sensor2ego_rotation": [0.5, -0.5, 0.5, -0.5],
                   "sensor2lidar_rotation": np.eye(3), **pose} for camera, name in enumerate(CAMERAS)}
    return {"token": token, "timestamp": time, "scene_token": f"scene-{scene}",
            "prev": f"{scene}-{frame - 1}" if frame else "", "occ_path": f"gts/scene-{scene}/{token}",
            "lidar_path": f"samples/{token}.bin", "cams": cams, "can_bus": np.zeros(18),
            "lidar2ego_translation": [0.9, 0.0, 1.8], "lidar2ego_rotation": [1.0, 0.0, 0.0, 0.0], **pose}


def write_infos(path: Path, infos: list[dict]) -> Path:
    path.write_bytes(pickle.dumps({"infos": infos, "metadata": {"version": "test"}}))
    return path


def write_world(root: Path, lengths=(3, 2), trees=("gts", "openocc_v2"), sensors=True) -> tuple[Path, list[dict]]:
    """The info file and its records; paths are relative to the info file's folder."""
    rng = np.random.default_rng(0)
    (root / "samples").mkdir(parents=True)
    infos = []
    for scene, length in enumerate(lengths):
        infos += [make_info(scene, frame, len(infos) + frame) for frame in range(length)]
    for info in infos:
        for tree in trees:
            write_labels(root / info["occ_path"].replace("gts", tree), tree, rng)
        if sensors:
            for camera in info["cams"].values():
                noise = rng.integers(0, 255, (40, 64, 3)).astype(np.uint8)
                Image.fromarray(noise).save(root / camera["data_path"])
            rng.uniform(-30, 30, (40, 5)).astype("<f4").tofile(root / info["lidar_path"])
    return write_infos(root / "infos.pkl", infos), infos
