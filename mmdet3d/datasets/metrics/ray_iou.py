"""RayIoU, mAVE and the occupancy score, as a state of a few counters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.labels import LabelSet, label_set
from mmdet3d.ops.ray_cast import ray_cast
from mmdet3d.ops.ray_counts import GT_LABEL, PRED_LABEL, RayTotals, ray_counts
from mmdet3d.structures import VoxelGrid

from .coverage import Coverage
from .hit_cache import HitCache
from .inputs import Array, as_flow, as_labels, as_origins, label_text, upload
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

    @classmethod
    def of(cls, totals: RayTotals) -> "RayCounts":
        """Counts in the memory of the CPU."""
        rows = totals.counts.numpy()
        return cls(rows[0], rows[1], rows[2:5], totals.flow_error.numpy(), rows[5])


class CastRays(NamedTuple):
    """The rays of a sample after they were cast, all on one device, as :func:`mmdet3d.ops.ray_counts` takes them.

    Attributes:
        grids: (2, X, Y, Z) uint8 labels of prediction and ground truth.
        voxel: (2, T * R) int32 flat index of the voxel in which each ray ends, in prediction and ground truth.
        distance: (2, T * R) float32 metres to there.
        pred_flow: (X, Y, Z, 2) predicted velocity (x, y) in m/s; None: zero.
        gt_flow: (X, Y, Z, 2) float16 true velocity; None: zero.
    """

    grids: Tensor
    voxel: Tensor
    distance: Tensor
    pred_flow: Tensor | None
    gt_flow: Tensor | None


class _Place(NamedTuple):
    """What a device holds.

    Attributes:
        rays: (R, 3) float64.
        totals: What was counted there and not fetched.
        index: By numbers of grids and origins: the grid of each of their casts.
    """

    rays: Tensor
    totals: RayTotals
    index: dict[tuple[int, int], Tensor]


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

    On a GPU the counters lie there, and ``add`` does not wait for it: they are fetched when they are asked for, by
    ``settle``, ``merge``, ``result``, ``state_dict`` or ``counts``. A sample gives the same bits on CPU and GPU, with
    any number of threads; sums of flow errors over samples may differ in the last digits if they are added, merged or
    fetched in another order.

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
        self.coverage = Coverage()
        self._counts = RayCounts.zeros(self.labels.num_classes)
        self._device = None if device is None else torch.device(device)
        self._cache = cache
        self._places: dict[torch.device, _Place] = {}
        self._failure: str | None = None

    @property
    def counts(self) -> RayCounts:
        """What was counted so far; raises as :meth:`settle` does."""
        self.settle()
        return self._counts

    def add(self, token: str, pred_semantics: Array, gt_semantics: Array, origins: Array,
            pred_flow: Array | None = None, gt_flow: Array | None = None) -> None:
        """Count one sample.

        A GPU is not waited for if origins are in the memory of the CPU, labels on the GPU are uint8 and no cache is
        used. Some errors then come later: see :meth:`settle`.

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
        device = self._device_of(pred_semantics)
        size, count = self.grid.size_xyz, self.labels.num_classes
        pred = as_labels("pred_semantics", pred_semantics, size, count, device)
        gt = as_labels("gt_semantics", gt_semantics, size, count, device)
        predicted = None if pred_flow is None else as_flow("pred_flow", pred_flow, size, device)
        true = None if gt_flow is None else as_flow("gt_flow", gt_flow, size, device).half()
        if predicted is not None and predicted.dtype == torch.bfloat16:
            predicted = predicted.float()
        grids = torch.stack([pred, gt])
        self.count(token, CastRays(grids, *self._cast_both(grids, as_origins(origins)), predicted, true))

    def count(self, token: str, rays: CastRays) -> None:
        """Count one sample whose rays were cast; as :meth:`add` otherwise."""
        self.coverage.refuse_seen(token)
        totals = self._place(rays.grids.device).totals
        ray_counts(totals, *rays, free_label=self.labels.free_index, flow_classes=self.labels.flow_classes,
                   thresholds=THRESHOLDS, flow_threshold=FLOW_THRESHOLD, sample=len(self.coverage))
        if rays.grids.device.type == "cpu" and (problem := self._fetch(totals)):
            raise ValueError(_problem_text(problem, None, self.labels.num_classes))
        self.coverage.claim(token)

    def settle(self) -> None:
        """Wait for what GPUs still count, and fetch it.

        Raises:
            ValueError: a sample that was added from a GPU has a label outside the class table, or a predicted flow that
                is not finite at a true positive; names the first such sample. No result can be had then, however often
                it is asked for, until :meth:`load_state_dict` starts again.
        """
        for place in self._places.values():
            if (problem := self._fetch(place.totals)) and self._failure is None:
                token = self.coverage.tokens[problem[1]]
                self._failure = _problem_text(problem, token, self.labels.num_classes)
        if self._failure is not None:
            raise ValueError(self._failure)

    def merge(self, other: "RayMetric") -> None:
        """Add what ``other`` has counted.

        Raises:
            ValueError: it has another label set or grid, or one of both holds a sample that cannot be counted, see
                :meth:`settle`.
            CoverageError: both have seen the same sample.
        """
        if (other.labels, other.grid) != (self.labels, self.grid):
            raise ValueError(f"cannot merge a metric of {other.labels.name} on {other.grid} into one of "
                             f"{self.labels.name} on {self.grid}")
        counts = other.counts
        self.settle()
        self.coverage.merge(other.coverage)
        self._counts.add(counts)

    def check_coverage(self, expected: list[str]) -> None:
        """Raises CoverageError, with tokens, unless exactly the ``expected`` samples were added."""
        self.coverage.check(expected)

    def result(self) -> dict:
        """Scores as fractions, not percent; see :func:`mmdet3d.datasets.metrics.ray_scores.scores`."""
        return scores(self.counts, self.labels, samples=len(self.coverage))

    def state_dict(self) -> dict:
        """Plain arrays and strings; :meth:`load_state_dict` is the inverse. Raises as :meth:`settle` does."""
        counts = {name: array.copy() for name, array in vars(self.counts).items()}
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
        for place in self._places.values():
            place.totals.memory.zero_()
        self._failure = None
        self.coverage = Coverage(state["tokens"])
        self._counts = RayCounts(**{name: np.array(state[name]) for name in names})

    def _device_of(self, prediction: Array) -> torch.device:
        if self._device is not None:
            return self._device
        return prediction.device if isinstance(prediction, Tensor) else torch.device("cpu")

    def _place(self, device: torch.device) -> _Place:
        """What ``device`` holds, made at the first use."""
        if device not in self._places:
            rays = torch.from_numpy(lidar_rays()).double().to(device)
            self._places[device] = _Place(rays, RayTotals(self.labels.num_classes, device), {})
        return self._places[device]

    def _fetch(self, totals: RayTotals) -> list[int] | None:
        """Add what was counted to the counts here; returns what is wrong with a sample, if it could not be counted."""
        taken = totals.take()
        self._counts.add(RayCounts.of(taken))
        problem = taken.problem.tolist()
        return problem if problem[0] else None

    def _cast(self, grids: Tensor, origins: np.ndarray) -> tuple[Tensor, Tensor]:
        """(G, T * R) int32 voxels and float32 distances of the same rays in each of (G, X, Y, Z) grids."""
        place, key = self._place(grids.device), (len(grids), len(origins))
        if key not in place.index:
            place.index[key] = upload(torch.arange(key[0]).repeat_interleave(key[1]), grids.device)
        starts = upload(torch.from_numpy(np.tile(origins, (len(grids), 1))), grids.device)
        hits = ray_cast(grids, starts, place.rays, place.index[key], free_label=self.labels.free_index,
                        low=self.grid.low, cell_size=self.grid.cell[0])
        return hits.voxel.view(len(grids), -1), hits.distance.view(len(grids), -1)

    def _cast_both(self, grids: Tensor, origins: np.ndarray) -> tuple[Tensor, Tensor]:
        """As :meth:`_cast`, of prediction and ground truth, the latter from the cache if possible."""
        if self._cache is None:
            return self._cast(grids, origins)
        key = self._cache.key(grids[1].cpu().numpy(), origins, self.labels.free_index, self.grid)
        found = self._cache.load(key, len(origins) * len(lidar_rays()), self.grid.num_voxels)
        if found is None:
            voxel, distance = self._cast(grids, origins)
            self._cache.save(key, voxel[1].cpu().numpy(), distance[1].cpu().numpy())
            return voxel, distance
        voxel, distance = self._cast(grids[:1], origins)
        known = [upload(torch.from_numpy(array), grids.device)[None] for array in found]
        return torch.cat([voxel, known[0]]), torch.cat([distance, known[1]])


def _problem_text(problem: Sequence[int], token: str | None, num_classes: int) -> str | None:
    """Why ``RayTotals.problem`` says that samples could not be counted, None if all were; ``token``: the first one."""
    samples, _, kind, value, of = problem
    if not samples:
        return None
    if kind in (PRED_LABEL, GT_LABEL):
        text = label_text("pred_semantics" if kind == PRED_LABEL else "gt_semantics", value, num_classes)
    else:
        text = f"pred_flow is not finite where {value} of {of} true-positive rays hit"
    more = f"; {samples - 1} more samples cannot be counted" if samples > 1 else ""
    return text if token is None else f"{text} (sample {token}{more})"
