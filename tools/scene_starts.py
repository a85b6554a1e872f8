"""Compare what the first frame of a scene may find as memory: RayIoU and mAVE of the first frames, by scene.

    python tools/scene_starts.py CONFIG CHECKPOINT --seeds 0 1 2 --json starts.json

The test data of the config are evaluated with each start of a scene (docs/testing.md) and each seed of the flow head's
noise, in one process. Scores are those of all first frames together, of frames 2 to 5, and of all frames. Differences
are against "carried", the reference's way; their standard error is that of the delete-one jackknife over scenes, of
the mean over seeds. Only the flow depends on the seed.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

BASE = "carried"
POSITIONS = {"first": (0, 1), "2 to 5": (1, 5), "all": (0, None)}
"""Frames of a scene, as the first one and the one after the last, counted from 0."""
METRICS = ("RayIoU", "mAVE")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    from mmcv import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file with the weights")
    parser.add_argument("--averaged", action="store_true", help="of the checkpoint of a training, the averaged weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N",
                        help="of the flow head's noise (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first GPU, else the CPU")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def counts_by_scene(dataset, scores: Sequence) -> dict[str, list[dict[str, np.ndarray]]]:
    """For each name in :data:`POSITIONS` the summed ray counters of every scene."""
    from mmdet3d.datasets.metrics.ray_iou import RayCounts

    names = [field.name for field in dataclasses.fields(RayCounts)]
    found = {}
    for position, (first, end) in POSITIONS.items():
        found[position] = []
        for sequence in np.unique(dataset.flag):
            members = [scores[index].rays for index in np.flatnonzero(dataset.flag == sequence)[first:end]]
            if members:
                found[position].append({name: sum(rays[name] for rays in members) for name in names})
    return found


def metrics_of(labels, scenes: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """[2] RayIoU in percent and mAVE in m/s of some scenes together, and [S, 2] the same without each of them."""
    from mmdet3d.datasets.metrics.ray_iou import RayCounts
    from mmdet3d.datasets.metrics.ray_scores import scores

    total = {name: sum(scene[name] for scene in scenes) for name in scenes[0]}
    rows = []
    for left_out in (None, *scenes):
        counts = total if left_out is None else {name: total[name] - left_out[name] for name in total}
        result = scores(RayCounts(**counts), labels, samples=len(scenes))
        rows.append((100 * result["RayIoU"], result["mAVE"]))
    return np.array(rows)


def difference(mine: np.ndarray, base: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean difference over seeds, its jackknife standard error over scenes, and its 95 % interval.

    Args:
        mine: [seeds, 1 + S, 2] of :func:`metrics_of`.
        base: Likewise.
    """
    from scipy.stats import t

    delta = (mine - base).mean(0)
    scenes = len(delta) - 1
    error = np.sqrt((scenes - 1) / scenes * ((delta[1:] - delta[1:].mean(0)) ** 2).sum(0))
    reach = t.ppf(0.975, scenes - 1) * error
    return {metric: {"difference": float(delta[0, m]), "standard_error": float(error[m]),
                     "interval": [float(delta[0, m] - reach[m]), float(delta[0, m] + reach[m])]}
            for m, metric in enumerate(METRICS)}


def run(args: argparse.Namespace) -> dict:
    """Evaluate with every start and seed; everything that is reported."""
    from mmdet3d.apis.inference import init_model, load_config
    from mmdet3d.core.evaluation import Evaluator, EvaluatorOptions
    from mmdet3d.core.evaluation.settings import evaluation_settings, loader_settings
    from mmdet3d.core.predictor import SCENE_STARTS
    from mmdet3d.datasets import build_dataset

    cfg = load_config(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    dataset_config, loader = evaluation_settings(cfg)
    dataset = build_dataset(dataset_config, place="data.test")
    lengths = np.unique(dataset.flag, return_counts=True)[1]
    if (longer := int((lengths > 1).sum())) < 2:
        raise ValueError(f"{dataset.ann_file}: found {longer} scenes of two frames or more; a standard error needs at "
                         "least 2")
    model = init_model(cfg, args.checkpoint, args.device, averaged=args.averaged)
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for start in SCENE_STARTS:
        found[start] = {position: [] for position in POSITIONS}
        for seed in args.seeds:
            options = EvaluatorOptions(**loader, scene_start=start, noise_seed=seed)
            evaluation = Evaluator(dataset, options, loader_settings(cfg)).run(model)
            for position, counts in counts_by_scene(dataset, evaluation.scores).items():
                found[start][position].append(metrics_of(dataset.labels, counts))
    record = {"config": args.config, "checkpoint": args.checkpoint, "averaged": args.averaged, "seeds": args.seeds,
              "scenes": len(lengths), "samples": len(dataset), "starts": {}}
    for start, positions in found.items():
        record["starts"][start] = {
            position: {metric: [float(value) for value in np.stack(rows)[:, 0, m]] for m, metric in enumerate(METRICS)}
            | {"against_carried": difference(np.stack(rows), np.stack(found[BASE][position]))}
            for position, rows in positions.items()}
    return record


def table(record: dict) -> str:
    """Markdown table."""
    lines = ["| start | frames | RayIoU | against carried | 95 % | mAVE | against carried | 95 % |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    for start, positions in record["starts"].items():
        for position, row in positions.items():
            cells = [start, position]
            for metric, digits in zip(METRICS, (2, 3), strict=True):
                d = row["against_carried"][metric]
                cells.append(f"{np.mean(row[metric]):.{digits}f}")
                cells += ["", ""] if start == BASE else [
                    f"{d['difference']:+.{digits}f} ± {d['standard_error']:.{digits}f}",
                    f"{d['interval'][0]:+.{digits}f} to {d['interval'][1]:+.{digits}f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finish(record: dict, path: str | None) -> None:
    """Print the table, and write the record if a file is named."""
    from mmdet3d.utils.files import without_nan, write_json

    if path:
        write_json(path, without_nan(record), allow_nan=False)
    print(table(record))
    print(f"{record['scenes']} scenes, {record['samples']} samples, seeds {record['seeds']}; RayIoU in percent, mAVE "
          "in m/s, means over seeds; ± is one standard error")
    if any(math.isnan(value) for start in record["starts"].values() for row in start.values() for value in row["mAVE"]):
        print("mAVE is not defined everywhere: no true positive of a class that moves was found")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error, which is told in one line."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: finish(run(args), args.json), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
