"""Make the info files of a nuScenes download: poses, calibration, file names and boxes of every key frame.

    python tools/create_data.py --root data/nuscenes --version v1.0-trainval
    python tools/create_data.py --root data/nuscenes --version v1.0-mini --out data/infos

Reads <root>/<version>/*.json and writes <prefix>_infos_train.pkl and <prefix>_infos_val.pkl (for v1.0-test
<prefix>_infos_test.pkl), split by the official scene names. Paths in them start with the root as it is given here.
The CAN bus expansion (<root>/can_bus) is optional; without it the vehicle state is zeros. Lidar files are needed for
depth supervision only: a download without any is fine.

All key frame files are looked for first. If some are missing, a report says which and nothing is written;
--skip-missing then writes the scenes that are complete.

Exit code: 0 if all is well, 1 if files are missing (with --skip-missing: if no scene is complete), 2 after an error,
130 when interrupted.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/nuscenes", metavar="DIR", help="nuScenes folder (%(default)s)")
    parser.add_argument("--version", default="v1.0-trainval", metavar="NAME",
                        help="v1.0-trainval, v1.0-mini or v1.0-test (%(default)s)")
    parser.add_argument("--out", metavar="DIR", help="where the info files go (the root)")
    parser.add_argument("--prefix", default="stcocc-nuscenes", metavar="NAME", help="file prefix (%(default)s)")
    parser.add_argument("--can-bus", metavar="DIR", help="folder that holds can_bus/, or its files (the root)")
    parser.add_argument("--can-bus-motion", choices=("next", "last"), default="next",
                        help="message that gives acceleration, rotation rate and velocity: the first after the sample, "
                             "as in published info files, or the last up to it (%(default)s)")
    parser.add_argument("--skip-missing", action="store_true", help="write the scenes that are complete")
    parser.add_argument("--json", metavar="FILE", help="also write a summary to this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.\-]+", args.prefix):
        parser.error(f"--prefix must be a part of a file name, got {args.prefix!r}")
    return args


def run(args: argparse.Namespace) -> dict:
    """Read, look for files, build and write; the summary."""
    from tqdm import tqdm

    from mmdet3d.datasets.converters.nuscenes_can_bus import CanBus, find_can_bus
    from mmdet3d.datasets.converters.nuscenes_files import survey_files
    from mmdet3d.datasets.converters.nuscenes_infos import SCHEMA_VERSION, build_infos, scene_splits, write_infos
    from mmdet3d.datasets.converters.nuscenes_tables import read_tables

    start = time.perf_counter()
    progress = partial(tqdm, disable=not sys.stderr.isatty(), smoothing=0.05)
    root, splits = Path(args.root), scene_splits(args.version)
    can_folder = find_can_bus(args.can_bus or root)
    if args.can_bus and can_folder is None:
        raise ValueError(f"--can-bus {args.can_bus}: neither can_bus/ nor *_pose.json files there")
    tables = read_tables(root / args.version, progress)
    survey = survey_files(root, tables, progress)
    summary = {"root": args.root, "version": args.version, "schema_version": SCHEMA_VERSION,
               "scenes": len(tables.scenes), "missing": survey.to_dict(), "skip_missing": args.skip_missing,
               "can_bus": {"folder": None if can_folder is None else str(can_folder), "motion": args.can_bus_motion},
               "splits": {}}
    if not survey.incomplete or args.skip_missing:
        can_bus = CanBus(can_folder, args.can_bus_motion)
        infos = build_infos(tables, args.root, splits, can_bus=can_bus, annotated=args.version != "v1.0-test",
                            leave_out=frozenset(survey.incomplete), progress=progress)
        summary["can_bus"]["zeros"] = can_bus.problems
        for split, records in infos.items():
            path = Path(args.out or root) / f"{args.prefix}_infos_{split}.pkl"
            scenes = len({info["scene_token"] for info in records})
            if records:  # readers reject an empty file
                write_infos(path, records, args.version)
            summary["splits"][split] = {"file": str(path) if records else None, "samples": len(records),
                                        "scenes": scenes, "official_scenes": len(splits[split])}
    summary["seconds"] = round(time.perf_counter() - start, 3)
    return summary


def report_missing(summary: dict) -> None:
    """Tell which sensor files are missing."""
    from mmdet3d.utils.text import listing

    missing = summary["missing"]
    if missing["lidar_absent"]:
        print("notice: no lidar file is there; training with depth supervision needs them, everything else does not")
    for channel, gap in missing["sensors"].items():
        if channel == "LIDAR_TOP" and missing["lidar_absent"]:
            continue
        if gap["files"]:
            print(f"missing: {channel}: {gap['files']} of {missing['samples']} files")
        if gap["records"]:
            print(f"missing: {channel}: {gap['records']} of {missing['samples']} samples have no key frame in the "
                  "tables")
        print(f"  in {len(gap['scenes'])} scenes: {listing(gap['scenes'])}")
        for example in gap["examples"]:
            print(f"  {example}")
    if incomplete := missing["incomplete_scenes"]:
        print(f"incomplete: {len(incomplete)} of {summary['scenes']} scenes: {listing(incomplete)}")


def report(summary: dict) -> None:
    """Tell what is missing and what was written."""
    from mmdet3d.utils.text import listing

    report_missing(summary)
    zeros = summary["can_bus"].get("zeros", {})
    if zeros and summary["can_bus"]["folder"] is None:
        print("notice: no CAN bus expansion (can_bus/) found; the vehicle state is zeros")
    elif zeros:
        reasons = [f"{scene} ({reason})" for scene, reason in zeros.items()]
        print(f"notice: the vehicle state is zeros in {len(zeros)} scenes: {listing(reasons)}")
    for split, part in summary["splits"].items():
        found = f"{part['samples']} samples, {part['scenes']} of {part['official_scenes']} official scenes"
        print(f"{split}: {found}: {part['file']}" if part["file"] else
              f"{split}: no complete scene in the tables, no file written")
    if not summary["splits"]:
        print("nothing was written; add the files, or write the complete scenes with --skip-missing")
    print(f"{summary['seconds']:.1f} s")


def finish(summary: dict, args: argparse.Namespace) -> int:
    """Tell and write the summary; the exit code."""
    report(summary)
    if args.json:
        from mmdet3d.utils.files import write_json

        write_json(args.json, summary)
        print(f"summary: {args.json}")
    return 0 if any(part["file"] for part in summary["splits"].values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: finish(run(args), args), debug=args.debug,
                    interrupted="interrupted; info files appear whole or not at all")


if __name__ == "__main__":
    sys.exit(main())
