"""nuScenes with six cameras and occupancy labels, frame after frame, in sequences."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mmdet3d.datasets.info_store import InfoStore, RecordWindow
from mmdet3d.datasets.infos import adjacent_offsets, load_infos, sample_record, scene_name, sequence_flags
from mmdet3d.datasets.labels import label_set
from mmdet3d.datasets.pipelines.annotations import Box3DMode, LiDARBoxes
from mmdet3d.datasets.pipelines.compose import Compose
from mmdet3d.datasets.pipelines.occupancy import ground_truth_step
from mmdet3d.datasets.scoring import GroundTruthSource, first_results, score_results
from mmdet3d.interfaces import RemembersSamples, offers
from mmdet3d.registry import DATASETS
from mmdet3d.utils.files import prediction_path, save_prediction

EVAL_METRICS = ("rayiou", "miou")
MODALITIES = ("use_lidar", "use_camera", "use_radar", "use_map", "use_external")


@DATASETS.register_module(name=("NuScenesOccupancyDataset", "NuScenesDatasetOccpancy"))
class NuScenesOccupancyDataset(Dataset):
    """Samples of an info file.

    The records are sorted by time; the position of a record is the sample index everywhere. They are never changed, and
    loader workers share them (:class:`mmdet3d.datasets.info_store.InfoStore`).

    Args:
        ann_file: Info pickle, see :func:`mmdet3d.datasets.infos.load_infos`.
        pipeline: Steps that make a sample of the dict of :meth:`get_data_info`.
        data_root: Accepted as published configs have it; paths are those of the records, below the working directory
            or beside the info file.
        classes: Names of the boxes' classes, for steps that read boxes.
        modality: Which sensors the model takes: cameras.
        box_type_3d: "LiDAR".
        filter_empty_gt: False: no sample is left out or replaced.
        test_mode: For evaluation: sequences are not split.
        stereo: Add the frame before the oldest adjacent one, for stereo depth.
        img_info_prototype: "bevdet4d": adjacent frames with poses.
        multi_adj_frame_id_cfg: (start, stop, step) of the offsets of the adjacent frames.
        use_sequence_group_flag: True: samples come in sequences.
        sequences_split_num: Cut every scene into this many sequences; "all": every sample is one.
        use_valid_flag: Accepted as published configs have it; nothing is filtered by boxes.
        load_interval: Keep every ``load_interval``-th record.
        dataset_name: Label set, "openocc" or "occ3d".
        eval_metric: Metric of the evaluation, "rayiou" or "miou".
        label_options: Options of the step that loads the labels of :meth:`ground_truth`, such as
            ``dict(coarsen=(5, 5, 2))`` for a model with a coarser grid than the label files.
        eval_show: Draw samples while evaluating.
        work_dir: Where evaluation results go.

    Attributes:
        flag: (N,) int64 sequence of every sample, ascending; what samplers read.
        data_infos: The records, :class:`~mmdet3d.datasets.info_store.InfoStore`.
        labels: The label set.
        rng: Where random draws come from; None: NumPy's global generator, which the loader seeds in every worker.

    Raises:
        ValueError: an option has a value that is not supported.
        mmdet3d.datasets.infos.DataError: the info file cannot be read.
        mmdet3d.registry.ConfigError: a step of the pipeline does not fit.
    """

    def __init__(self, ann_file: str | os.PathLike, pipeline: Sequence[Mapping | Callable], *,
                 data_root: str | None = None, classes: Sequence[str] | None = None, modality: Mapping | None = None,
                 box_type_3d: str = "LiDAR", filter_empty_gt: bool = False, test_mode: bool = False,
                 stereo: bool = True, img_info_prototype: str = "bevdet4d",
                 multi_adj_frame_id_cfg: Sequence[int] = (1, 2, 1), use_sequence_group_flag: bool = True,
                 sequences_split_num: int | str = 1, use_valid_flag: bool = False, load_interval: int = 1,
                 dataset_name: str = "openocc", eval_metric: str = "rayiou", label_options: Mapping | None = None,
                 eval_show: bool = False, work_dir: str | None = None) -> None:
        _check_choice("box_type_3d", box_type_3d, ("LiDAR",))
        _check_choice("img_info_prototype", img_info_prototype, ("bevdet4d",))
        _check_choice("eval_metric", eval_metric, EVAL_METRICS)
        _check_choice("filter_empty_gt", filter_empty_gt, (False,))
        _check_choice("use_sequence_group_flag", use_sequence_group_flag, (True,))
        _check_modality(modality)
        if not isinstance(load_interval, int) or load_interval < 1:
            raise ValueError(f"load_interval: expected a positive whole number, got {load_interval!r}")
        if test_mode and sequences_split_num != 1:
            raise ValueError("sequences_split_num: evaluation needs whole sequences (1), got "
                             f"{sequences_split_num!r} with test_mode=True")
        self.ann_file = str(ann_file)
        self.CLASSES = None if classes is None else tuple(classes)
        self.test_mode = test_mode
        self.labels = label_set(dataset_name)
        self.dataset_name, self.eval_metric = dataset_name, eval_metric
        self.eval_show, self.work_dir = eval_show, work_dir
        self._labels = ground_truth_step(self.labels, label_options)
        self.offsets = adjacent_offsets(multi_adj_frame_id_cfg, stereo)
        self.pipeline = Compose(pipeline)
        self.rng: np.random.RandomState | None = None
        infos = self.load_annotations(ann_file, load_interval)
        if not infos:
            raise ValueError(f"{type(self).__name__} keeps no sample of {ann_file}")
        self.flag = sequence_flags(infos, sequences_split_num)
        self.data_infos = InfoStore(infos)

    def load_annotations(self, ann_file: str | os.PathLike, load_interval: int = 1) -> list[dict]:
        """Read the records of all samples, as docs/data.md describes them, in time order; for other files, override it.

        Args:
            ann_file: Info pickle.
            load_interval: Keep every ``load_interval``-th record.

        Raises:
            mmdet3d.datasets.infos.DataError: the file cannot be read.
        """
        return load_infos(ann_file, load_interval)

    def __len__(self) -> int:
        return len(self.data_infos)

    def __getitem__(self, index: int) -> Any:
        """The sample at ``index`` as the pipeline makes it. A sample that fails is an error, never replaced.

        Raises:
            IndexError: there is no such sample.
            mmdet3d.datasets.infos.DataError: a file of the sample is missing or damaged.
        """
        return self.pipeline(self.get_data_info(index))

    def get_data_info(self, index: int) -> dict:
        """What the pipeline starts from: a new dict that shares nothing with the data set.

        Returns:
            The entries of :func:`mmdet3d.datasets.infos.sample_record` and ``ann_infos``, ``sweeps`` (None, and an
            empty list, where the record has none), ``box_type_3d``, ``box_mode_3d``, ``rng`` and empty lists of fields.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample index {index} is not in 0..{len(self) - 1}")
        results = sample_record(RecordWindow(self.data_infos), int(index), self.flag, self.offsets, self.ann_file)
        info = results["curr"]
        results.update(ann_infos=info.get("ann_infos"), sweeps=info.get("sweeps", []), box_type_3d=LiDARBoxes,
                       box_mode_3d=Box3DMode.LIDAR, rng=self.rng)
        for field in ("img", "bbox3d", "pts_mask", "pts_seg", "bbox", "mask", "seg"):
            results[f"{field}_fields"] = []
        return results

    def ground_truth(self, index: int) -> dict[str, np.ndarray | None]:
        """What a prediction of the sample at ``index`` is compared with; nothing is augmented.

        Returns:
            ``semantics`` (X, Y, Z) labels, in the integer type of the file; ``flow`` (X, Y, Z, 2) in m/s, None for
            Occ3D; ``mask_camera`` (X, Y, Z) uint8, 1 where cameras see, None for OpenOcc.

        Raises:
            IndexError: there is no such sample.
            mmdet3d.datasets.infos.DataError: the label file is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample index {index} is not in 0..{len(self) - 1}")
        info = self.data_infos[int(index)]
        found = self._labels({"sample_idx": info["token"], "occ_gt_path": info["occ_path"], "info_file": self.ann_file})
        return {"semantics": found["voxel_semantics"], "flow": found.get("voxel_flows"),
                "mask_camera": found.get("mask_camera")}

    def evaluate(self, results: Sequence[Mapping], metric: Any = None, logger: logging.Logger | None = None, *,
                 pairing: str = "token", scenes: str | os.PathLike | None = None, allow_missing: bool = False
                 ) -> dict[str, float]:
        """Scores of the results of a test loop; the table goes to the log.

        To score predictions as they appear, without keeping them, see :class:`mmdet3d.core.evaluation.Evaluator`.

        Args:
            results: Dicts with ``occ_results`` [B, X, Y, Z], ``flow_results`` [B, X, Y, Z, 2] and ``index``, B numbers
                of samples. Of several results of a sample the first one counts.
            metric: Not read; what is computed says ``eval_metric``.
            logger: Where the table goes; default: the one of this module.
            pairing: See :class:`~mmdet3d.datasets.lidar_origins.LidarOrigins`.
            scenes: Likewise.
            allow_missing: Score the samples that are there.

        Returns:
            ``miou`` and ``mave``, RayIoU as a fraction and m/s; or, with the metric "miou", ``miou`` in percent.

        Raises:
            mmdet3d.datasets.metrics.coverage.CoverageError: samples are missing; the message lists them.
            ValueError: a result does not fit.
        """
        summary = score_results(self, results, GroundTruthSource(self, pairing, scenes), allow_missing)
        (logger or logging.getLogger(__name__)).info("\n%s", summary.table())
        return summary.headline

    def format_results(self, results: Sequence[Mapping], out: str | os.PathLike = "results") -> list[Path]:
        """Write the results of a test loop to ``<out>/<scene>/<token>.npz``; see :meth:`evaluate`.

        Returns:
            The files.

        Raises:
            ValueError: a result does not fit.
        """
        paths = []
        for index, semantics, flow in first_results(results, len(self)):
            info = self.data_infos[index]
            paths.append(prediction_path(out, scene_name(info), info["token"]))
            save_prediction(paths[-1], semantics, flow)
        return paths

    def seed(self, seed: int) -> None:
        """Give this copy of the data set a generator of its own, with the draws of a global one seeded so.

        To be called in every worker with a seed of its own; NumPy's global generator is then left alone.
        """
        self.rng = np.random.RandomState(seed)

    def remember_samples(self, samples_per_batch: int) -> None:
        """Keep as many images at test time as the sequences of a batch need; see ``PrepareImageInputs``."""
        for step in self.pipeline:
            if offers(step, RemembersSamples):
                step.remember_samples(samples_per_batch)


def _check_choice(name: str, value: Any, accepted: Sequence) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, accepted))}, got {value!r}")


def _check_modality(modality: Mapping | None) -> None:
    if modality is None:
        return
    if unknown := sorted(set(modality) - set(MODALITIES)):
        raise ValueError(f"modality: unknown keys {unknown}; accepted: {list(MODALITIES)}")
    if not modality.get("use_camera", True):
        raise ValueError("modality: use_camera must be True; the model takes camera images")
