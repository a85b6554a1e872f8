"""A data set with sequences of different lengths, and an untrained tiny model whose predictions are of all classes."""

import pickle
from pathlib import Path

import torch
from mmcv import Config

from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.loader import collate
from mmdet3d.models import build_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config/stcocc/stcocc-tiny-synthetic.py"
LENGTHS = (3, 2, 3, 1)


def mixed_infos(world):
    """An info file with the scenes of both splits of the tiny world, some of them shortened."""
    path = world / "mixed.pkl"
    if not path.exists():
        contents = [pickle.loads((world / f"stcocc-nuscenes_infos_{split}.pkl").read_bytes())
                    for split in ("train", "val")]
        scenes = {}
        for info in (info for content in contents for info in content["infos"]):
            scenes.setdefault(info["scene_token"], []).append(info)
        kept = [info for frames, length in zip(scenes.values(), LENGTHS, strict=True) for info in frames[:length]]
        path.write_bytes(pickle.dumps({**contents[0], "infos": kept}))
    return path


def config(world):
    cfg = Config.fromfile(str(CONFIG))
    cfg.data.val.ann_file = cfg.data.test.ann_file = str(mixed_infos(world))
    cfg.data.train.ann_file = str(world / "stcocc-nuscenes_infos_train.pkl")
    cfg.data.workers_per_gpu = 0
    return cfg


def dataset(world, **options):
    return build_dataset({**config(world).data.test, "test_mode": True, **options})


def model(data):
    """In training mode. Its head is shifted so that the classes occur about equally often, free space more often."""
    torch.manual_seed(0)
    made = build_model(Config.fromfile(str(CONFIG)).model)
    batch = collate([data[0]])
    made.eval()
    with torch.no_grad():
        logits = made.run(batch["img_inputs"][0], batch["img_metas"][0])[0].semantic_logits.flatten(0, 3)
        last = made.occupancy_head.predicter[-1]
        scale = 3 / logits.std(0)
        last.weight.mul_(scale[:, None])
        last.bias.copy_(scale * (last.bias - logits.mean(0)))
        last.bias[-1] += 6
    return made.train()
