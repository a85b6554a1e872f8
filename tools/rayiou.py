"""Scores predictions in files: RayIoU, mAVE, occupancy score and voxel mIoU. No GPU and no nuScenes tables needed.

    python tools/rayiou.py --pred results --gt data/nuscenes/openocc_v2 --dataset openocc \
        --infos data/nuscenes/stcocc-nuscenes_infos_val.pkl --json results.json

Predictions are <pred>/<scene>/<token>.npz (or <pred>/<token>.npz) with labels under semantics (or pred) and, for
OpenOcc, flow in m/s. Labels are <gt>/<scene>/<token>/labels.npz. Predictions with fewer voxels are compared with
labels that are coarsened to as many. docs/metrics.md defines the scores.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pred", required=True, metavar="DIR", help="folder of predictions")
    parser.add_argument("--gt", required=True, metavar="DIR", help="folder of labels: .../openocc_v2 or .../gts")
    parser.add_argument("--infos", required=True, metavar="FILE", help="info pickle of the split")
    parser.add_argument("--dataset", required=True, choices=("openocc", "occ3d"), help="class table")
    parser.add_argument("--pairing", choices=("token", "index"), default="token",
                        help="whose lidar positions a sample is seen from: its own (token, the metric as its authors "
                             "define it), or, as the reference evaluation of this model does, those of the sample of "
                             "the same number in the scene table (index); default: %(default)s")
    parser.add_argument("--scenes", metavar="FILE", help="scene.json of the nuScenes tables, for --pairing index")
    parser.add_argument("--device", default="cpu", help="such as cuda; default: %(default)s")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes (with a GPU: threads that read files); default: one per CPU")
    parser.add_argument("--cache", metavar="DIR", help="keep where rays hit the ground truth, for the next evaluation")
    parser.add_argument("--allow-missing", action="store_true", help="score the predictions that exist; says how many")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if (args.scenes is None) == (args.pairing == "index"):
        parser.error("--pairing index needs --scenes FILE" if args.scenes is None else
                     "--scenes is for --pairing index only")
    if args.pairing == "index" and args.allow_missing:
        parser.error("--pairing index needs the whole split: leave out --allow-missing")
    return args


def scores_on_device(evaluation, jobs: Sequence, workers: int) -> Iterator:
    """Scores of all samples, computed in this process; threads read the files of the next ones."""
    ahead = 2 * workers
    with ThreadPoolExecutor(workers) as pool:
        coming = [pool.submit(evaluation.read, *job) for job in jobs[:ahead]]
        try:
            for number, (files, _) in enumerate(jobs):
                sample = coming[number].result()
                coming[number] = None  # frees the arrays
                if number + ahead < len(jobs):
                    coming.append(pool.submit(evaluation.read, *jobs[number + ahead]))
                yield evaluation.score(files, *sample)
        finally:
            pool.shutdown(cancel_futures=True)


def run(args: argparse.Namespace) -> dict:
    """Evaluate; everything that is reported."""
    import torch
    from tqdm import tqdm

    from mmdet3d.datasets.converters.parallel import available_cpus, map_unordered
    from mmdet3d.datasets.infos import DataError, load_infos
    from mmdet3d.datasets.labels import label_set
    from mmdet3d.datasets.lidar_origins import LidarOrigins
    from mmdet3d.datasets.metrics.files import FileEvaluation, find_samples, read_prediction
    from mmdet3d.datasets.scoring import in_order, summarise
    from mmdet3d.utils.text import listing

    infos = load_infos(args.infos)
    origins = LidarOrigins(infos, args.pairing, args.scenes)
    found, missing = find_samples(infos, args.pred, args.gt)
    if not found:
        raise DataError(f"no prediction of {args.infos} is in {args.pred}: expected <scene>/<token>.npz, such as "
                        f"{infos[0]['token']}.npz")
    if missing and not args.allow_missing:
        raise DataError(f"{len(missing)} of {len(infos)} predictions are missing in {args.pred}: "
                        f"{listing(missing)} (--allow-missing scores the others)")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {args.device}: this PyTorch sees no CUDA device")
    workers = min(args.workers or available_cpus(), len(found))
    on_cpu, size = device.type == "cpu", read_prediction(found[0].prediction)[0].shape
    evaluation = FileEvaluation(args.dataset, size, str(device), args.cache, 1 if on_cpu and workers > 1 else None)
    jobs = [(files, origins[files.index]) for files in found]
    evaluation.check_itself(jobs[0])
    start = time.perf_counter()
    scores = map_unordered(evaluation, jobs, workers, 2) if on_cpu else scores_on_device(evaluation, jobs, workers)
    scores = in_order(tqdm(scores, total=len(jobs), unit="sample", disable=not sys.stderr.isatty()))
    labels = label_set(args.dataset)
    summary = summarise(scores, labels, [files.token for files in found])
    settings = {name: getattr(args, name) for name in ("pred", "gt", "infos", "dataset", "pairing", "scenes", "device")}
    return {"settings": settings, "grid": list(size), "classes": list(labels.classes), "free_label": labels.free_index,
            "samples": len(found), "missing": len(missing), "seconds": round(time.perf_counter() - start, 3),
            **summary.record()}


def report(summary: dict) -> None:
    """Print tables and numbers."""
    from mmdet3d.datasets.labels import GRID_SIZE
    from mmdet3d.datasets.metrics.moving import format_moving
    from mmdet3d.datasets.metrics.ray_scores import format_table
    from mmdet3d.datasets.metrics.voxel_iou import format_voxel_iou

    rays = summary["ray_iou"]
    print(format_table(rays))
    print(", ".join(f"{key} {rays[key]:.4f}" for key in ("RayIoU", "RayIoU@1", "RayIoU@2", "RayIoU@4", "mAVE")),
          f"(mAVE over {rays['flow_rays']} true-positive rays of {rays['rays']} rays)")
    if summary["moving"]["rays"]:
        print(format_moving(summary["moving"]))
    if tuple(summary["grid"]) != GRID_SIZE:
        print(f"predictions of {summary['grid']} voxels, compared with labels that are coarsened to as many")
    meaning = {"token": "each sample seen from its own scene, as the metric is defined",
               "index": "paired by number as the reference evaluation does; not comparable with other methods"}
    pairing = summary["settings"]["pairing"]
    print(f"pairing: {pairing} ({meaning[pairing]})")
    print(format_voxel_iou(summary["voxel_iou"]))
    rate = summary["samples"] / max(summary["seconds"], 1e-9)
    print(f"{summary['samples']} samples in {summary['seconds']:.1f} s ({rate:.1f} a second)")
    if summary["missing"]:
        print(f"NOT THE WHOLE SPLIT: {summary['missing']} predictions are missing")


def finish(summary: dict, args: argparse.Namespace) -> None:
    """Write and tell the result."""
    if args.json:
        from mmdet3d.utils.files import without_nan, write_json

        write_json(args.json, without_nan(summary), allow_nan=False)
    report(summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: finish(run(args), args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
