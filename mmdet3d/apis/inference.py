"""Run a model on frames, one after the other."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmcv import Config
from torch import Tensor, nn

from mmdet3d.core.predictor import Predictor
from mmdet3d.datasets.infos import adjacent_offsets, load_infos
from mmdet3d.datasets.labels import LabelSet, label_set, label_set_for
from mmdet3d.datasets.pipelines.format import Frame, FrameSource
from mmdet3d.models.detectors.prediction import result_dict
from mmdet3d.utils.allocator import keep_freed_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameSettings:
    """What a config says about the frames that its model takes and gives.

    Attributes:
        data_config: Cameras, image size and augmentation limits.
        offsets: How many frames back the adjacent frames lie.
        labels: Label set of the predictions.
        point_cloud_range: Bounds (x, y, z low, x, y, z high) of the predictions in the ego frame, metres.
    """

    data_config: Mapping
    offsets: tuple[int, ...]
    labels: LabelSet
    point_cloud_range: tuple[float, ...]

    @classmethod
    def from_config(cls, cfg: Mapping) -> FrameSettings:
        """Read the settings of a config, which stays as it is.

        Raises:
            ValueError: something is missing, or the number of classes does not fit the data set.
        """
        test = cfg.get("data", {}).get("test", {})
        offsets = adjacent_offsets(test.get("multi_adj_frame_id_cfg", (1, 2, 1)), test.get("stereo", True))
        return cls(_data_config(cfg, test), offsets, _labels(cfg, test), _point_cloud_range(cfg))


def _data_config(cfg: Mapping, test: Mapping) -> Mapping:
    if "data_config" in cfg:
        return cfg["data_config"]
    for step in test.get("pipeline", ()):
        if isinstance(step, Mapping) and step.get("type") == "PrepareImageInputs" and "data_config" in step:
            return step["data_config"]
    raise ValueError("config: found neither data_config nor a PrepareImageInputs step with one in data.test.pipeline")


def _labels(cfg: Mapping, test: Mapping) -> LabelSet:
    num_classes = cfg.get("model", {}).get("occupancy_head", {}).get("num_classes")
    name = test.get("dataset_name", cfg.get("dataset_name"))
    if name is None and num_classes is None:
        raise ValueError("config: found neither data.test.dataset_name nor model.occupancy_head.num_classes")
    labels = label_set(name) if name is not None else label_set_for(num_classes)
    if num_classes is not None and num_classes != labels.num_classes:
        raise ValueError(f"config: model.occupancy_head.num_classes is {num_classes}, but dataset_name {labels.name!r} "
                         f"has {labels.num_classes} labels")
    return labels


def _point_cloud_range(cfg: Mapping) -> tuple[float, ...]:
    if "point_cloud_range" in cfg:
        return tuple(cfg["point_cloud_range"])
    if "grid_config" in cfg:
        axes = [cfg["grid_config"][axis] for axis in "xyz"]
        return (*(axis[0] for axis in axes), *(axis[1] for axis in axes))
    raise ValueError("config: found neither point_cloud_range nor grid_config")


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device called ``device``; without a name the CUDA device if there is one, else the CPU.

    Raises:
        ValueError: PyTorch knows no such device, or this machine has none.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r} is not a device; use cpu, cuda or cuda:<number>") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def load_config(config: str | os.PathLike | Config) -> Config:
    """A config from a file, or the one that is passed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if isinstance(config, Config):
        return config
    if not Path(config).is_file():
        raise FileNotFoundError(f"config file not found: {config}")
    return Config.fromfile(str(config))


def init_model(config: str | os.PathLike | Config, checkpoint: str | os.PathLike | None = None,
               device: str | torch.device | None = None, *, seed: int = 0, averaged: bool = False,
               allow_unsafe: bool = False) -> nn.Module:
    """Build the model of a config and load its weights.

    Args:
        config: Config file, or a loaded config, which stays as it is.
        checkpoint: File with the weights. Without one the weights are random, and ``model.random_weights`` is True.
        device: Where the model goes. Default: a CUDA device if there is one, else the CPU; there the process keeps
            freed memory from then on, see :func:`keep_freed_memory`.
        seed: Of the random weights. The global random state stays as it was.
        averaged: Take the averaged weights that the checkpoint of a training holds.
        allow_unsafe: Read a checkpoint that could run code when it is read.

    Returns:
        The model in evaluation mode, with the config in ``model.cfg``.

    Raises:
        ConfigError: the config does not describe a model.
        CheckpointError: the checkpoint cannot be read or does not fit the model.
        ValueError: there is no such device.
    """
    from mmdet3d.models import build_model
    from mmdet3d.utils.checkpoint import load_checkpoint

    device = choose_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    cfg = load_config(config)
    if "model" not in cfg:
        raise ValueError(f"config {cfg.filename or ''}: the key 'model' is missing")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(cfg.model)
    if checkpoint is not None:
        report = load_checkpoint(model, checkpoint, averaged=averaged, allow_unsafe=allow_unsafe)
        logger.log(logging.WARNING if report.nonfinite else logging.INFO, report.summary())
    model.cfg = cfg
    model.random_weights = checkpoint is None
    return model.to(device).eval()


def open_frames(model_or_config: nn.Module | Mapping, info_file: str | os.PathLike) -> FrameSource:
    """The frames of an info file as the model takes them.

    Args:
        model_or_config: Model of :func:`init_model`, or a config.
        info_file: The info pickle.

    Raises:
        DataError: the info file cannot be read.
        ValueError: the config lacks a setting.
    """
    cfg = getattr(model_or_config, "cfg", model_or_config)
    settings = FrameSettings.from_config(cfg)
    return FrameSource(load_infos(info_file), settings.data_config, info_file, settings.offsets)


def predict(model: nn.Module, frame: Frame | tuple[Sequence, Sequence[Mapping]], memory: Any = None
            ) -> tuple[dict[str, Any], Any]:
    """Predict occupancy and flow of one frame, as ``tools/test.py`` does with its default options.

    The first call makes a copy of the model for it, with batch norms folded; a later one makes another where weights
    were loaded, moved or changed in place. Changes behind PyTorch's back (``parameter.data.copy_(...)``), replaced
    submodules and hooks are not noticed: for these, for other options, or to keep results on the GPU, make a
    :class:`~mmdet3d.core.predictor.Predictor`.

    Args:
        model: Model of :func:`init_model`.
        frame: Frame of :func:`open_frames`, or (img_inputs, img_metas).
        memory: What the call before gave; None for the first frame. To come back to one later, or to switch between
            streams, keep ``memory.clone()``: on a GPU calls write to the memory of earlier ones.

    Returns:
        Result and the memory for the next frame. The result has ``occ_results`` uint8 [B, X, Y, Z] labels,
        ``flow_results`` float16 [B, X, Y, Z, 2] velocity along x and y in m/s, and ``index``, a list of B sample
        indices.
    """
    img_inputs, img_metas = (frame.img_inputs, frame.img_metas) if isinstance(frame, Frame) else frame
    semantics, flow, memory = _predictor_of(model)(img_inputs, img_metas, memory)
    return result_dict(semantics, flow, [meta.get("index") for meta in img_metas]), memory


class _Cached(NamedTuple):
    """The predictor of a model, where the model keeps its tensors, and what these were when the predictor was made."""

    predictor: Predictor
    places: list[dict[str, Tensor | None]]
    state: list[tuple]


_predictors: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()


def _predictor_of(model: nn.Module) -> Predictor:
    """The predictor of a model; made anew where its weights have moved or changed."""
    cached = _predictors.get(model)
    if cached is None or cached.state != _state(cached.places):
        places = [place for module in model.modules() for place in (module._parameters, module._buffers) if place]
        cached = _predictors[model] = _Cached(Predictor(model), places, _state(places))
    return cached.predictor


def _state(places: Sequence[dict[str, Tensor | None]]) -> list[tuple]:
    """Changes with every tensor that is replaced or written to."""
    return [(id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for place in places for tensor in place.values() if tensor is not None]
