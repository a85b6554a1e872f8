"""Normalisation after the transfer: images travel as bytes, a quarter of the size; a table gives the floats."""

import functools
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from mmdet3d.datasets.pipelines.images import NORMALISED


@functools.cache
def _table(device: torch.device) -> Tensor:
    """[3, 256] float of each byte by channel; uploaded once, because the transfer of pageable memory waits."""
    with torch.inference_mode(False):
        return torch.from_numpy(NORMALISED).to(device)


def normalise_on_device(images: Tensor) -> Tensor:
    """Normalised images, bit for bit those of :func:`mmdet3d.datasets.pipelines.images.normalise`.

    Args:
        images: [..., 3, H, W] uint8, channels blue, green, red, as ``PrepareImageInputs(ship_uint8=True)`` gives them.

    Returns:
        [..., 3, H, W] float32 on the same device. Images that are not uint8 are returned as they are.

    Raises:
        ValueError: there are not three channels.
    """
    if images.dtype != torch.uint8:
        return images
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"expected images [..., 3, H, W], got shape {tuple(images.shape)}")
    table = _table(images.device)
    normalised = torch.empty(images.shape, device=images.device)
    for channel in range(3):
        values = images.select(-3, channel)
        normalised.select(-3, channel).copy_(table[channel].index_select(0, values.flatten().int()).view(values.shape))
    return normalised


def normalise_batch(batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A batch whose ``img_inputs`` hold normalised images; to be called where the batch is, before the model.

    Args:
        batch: Of the train pipeline, where ``img_inputs`` is a list of six tensors, or of the test pipeline, where it
            is a list of such a list. It stays as it is.
    """
    inputs = batch["img_inputs"]
    if torch.is_tensor(inputs[0]):
        return {**batch, "img_inputs": [normalise_on_device(inputs[0]), *inputs[1:]]}
    return {**batch, "img_inputs": [[normalise_on_device(images), *rest] for images, *rest in inputs]}
