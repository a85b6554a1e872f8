"""Walk through a data set with a model, score or write each prediction as it appears, and add up at the end."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from mmdet3d.core.evaluation.collection import exact_collection, gather, published_collection
from mmdet3d.core.evaluation.prediction_files import PredictionFiles
from mmdet3d.core.evaluation.samples import EvaluationSamples
from mmdet3d.core.predictor import SCENE_STARTS, Predictor, check_options
from mmdet3d.core.random_state import preserved_random_state
from mmdet3d.datasets.loader import build_dataloader
from mmdet3d.datasets.metrics.coverage import CoverageError
from mmdet3d.datasets.samplers.sequence import distributed_place
from mmdet3d.datasets.scoring import GroundTruth, GroundTruthSource, SampleScore, SampleScorer, Summary, summarise
from mmdet3d.utils.text import listing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatorOptions:
    """How a model is evaluated. With the defaults the result does not depend on the number of processes or workers.

    Attributes:
        samples_per_gpu: Batch size of a process. The published temporal attention mixes the samples of a batch, so
            that results with more than 1 depend on which samples meet.
        workers_per_gpu: Worker processes that load.
        order: "exact": every sample once. "published": the order of the published evaluation, in which some samples
            come twice and, with most numbers of processes, some never; collected as it collects.
        scene_start: Memory at the first frame of a scene, see :class:`~mmdet3d.core.predictor.Predictor`; "carried" as
            the published evaluation.
        noise_seed: Seed of the flow head's noise, which then depends on the sample only. None: torch's generator, as
            the published evaluation.
        mode: Arithmetic, see :class:`~mmdet3d.core.predictor.Predictor`.
        fold: Fold batch norms into convolutions, likewise.
        score: Compare with the ground truth.
        out: Folder for predictions, or None.
        pairing: Whose lidar positions a sample is seen from, see :class:`~mmdet3d.datasets.lidar_origins.LidarOrigins`.
        scenes: ``scene.json``, for the pairing "index".
        cache: Folder that keeps where rays hit the ground truth.
        graphs: CUDA graphs; the result is the same.
    """

    samples_per_gpu: int = 1
    workers_per_gpu: int = 4
    order: str = "exact"
    scene_start: str = SCENE_STARTS[0]
    noise_seed: int | None = 0
    mode: str = "exact"
    fold: bool = True
    score: bool = True
    out: str | None = None
    pairing: str = "token"
    scenes: str | None = None
    cache: str | None = None
    graphs: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation; the same in all processes.

    Attributes:
        summary: Scores; None if nothing was compared.
        samples: Number of samples that were predicted.
        seconds: Duration.
        world_size: Number of processes.
        options: How it was done.
        scores: Of every sample, in the order in which they were added up; empty if nothing was compared.
    """

    summary: Summary | None
    samples: int
    seconds: float
    world_size: int
    options: EvaluatorOptions
    scores: Sequence[SampleScore] = ()

    def record(self) -> dict[str, Any]:
        """Everything as plain numbers, strings and containers; NaN where nothing was counted."""
        record = {"samples": self.samples, "seconds": round(self.seconds, 3), "world_size": self.world_size,
                  "options": asdict(self.options)}
        if self.summary is not None:
            record.update(self.summary.record(), missing=list(self.summary.missing))
        return record


class Evaluator:
    """Evaluates models on one data set.

    Args:
        dataset: Data set in test mode.
        options: How.
        loader_options: Further arguments of :func:`~mmdet3d.datasets.loader.build_dataloader`.

    Raises:
        ValueError: an option is out of range.
        DataError: the ground truth cannot be set up.
    """

    def __init__(self, dataset: Dataset, options: EvaluatorOptions | None = None,
                 loader_options: Mapping[str, Any] | None = None) -> None:
        self.dataset, self.options = dataset, options or EvaluatorOptions()
        check_options(self.options.scene_start, self.options.mode, self.options.fold)
        truth = GroundTruthSource(dataset, self.options.pairing, self.options.scenes) if self.options.score else None
        samples = EvaluationSamples(dataset, truth)
        self.loader = build_dataloader(samples, self.options.samples_per_gpu, self.options.workers_per_gpu,
                                       training=False, order=self.options.order,
                                       **{"persistent_workers": False, **(loader_options or {})})

    def run(self, model: nn.Module | Predictor) -> Evaluation:
        """Evaluate a model; to be called by all processes.

        Its weights, mode and ``memory`` and the states of all global random generators are left alone.

        Args:
            model: The detector, not wrapped, or :meth:`predictor` of it.

        Raises:
            CoverageError: samples are missing or came twice; the message lists them.
            ValueError: a prediction does not fit; the message names the sample.
            OSError: a prediction could not be written.
        """
        start = time.perf_counter()
        predictor = model if isinstance(model, Predictor) else self.predictor(model)
        with preserved_random_state(predictor.runner.device):
            own = list(self._batches(predictor))
        tokens = [self.dataset.data_infos[index]["token"] for index in range(len(self.dataset))]
        ranks = gather(own)
        summary, scores = None, ()
        samples = len({score.index for batches in ranks for batch in batches for score in batch})
        if self.options.score:
            exact = self.options.order == "exact"
            scores = exact_collection(ranks) if exact else published_collection(ranks, len(tokens))
            summary = self._summary(scores, tokens)
        elif self.options.order == "exact" and samples != len(tokens):
            raise CoverageError(f"{len(tokens) - samples} of {len(tokens)} samples were not predicted")
        return Evaluation(summary, samples, time.perf_counter() - start, len(ranks), self.options, scores)

    def _summary(self, scores: Sequence[SampleScore], tokens: Sequence[str]) -> Summary:
        summary = summarise(scores, self.dataset.labels, tokens, self.dataset.eval_metric,
                            allow_missing=self.options.order != "exact")
        if summary.missing and distributed_place()[0] == 0:
            logger.warning("the published order left out %d of %d samples: %s", len(summary.missing), len(tokens),
                           listing(summary.missing))
        return summary

    def predictor(self, model: nn.Module, inplace: bool = False) -> Predictor:
        """Make what predicts with a model under the options; ``inplace`` as for :class:`Predictor`."""
        options = self.options
        return Predictor(model, scene_start=options.scene_start, noise_seed=options.noise_seed, mode=options.mode,
                         fold=options.fold, graphs=options.graphs, inplace=inplace)

    def _batches(self, predictor: Predictor) -> Iterator[list[SampleScore]]:
        """Scores of one batch after the other, each computed while the model works on the next one."""
        scorer = SampleScorer(self.dataset.labels, cache=self.options.cache) if self.options.score else None
        memory, lane = None, _Lane(predictor.runner.device)
        quiet = distributed_place()[0] != 0 or not sys.stderr.isatty()
        waiting: _Predicted | None = None
        with contextlib.ExitStack() as stack:
            files = None if self.options.out is None else stack.enter_context(PredictionFiles(self.options.out))
            for batch in tqdm(self.loader, unit="batch", disable=quiet, dynamic_ncols=True):
                metas = batch["img_metas"]
                semantics, flow, memory = predictor(batch["img_inputs"], metas, memory)
                predicted = _Predicted(metas, semantics, flow, batch.get("ground_truth"), lane.mark())
                if waiting is not None:
                    yield self._finish(waiting, lane, scorer, files)
                waiting = predicted
            if waiting is not None:
                yield self._finish(waiting, lane, scorer, files)

    @staticmethod
    def _finish(batch: _Predicted, lane: _Lane, scorer: SampleScorer | None, files: PredictionFiles | None
                ) -> list[SampleScore]:
        """Write and score the predictions of a batch."""
        scores = []
        with lane.after(batch.mark):
            for place, meta in enumerate(batch.metas):
                semantics, flow = batch.semantics[place], batch.flow[place]
                if files is not None:
                    files.add(meta["scene_name"], meta["sample_idx"], semantics, flow)
                scores.append(SampleScore(int(meta["index"]), meta["sample_idx"], {}, {}) if scorer is None
                              else scorer(batch.truths[place], semantics, flow))
        return scores


@dataclass(frozen=True)
class _Predicted:
    """A batch whose predictions are to be scored, once the device has passed ``mark``."""

    metas: Sequence[Mapping]
    semantics: Tensor
    flow: Tensor
    truths: Sequence[GroundTruth] | None
    mark: Any


class _Lane:
    """A stream of its own for scores on a GPU: to read counters back there does not wait for the next prediction.

    Args:
        device: Device of the model; on a CPU everything happens in turn.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """The place that the model's stream has reached."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    @contextlib.contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        """What is asked of the device inside happens after ``mark``, and is finished at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield
            self._stream.synchronize()  # before the memory of the predictions serves the model again
