"""A whole model that runs in a moment on a CPU, with three different grid sizes, and batches for it."""

from pathlib import Path

import numpy as np
import torch
from mmcv import Config

from mmdet3d.models import build_model

CONFIGS = Path(__file__).resolve().parents[3] / "config/stcocc"
X, Y, Z, CLASSES, CAMS, BATCH = 12, 8, 4, 17, 2, 2  # the finest stage; labels are twice as fine
IMAGE = (64, 176)
RANGE = [-24.0, -16.0, -1.0, 24.0, 16.0, 5.4]
GRID = {"x": [-24, 24, 4.0], "y": [-16, 16, 4.0], "z": [-1, 5.4, 1.6], "depth": [1.0, 45.0, 2.0]}


def published(name):
    """Model config of a file in config/stcocc."""
    return Config.fromfile(str(CONFIGS / f"{name}.py")).model


def config(**options):
    """The tiny config with two cameras and a smaller grid whose sides differ."""
    model = published("stcocc-tiny-synthetic")
    model.train_top_k = model.val_top_k = [100, 15]
    model.forward_projection.num_cams = CAMS
    model.forward_projection.img_view_transformer.grid_config = GRID
    model.backward_projection.update(bev_h=Y, bev_w=X, pc_range=RANGE)
    model.backward_projection.positional_encoding.update(row_num_embed=Y, col_num_embed=X)
    transformer = model.backward_projection.transformer
    transformer.num_cams = CAMS
    transformer.encoder.update(num_cam=CAMS, pc_range=RANGE, grid_config=GRID)
    transformer.encoder.transformerlayers.attn_cfgs[1].num_cams = CAMS
    model.update(options)
    return model


def build(**options):
    """In evaluation mode."""
    torch.manual_seed(0)
    model = build_model(config(**options))
    model.eval()
    return model


def images_and_poses(step, batch, cams, generator):
    """The six input tensors."""
    total = 3 * cams

    def still():
        return torch.eye(4).repeat(batch, total, 1, 1)

    sensor, world, intrinsics, bda = still(), still(), still(), torch.eye(4).repeat(batch, 1, 1)
    for n in range(cams):  # looking around in a circle; right, down, forward -> forward, left, up
        yaw = torch.tensor(2 * torch.pi * n / cams)
        forward, right = torch.stack([yaw.cos(), yaw.sin()]), torch.stack([yaw.sin(), -yaw.cos()])
        for entry in range(n, total, cams):
            sensor[:, entry, :3, :3] = 0
            sensor[:, entry, :2, 2], sensor[:, entry, :2, 0], sensor[:, entry, 2, 1] = forward, right, -1.0
            sensor[:, entry, :3, 3] = torch.tensor([0.5, 0.1, 1.5])
    world[:, :, 0, 3] = 300 + 0.8 * (step - torch.arange(3.0)).repeat_interleave(cams)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1], intrinsics[..., 0, 2], intrinsics[..., 1, 2] = 90, 80, 88, 32
    bda[-1, 0, 0] = -1 if step % 2 else 1
    return [torch.randn(batch, total, 3, *IMAGE, generator=generator), sensor, world, intrinsics, still(), bda]


def metas(step, starts, sequences, inputs, cams):
    result = []
    for b, (start, sequence) in enumerate(zip(starts, sequences, strict=True)):
        can_bus = np.zeros(18)
        can_bus[:3] = 300 + 0.8 * step, 120 + b, 1.0
        can_bus[-2], can_bus[-1] = 0.1 * b, np.rad2deg(0.1 * b)
        previous = torch.eye(4)
        previous[0, 3] = 0.0 if start else 0.8
        lidar2img = inputs[3][b, :cams] @ torch.linalg.inv(inputs[1][b, :cams])
        result.append({"sequence_group_idx": np.int64(sequence), "start_of_sequence": bool(start), "can_bus": can_bus,
                       "curr_to_prev_ego_rt": previous, "lidar2img": lidar2img, "ego2lidar": torch.eye(4)[None],
                       "index": 10 * step + b, "sample_idx": f"sample-{step}-{b}", "scene_name": f"scene-{sequence}"})
    return result


def frame(step=0, starts=None, sequences=(3, 5), batch=BATCH, cams=CAMS):
    """(img_inputs, img_metas) of a batch; sequences start at step 0 unless said otherwise."""
    generator = torch.Generator().manual_seed(step)
    inputs = images_and_poses(step, batch, cams, generator)
    starts = [step == 0] * batch if starts is None else starts
    return inputs, metas(step, starts, sequences[:batch], inputs, cams)


def targets(step=0, batch=BATCH, cams=CAMS):
    generator = torch.Generator().manual_seed(100 + step)

    def classes(factor):
        size = (batch, 2 * X // factor, 2 * Y // factor, 2 * Z // factor)
        labels = torch.randint(0, CLASSES, size, generator=generator, dtype=torch.uint8)
        return torch.where(torch.rand(size, generator=generator) < 0.1, torch.tensor(255, dtype=torch.uint8), labels)

    depth = torch.rand(batch, cams, *IMAGE, generator=generator) * 44 + 1
    return {"gt_depth": depth * (torch.rand(depth.shape, generator=generator) < 0.05), "voxel_semantics": classes(1),
            "voxel_semantics_1_2": classes(2), "voxel_semantics_1_4": classes(4),
            "voxel_flows": torch.randn(batch, 2 * X, 2 * Y, 2 * Z, 2, generator=generator)}


def training_batch(step=0, **options):
    inputs, img_metas = frame(step, **options)
    return {"img_inputs": inputs, "img_metas": img_metas, **targets(step), "points": None, "gt_bboxes_3d": []}
