"""What the training runner expects of a detector."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.runner import BaseModule
from torch import Tensor
from torch import distributed as dist


class BaseDetector(BaseModule):
    """``forward(return_loss=...)``, ``train_step`` and ``val_step`` in the style of mmdet."""

    def forward(self, return_loss: bool = True, **data: Any) -> Any:
        """Losses (``return_loss=True``) or results of a batch."""
        return self.forward_train(**data) if return_loss else self.forward_test(**data)

    def train_step(self, data: Mapping[str, Any], optimizer: Any = None) -> dict[str, Any]:
        """One forward pass of the training loop.

        Returns:
            ``loss`` (scalar tensor with gradient), ``log_vars`` (floats, averaged over ranks), ``num_samples``.
        """
        losses = self(**data)
        loss, log_vars = self.parse_losses(losses)
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(data["img_metas"])}

    val_step = train_step

    @staticmethod
    def parse_losses(losses: Mapping[str, Tensor]) -> tuple[Tensor, OrderedDict[str, float]]:
        """Total of all entries whose name contains "loss", and the values to log.

        All values are averaged over ranks in one message and read back in one transfer.
        """
        total, names, values = BaseDetector.reduce_losses(losses)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values.div_(dist.get_world_size()))
        return total, OrderedDict(zip(names, values.tolist(), strict=True))

    @staticmethod
    def reduce_losses(losses: Mapping[str, Tensor]) -> tuple[Tensor, tuple[str, ...], Tensor]:
        """The part of :meth:`parse_losses` on the device of the losses, which is not waited for.

        Returns:
            Total of all entries whose name contains "loss", with gradient; the names to log, "loss" for the total
            last; their values, float32 without gradient, of this process.
        """
        means = OrderedDict((name, value.mean()) for name, value in losses.items())
        total = sum(value for name, value in means.items() if "loss" in name)
        means["loss"] = total
        return total, tuple(means), torch.stack([value.detach().float() for value in means.values()])
