"""Access to the golden values: the modules that generate weights and inputs, models, and comparisons."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from mmcv import Config

from mmdet3d.models import build_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"openocc": ROOT / "config/stcocc/stcocc-r50-16f-openocc-12e.py",
           "occ3d": ROOT / "config/stcocc/stcocc-r50-16f-occ3d-36e.py"}
NUM_CLASSES = {"openocc": 17, "occ3d": 18}
STAGE_SCALES = (2, 4, 8)


def load_module(path):
    """The Python module in the file ``path`` (the generators lie outside any package)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def build(name):
    return build_model(Config.fromfile(str(CONFIGS[name])).model)


def eval_tensors(prediction, features):
    """The tensors of the golden eval files, by their names there."""
    tensors = {"depth": features.depth, "context": features.context, "voxel": prediction.volume,
               "semantic_logits": prediction.semantic_logits}
    for s, scale in enumerate(STAGE_SCALES):
        tensors[f"coarse_voxel_{s}"] = features.volumes[s]
        tensors[f"pred_voxel_semantic_1_{scale}"] = prediction.stage_logits[s]
        tensors[f"history_stage{s}"] = prediction.memory.history_volume(s)
    if prediction.flow is not None:
        tensors["flow"] = prediction.flow
    return tensors


def sampled_error(golden, prefix, tensor):
    """99.9 % quantile of the difference to the stored samples, in standard deviations of the golden tensor."""
    assert tuple(tensor.shape) == tuple(golden[f"{prefix}/shape"])
    values = tensor.detach().cpu().double().reshape(-1)[torch.from_numpy(golden[f"{prefix}/index"]).long()].numpy()
    return np.quantile(np.abs(values - golden[f"{prefix}/samples"]) / golden[f"{prefix}/stats"][1], 0.999)
