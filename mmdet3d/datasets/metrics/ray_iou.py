"""RayIoU, mAVE and the occupancy score, as a state of a few counters."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.labels import LabelSet, label_set
from mmdet3d.ops.ray_cast import ray_cast
from mmdet3d.structures import VoxelGrid

from .coverage import Coverage
from .hit_cache import HitCache
from .inputs import CHUNK, Array, as_flow, as_labels, as_origins
from .ray_scores import scores
from .rays import LABEL_GRID, lidar_rays

THRESHOLDS = (1.0, 2.0, 4.0)
"""Largest errors of distance in metres (exclusive) with which a ray still counts as right."""

FLOW_THRESHOLD = 2.0
"""The one of THRESHOLDS whose true positives the flow error is averaged over."""


@dataclasses.dataclass
class RayCounts:
    """What is counted; K labels, free space included (its entries stay meaningless).

    Attributes:
        gt: (K,) int64 rays by ground-truth label.
        pred: (K,) int64 rays by predicted label, among those whose ground truth is not free.
        tp: (3, K) int64 rays whose labels agree and whose distances differ by less than each of THRESHOLDS.
        flow_error: (K,) float64 sum of flow errors in m/s over the true positives at FLOW_THRESHOLD, flow classes only.
        flow_rays: (K,) int64 number of those.
    """

    gt: np.ndarray
    pred: np.ndarray
    tp: np.ndarray
    flow_error: np.ndarray
    flow_rays: np.ndarray

    @classmethod
    def zeros(cls, num_classes: int) -> "RayCounts":
        """Nothing counted."""
        whole = [np.zeros(num_classes, np.int64) for _ in range(3)]
        tp = np.zeros((len(THRESHOLDS), num_classes), np.int64)
        return cls(whole[0], whole[1], tp, np.zeros(num_classes), whole[2])

    def add(self, other: "RayCounts") -> None:
        """Add the counts of ``other``."""
        for field in dataclasses.fields(self):
            getattr(self, field.name)[...] += getattr(other, field.name)


class RayMetric:
    """RayIoU (Liu et al., "Fully Sparse 3D Occupancy Prediction", arXiv 2312.17118), with the flow error (AVE).

    From each origin 14040 rays are cast into the prediction and into the ground truth. Rays that end in free space of
    the ground truth are dropped. A ray is a true positive of a class if both labels are that class and the distances
    differ by less than 1, 2 or 4 m; IoU is true positives over the union of both labels' rays. RayIoU is the mean over
    all classes but free and all three thresholds.

    AVE of a class is the mean Euclidean norm, in m/s, of predicted minus true flow at the voxels that the true
    positives of the 2 m threshold hit; mAVE is the mean over the flow classes that have any. It therefore says nothing
    of what was not found: read it with ``flow_rays``, the number of rays it averages over. True flow is rounded to
    float16 first, as the reference evaluation does. The occupancy score is
    ``0.9 * RayIoU + 0.1 * max(1 - mAVE, 0)``.

    Only counters and the tokens of the samples are kept. ``add`` samples as predictions arrive, in any process;
    ``merge`` the states; ``check_coverage``; read ``result``.

    Args:
        labels: Label set, or its name.
        grid: Where the label grids lie; cubic voxels.
        device: Where to compute. Default: where the predicted labels are; for NumPy arrays the CPU.
        cache: Keeps where rays hit the ground truth, for the next evaluation.
    """

    def __init__(self, labels: LabelSet | str, *, grid: VoxelGrid = LABEL_GRID,
                 device: torch.device | str | None = None, cache: HitCache | None = None) -> None:
        self.labels = label_set(labels) if isinstance(labels, str) else labels
        if len(set(grid.cell)) != 1:
            raise ValueError(f"rays need cubic voxels, got {grid.cell}")
        self.grid = grid
        self.counts = RayCounts.zeros(self.labels.num_classes)
        self.coverage = Coverage()
        self._device = None if device is None else torch.device(device)
        self._cache = cache
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def add(self, token: str, pred_semantics: Array, gt_semantics: Array, origins: Array,
            pred_flow: Array | None = None, gt_flow: Array | None = None) -> None:
        """Count one sample.

        Args:
            token: Name of the sample; each counts once.
            pred_semantics: (X, Y, Z) predicted labels.
            gt_semantics: (X, Y, Z) true labels.
            origins: (T, 3) positions in the ego frame in metres; T may be 0. One outside the grid has the effect that
                :func:`mmdet3d.ops.ray_cast.ray_cast` says, "no voxel" counting as voxel (0, 0, 0).
            pred_flow: (X, Y, Z, 2) predicted velocity (x, y) in m/s. Default: zero.
            gt_flow: (X, Y, Z, 2) true velocity. Default: zero. If it is not finite where a true positive hits, AVE of
                that class becomes NaN (and is left out of mAVE) or infinite, as in the reference evaluation.

        Raises:
            CoverageError: the sample was added before.
            ValueError: shapes are wrong, a label is not in the class table, origins are not finite, or the predicted
                flow is not finite at a true positive. Nothing was counted then.
            TypeError: labels are no integers or flow no floating point numbers.
        """
        self.coverage.refuse_seen(token)
        device = self._device_of(pred_semantics)
        size, count = self.grid.size_xyz, self.labels.num_classes
        pred = as_labels("pred_semantics", pred_semantics, size, count, device)
        gt = as_labels("gt_semantics", gt_semantics, size, count, device)
        flows = [None if flow is None else as_flow(name, flow, size, device)
                 for name, flow in (("pred_flow", pred_flow), ("gt_flow", gt_flow))]
        positions = as_origins(origins)
        counted = self._count(pred, gt, positions, *flows)
        self.coverage.claim(token)
        self.counts.add(counted)

    def merge(self, other: "RayMetric") -> None:
        """Add what ``other`` has counted.

        Raises:
            ValueError: it has another label set or grid.
            CoverageError: both have seen the same sample.
        """
        if (other.labels, other.grid) != (self.labels, self.grid):
            raise ValueError(f"cannot merge a metric of {other.labels.name} on {other.grid} into one of "
                             f"{self.labels.name} on {self.grid}")
        self.coverage.merge(other.coverage)
        self.counts.add(other.counts)

    def check_coverage(self, expected: list[str]) -> None:
        """Raises CoverageError, with tokens, unless exactly the ``expected`` samples were added."""
        self.coverage.check(expected)

    def result(self) -> dict:
        """Scores as fractions, not percent; see :func:`mmdet3d.datasets.metrics.ray_scores.scores`."""
        return scores(self.counts, self.labels, samples=len(self.coverage))

    def state_dict(self) -> dict:
        """Plain arrays and strings; :meth:`load_state_dict` is the inverse."""
        counts = {field.name: getattr(self.counts, field.name).copy() for field in dataclasses.fields(RayCounts)}
        return {"classes": self.labels.classes, "grid": dataclasses.astuple(self.grid), "tokens": self.coverage.tokens,
                **counts}

    def load_state_dict(self, state: Mapping) -> None:
        """Replace what was counted.

        Raises:
            ValueError: keys are missing or unknown, or the state is of another class table or grid.
        """
        names = [field.name for field in dataclasses.fields(RayCounts)]
        if set(state) != {"classes", "grid", "tokens", *names}:
            raise ValueError(f"a RayMetric state has classes, grid, tokens, {', '.join(names)}; got {sorted(state)}")
        grid = tuple(tuple(part) for part in state["grid"])
        if (tuple(state["classes"]), grid) != (self.labels.classes, dataclasses.astuple(self.grid)):
            raise ValueError(f"the state is of other classes or another grid than {self.labels.name}")
        self.coverage = Coverage(state["tokens"])
        self.counts = RayCounts(**{name: np.array(state[name]) for name in names})

    def _device_of(self, prediction: Array) -> torch.device:
        if self._device is not None:
            return self._device
        return prediction.device if isinstance(prediction, Tensor) else torch.device("cpu")

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(R, 3) rays, and (K,) bool whether a class can move."""
        if device not in self._constants:
            moving = torch.from_numpy(self.labels.flow_mask[: self.labels.num_classes])
            self._constants[device] = torch.from_numpy(lidar_rays()).to(device), moving.to(device)
        return self._constants[device]

    def _cast(self, grids: list[Tensor], origins: np.ndarray) -> tuple[Tensor, Tensor]:
        """(G, T * R) int64 voxels and float32 distances of the same rays in each of G grids."""
        device, count = grids[0].device, len(origins)
        starts = torch.from_numpy(np.tile(origins, (len(grids), 1))).to(device)
        index = torch.arange(len(grids), device=device).repeat_interleave(count)
        rays, _ = self._constants_on(device)
        hits = ray_cast(torch.stack(grids), starts, rays, index, free_label=self.labels.free_index, low=self.grid.low,
                        cell_size=self.grid.cell[0])
        return hits.voxel.view(len(grids), -1).long(), hits.distance.view(len(grids), -1)

    def _cast_both(self, pred: Tensor, gt: Tensor, origins: np.ndarray) -> tuple[Tensor, Tensor]:
        """As :meth:`_cast`, of prediction and ground truth, the latter from the cache if possible."""
        if self._cache is None:
            return self._cast([pred, gt], origins)
        key = self._cache.key(gt.cpu().numpy(), origins, self.labels.free_index, self.grid)
        found = self._cache.load(key, len(origins) * len(lidar_rays()), self.grid.num_voxels)
        if found is None:
            both = self._cast([pred, gt], origins)
            self._cache.save(key, both[0][1].int().cpu().numpy(), both[1][1].cpu().numpy())
            return both
        voxel, distance = self._cast([pred], origins)
        known = [torch.from_numpy(array).to(pred.device) for array in found]
        return torch.cat([voxel, known[0][None].long()]), torch.cat([distance, known[1][None]])

    def _count(self, pred: Tensor, gt: Tensor, origins: np.ndarray, pred_flow: Tensor | None,
               gt_flow: Tensor | None) -> RayCounts:
        voxel, distance = self._cast_both(pred, gt, origins)
        _, moving = self._constants_on(gt.device)
        counts = RayCounts.zeros(self.labels.num_classes)
        rays = voxel.shape[1]
        size = min(rays, CHUNK) if voxel.device.type == "cpu" else rays
        for first in range(0, rays, max(size, 1)):
            part = slice(first, first + size)
            pred_voxel, gt_voxel = voxel[0, part], voxel[1, part]
            pred_label, gt_label = pred.flatten()[pred_voxel].long(), gt.flatten()[gt_voxel].long()
            error = (distance[0, part].double() - distance[1, part].double()).abs()
            self._count_labels(counts, pred_label, gt_label, error)
            found = ((gt_label == pred_label) & (error < FLOW_THRESHOLD) & moving[gt_label]).nonzero()[:, 0]
            label = gt_label[found].cpu().numpy()
            flow_error = _flow_errors(pred_flow, gt_flow, pred_voxel[found], gt_voxel[found])
            counts.flow_rays += np.bincount(label, minlength=len(counts.gt))
            counts.flow_error += np.bincount(label, weights=flow_error, minlength=len(counts.gt))
        return counts

    def _count_labels(self, counts: RayCounts, pred_label: Tensor, gt_label: Tensor, error: Tensor) -> None:
        """Add rays to ``gt``, ``pred`` and ``tp``: one histogram over (thresholds met, true label, predicted label)."""
        classes, thresholds = self.labels.num_classes, len(THRESHOLDS)
        within = sum((error < threshold).long() for threshold in THRESHOLDS)
        cells = (within * classes + gt_label) * classes + pred_label
        table = torch.bincount(cells, minlength=(thresholds + 1) * classes * classes).cpu().numpy()
        table = table.reshape(-1, classes, classes)
        table[:, self.labels.free_index] = 0
        counts.gt += table.sum((0, 2))
        counts.pred += table.sum((0, 1))
        right = np.diagonal(table, axis1=1, axis2=2)
        counts.tp += np.stack([right[thresholds - rank:].sum(0) for rank in range(thresholds)])


def _flow_errors(pred_flow: Tensor | None, gt_flow: Tensor | None, pred_voxel: Tensor, gt_voxel: Tensor) -> np.ndarray:
    """(rays,) float64 norms of predicted minus true flow in m/s; a flow that is None is zero."""
    zero = torch.zeros(len(pred_voxel), 2, dtype=torch.float64, device=pred_voxel.device)
    predicted = zero if pred_flow is None else pred_flow.reshape(-1, 2)[pred_voxel].double()
    true = zero if gt_flow is None else gt_flow.reshape(-1, 2)[gt_voxel].half().double()
    difference = true - predicted
    errors = (difference[:, 0] * difference[:, 0] + difference[:, 1] * difference[:, 1]).sqrt().cpu().numpy()
    if not np.isfinite(errors).all() and (wrong := int((~predicted.isfinite().all(dim=1)).sum())):
        raise ValueError(f"pred_flow is not finite where {wrong} of {len(predicted)} true-positive rays hit")
    return errors
