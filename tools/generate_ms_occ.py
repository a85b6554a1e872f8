"""Write the coarse label grids (1/2, 1/4, 1/8) that training supervises, next to the full-resolution labels.

    python tools/generate_ms_occ.py --dataset occ3d --pkl_path data/nuscenes/stcocc-nuscenes_infos_train.pkl
    python tools/generate_ms_occ.py --dataset openocc --pkl_path data/nuscenes/stcocc-nuscenes_infos_train.pkl --check

For every sample of the info file it reads <occ_path>/labels.npz (for openocc the folder gts becomes openocc_v2) and
writes labels_1_2.npz, labels_1_4.npz and labels_1_8.npz beside it. Files appear whole or not at all, and complete
ones are left alone, so that an interrupted run is continued by the same command. --check writes nothing and compares
existing files with the labels.

Exit code: 0 if all is well, 1 if samples had problems (they are listed), 2 after an error, 130 when interrupted.
"""

import argparse
import collections
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHOWN = 10
MEANING = {
    "written": "written",
    "complete": "complete already, left alone",
    "equal": "checked, equal to the rule",
    "missing": "label file not found",
    "absent": "coarse files not made yet",
    "different": "coarse files that differ from the rule",
    "failed": "unreadable or unusable files",
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=("occ3d", "openocc"), help="which labels")
    parser.add_argument("--pkl_path", "--pkl-path", required=True, metavar="FILE", help="info pickle")
    parser.add_argument("--overwrite", action="store_true", help="write complete files again, too")
    parser.add_argument("--check", action="store_true", help="write nothing; compare files with the labels")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one per CPU")
    parser.add_argument("--json", metavar="FILE", help="also write a summary with every problem to this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.check and args.overwrite:
        parser.error("--check writes nothing: leave out --overwrite")
    return args


def run(args: argparse.Namespace) -> dict:
    """Work through all samples; the summary. An interruption ends the work and is noted in the summary."""
    from tqdm import tqdm

    from mmdet3d.datasets.converters.multiscale_files import BAD, job_runner, make_jobs
    from mmdet3d.datasets.converters.multiscale_gt import FACTORS
    from mmdet3d.datasets.converters.parallel import available_cpus, map_unordered
    from mmdet3d.datasets.infos import load_infos
    from mmdet3d.datasets.labels import label_set

    workers = args.workers or available_cpus()
    jobs = make_jobs(load_infos(args.pkl_path), args.dataset)
    runner = job_runner(label_set(args.dataset).free_index, args.pkl_path, args.overwrite, args.check)
    counts, problems, interrupted = collections.Counter(), [], False
    start = time.perf_counter()
    try:
        with tqdm(total=len(jobs), unit="sample", disable=not sys.stderr.isatty(), smoothing=0.05) as bar:
            for outcome in map_unordered(runner, jobs, workers):
                counts[outcome.status] += 1
                if outcome.status in BAD:
                    problems.append({"token": outcome.token, "status": outcome.status, "detail": outcome.detail})
                    bar.set_postfix(problems=len(problems))
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    order = {job.token: position for position, job in enumerate(jobs)}
    return {"infos": args.pkl_path, "dataset_name": args.dataset, "factors": list(FACTORS), "samples": len(jobs),
            "check": args.check, "overwrite": args.overwrite, "workers": workers, "interrupted": interrupted,
            "seconds": round(time.perf_counter() - start, 3), "counts": dict(counts),
            "problems": sorted(problems, key=lambda problem: order[problem["token"]])}


def report(summary: dict) -> None:
    """Tell what was done and list the first problems of each kind."""
    done = sum(summary["counts"].values())
    rate = done / max(summary["seconds"], 1e-9)
    print(f"{done} of {summary['samples']} samples in {summary['seconds']:.1f} s ({rate:.0f} a second, "
          f"{summary['workers']} workers)")
    for status, text in MEANING.items():
        if count := summary["counts"].get(status):
            print(f"  {count:>7}  {text}")
    for status in MEANING:
        found = [problem for problem in summary["problems"] if problem["status"] == status]
        if found:
            print(f"{MEANING[status]}: {len(found)}")
        for problem in found[:SHOWN]:
            print(f"  {problem['token']}: {problem['detail']}")
        if len(found) > SHOWN:
            print(f"  ... and {len(found) - SHOWN} more (--json FILE lists all)")
    if summary["counts"].get("missing") == summary["samples"]:
        print("no label file was found at all: paths in an info file are relative to the working directory or to the "
              "info file's folder; is --dataset right?")
    if summary["interrupted"]:
        print("interrupted; the same command continues" if not summary["check"] else "interrupted")


def finish(summary: dict, args: argparse.Namespace) -> int:
    """Tell and write the summary; the exit code."""
    report(summary)
    if args.json:
        from mmdet3d.utils.files import write_json

        write_json(args.json, summary)
        print(f"summary: {args.json}")
    if summary["interrupted"]:
        return 130
    return 1 if summary["problems"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: finish(run(args), args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
