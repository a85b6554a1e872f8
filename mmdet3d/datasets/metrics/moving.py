"""The flow error of what moves, beside that of predicting that nothing does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdet3d.datasets.labels import LabelSet

from .ray_iou import CastRays, RayMetric

MOVING_SPEED = 0.5
"""Speed in m/s above which an object moves."""


class MovingRayMetric(RayMetric):
    """A :class:`RayMetric` that also gives the flow error of moving objects.

    All it counts as RayMetric is the same. Beside that, the same rays are counted again, those only whose ground truth
    is faster than ``speed`` at the voxel they hit: once with the predicted flow, once with zero flow. Both look at the
    same true positives of the 2 m threshold. As most objects stand still, a prediction of zero has a good AVE; here it
    has the mean speed.

    Args:
        labels: Label set, or its name.
        speed: Objects move if they are faster, in m/s.
        **options: See :class:`RayMetric`.

    Raises:
        ValueError: ``speed`` is negative or no number.
    """

    def __init__(self, labels: LabelSet | str, speed: float = MOVING_SPEED, **options: Any) -> None:
        if not speed >= 0:
            raise ValueError(f"speed: expected metres per second of at least 0, got {speed!r}")
        super().__init__(labels, **options)
        self.speed = float(speed)
        self._moving = {name: RayMetric(self.labels, grid=self.grid) for name in ("flow", "zero_flow")}

    def count(self, token: str, rays: CastRays) -> None:
        """As :meth:`RayMetric.count`."""
        super().count(token, rays)
        if rays.gt_flow is None:
            for part in self._moving.values():
                part.coverage.claim(token)
            return
        hit, grids = rays.voxel[1].long(), rays.grids.clone()
        moves = rays.gt_flow.reshape(-1, 2)[hit].float().square().sum(-1) > self.speed**2
        true = grids[1].view(-1)
        true[hit] = true[hit].where(moves, self.labels.free_index)  # rays that end in free space do not count
        rays = rays._replace(grids=grids)
        self._moving["flow"].count(token, rays)
        self._moving["zero_flow"].count(token, rays._replace(pred_flow=None))

    def merge(self, other: RayMetric) -> None:
        """As :meth:`RayMetric.merge`; ValueError also if ``other`` has another speed or none."""
        if getattr(other, "speed", None) != self.speed:
            raise ValueError(f"cannot merge: objects move at {self.speed} m/s here, and at "
                             f"{getattr(other, 'speed', None)} there")
        super().merge(other)
        for name, part in self._moving.items():
            part.merge(other._moving[name])

    def result(self) -> dict:
        """As :meth:`RayMetric.result`, and ``moving``.

        ``moving`` holds ``speed``; ``rays``, the number of true positives of moving objects; ``ave`` and
        ``ave_zero_flow``, their mean flow error with the predicted flow and with zero, in m/s; and ``classes``, the
        last three by name of the flow classes. What nothing was counted for is NaN.
        """
        flow, zero = (self._moving[name].counts for name in ("flow", "zero_flow"))
        moving: dict[str, Any] = {"speed": self.speed}
        moving |= _row(flow.flow_rays.sum(), flow.flow_error.sum(), zero.flow_error.sum())
        moving["classes"] = {self.labels.classes[index]: _row(flow.flow_rays[index], flow.flow_error[index],
                                                              zero.flow_error[index])
                             for index in self.labels.flow_classes}
        return {**super().result(), "moving": moving}

    def state_dict(self) -> dict:
        """As :meth:`RayMetric.state_dict`, with ``moving``: the speed and the states of both counts."""
        return {**super().state_dict(), "moving": {"speed": self.speed, **{
            name: part.state_dict() for name, part in self._moving.items()}}}

    def load_state_dict(self, state: Mapping) -> None:
        """As :meth:`RayMetric.load_state_dict`; ValueError also if the state is of another speed."""
        state = dict(state)
        moving = state.pop("moving", {})
        if set(moving) != {"speed", *self._moving} or moving["speed"] != self.speed:
            raise ValueError(f"expected a state with objects that move at {self.speed} m/s, found "
                             f"{moving.get('speed')}")
        super().load_state_dict(state)
        for name, part in self._moving.items():
            part.load_state_dict(moving[name])


def _row(rays: np.integer, error: float, error_zero: float) -> dict[str, float]:
    return {"ave": float(error / rays) if rays else math.nan,
            "ave_zero_flow": float(error_zero / rays) if rays else math.nan, "rays": int(rays)}


def format_moving(moving: Mapping[str, Any]) -> str:
    """A line about ``moving`` of :meth:`MovingRayMetric.result`."""
    if not moving["rays"]:
        return f"objects faster than {moving['speed']} m/s: none among the true positives"
    return (f"objects faster than {moving['speed']} m/s: AVE {moving['ave']:.4f} m/s over {moving['rays']} rays, "
            f"{moving['ave_zero_flow']:.4f} with zero flow")
