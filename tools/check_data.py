"""Look at everything a data set consists of, before a training run finds out what is wrong with it.

    python tools/check_data.py data/nuscenes/stcocc-nuscenes_infos_train.pkl --dataset openocc --json problems.json
    python tools/check_data.py data/nuscenes/stcocc-nuscenes_infos_val.pkl --skip lidar coarse

Files that are missing, cannot be read or have the wrong shape, size or type; labels out of range; coarse labels that
differ from the rule; calibration, poses and times that cannot be; scenes that are split, incomplete or interleaved.
All images are decoded. Nothing is written but the --json file.

Exit code: 0 without problems, 1 with problems, 2 if the info file cannot be used, 130 when interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = ("images", "lidar", "labels", "coarse")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pkl", metavar="PKL", help="info pickle")
    parser.add_argument("--dataset", choices=("occ3d", "openocc"), default="occ3d", help="which labels (%(default)s)")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="what not to look at")
    parser.add_argument("--compare-every", type=int, default=20, metavar="N",
                        help="compute the coarse labels of every Nth sample and compare; 0: never (%(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one per CPU")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="problems told of each kind (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all problems to this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.compare_every < 0 or args.show < 0:
        parser.error("--compare-every and --show must not be negative")
    return args


def run(args: argparse.Namespace):
    """Look at everything; the report, and whether it was cut short."""
    from tqdm import tqdm

    from mmdet3d.datasets.converters.check import Report, SampleCheck, check_order
    from mmdet3d.datasets.converters.parallel import available_cpus, map_unordered
    from mmdet3d.datasets.infos import load_infos

    infos = load_infos(args.pkl)
    check = SampleCheck(args.pkl, args.dataset, tuple(args.skip), args.compare_every)
    report, interrupted = Report(check_order(infos)), False
    try:
        with tqdm(total=len(infos), unit="sample", disable=not sys.stderr.isatty(), smoothing=0.05) as bar:
            items = list(enumerate(infos))
            for findings in map_unordered(check, items, args.workers or available_cpus(), chunk=4):
                report.add(findings)
                bar.set_postfix(problems=len(report.problems), refresh=False)
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    report.finish(info["token"] for info in infos)
    return report, len(infos), interrupted


def tell(report, total: int, seconds: float, args: argparse.Namespace) -> None:
    """Summary table by kind of problem, then the first problems of each kind."""
    from mmdet3d.datasets.converters.check import KINDS

    print(f"{report.samples} of {total} samples in {seconds:.1f} s")
    for seen, what in ((report.image_sizes, "images"), (report.grid_shapes, "label grids")):
        for size, places in sorted(seen.items(), key=lambda item: -len(item[1])):
            print(f"  {len(places):>7}  {what} of {' x '.join(map(str, size))}")
    if report.coarse and not report.has_coarse_files:
        print("  no coarse label files: they are computed while loading, or made by tools/generate_ms_occ.py")
    grouped = report.by_kind()
    print(f"\n{'problem':<24}{'count':>8}{'samples':>9}")
    for kind in KINDS:
        problems = grouped.get(kind, [])
        print(f"{kind:<24}{len(problems):>8}{len({problem.token for problem in problems}):>9}")
    for kind, problems in grouped.items():
        print(f"\n{kind}:")
        for problem in problems[:args.show]:
            print(f"  {problem.token}: {problem.detail}")
        if len(problems) > args.show:
            print(f"  ... and {len(problems) - args.show} more (--json FILE lists all)")
    if not report.problems:
        print("\nno problems")


def check(args: argparse.Namespace) -> int:
    """Check, tell and write what was found; the exit code."""
    start = time.perf_counter()
    report, total, interrupted = run(args)
    tell(report, total, time.perf_counter() - start, args)
    if args.json:
        from mmdet3d.utils.files import write_json

        summary = {
            "infos": args.pkl, "dataset_name": args.dataset, "skipped": args.skip, "samples": report.samples,
            "interrupted": interrupted, "seconds": round(time.perf_counter() - start, 3),
            "counts": {kind: len(problems) for kind, problems in report.by_kind().items()},
            "problems": [asdict(problem) for problem in report.problems],
        }
        write_json(args.json, summary)
        print(f"\nall problems: {args.json}")
    if interrupted:
        print("interrupted")
        return 130
    return 1 if report.problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: check(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
