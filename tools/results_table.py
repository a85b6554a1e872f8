"""Tables in Markdown from results files of tools/test.py, tools/baselines.py and tools/rayiou.py.

    python tools/results_table.py majority.json untrained.json work_dirs/run/results.json
    python tools/results_table.py --classes --names majority trained -- majority.json results.json

RayIoU and IoU of voxels are in percent, flow errors (AVE) in m/s. "AVE, moving" looks at objects that are faster than
the speed in the file, and says what zero flow would have at the same rays.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="FILE.json", help="results files, one row or column each")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what the rows are called; default: the files' own")
    parser.add_argument("--classes", action="store_true", help="also a table of every class")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.names is not None and len(args.names) != len(args.results):
        parser.error(f"--names: expected {len(args.results)}, one for each file, got {len(args.names)}")
    return args


def read_record(path: str) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is no such file; names it.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict) or "RayIoU" not in (record.get("ray_iou") or {}):
        raise ValueError(f"{path}: expected a results file with ray_iou.RayIoU")
    return record


def number(value: float | None, digits: int = 2, factor: float = 1) -> str:
    """The number, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value * factor:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table in Markdown; the first column holds names, the others numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_row(name: str, record: Mapping[str, Any]) -> list[str]:
    """One results file in the table of totals."""
    rays, moving = record["ray_iou"], record.get("moving") or {}
    percent = [number(rays.get(key), factor=100) for key in ("RayIoU", "RayIoU@1", "RayIoU@2", "RayIoU@4")]
    return [name, *percent, number((record.get("voxel_iou") or {}).get("miou")), number(rays.get("mAVE")),
            str(rays.get("flow_rays", "–")), number(moving.get("ave")), number(moving.get("ave_zero_flow")),
            str(moving.get("rays", "–"))]


def summary_table(records: Mapping[str, Mapping]) -> str:
    """Totals, one row for each of the named records."""
    header = ["", "RayIoU", "@1", "@2", "@4", "mIoU", "mAVE", "rays", "AVE, moving", "… zero flow", "rays"]
    return table(header, [summary_row(name, record) for name, record in records.items()])


def class_table(records: Mapping[str, Mapping]) -> str:
    """IoU of rays at 2 m by class, and AVE of moving objects where there is one; one column for each record."""
    classes = list(dict.fromkeys(name for record in records.values() for name in record["ray_iou"]["classes"]))
    moving = {name: (record.get("moving") or {}).get("classes", {}) for name, record in records.items()}
    rows = []
    for label in classes:
        of = {name: record["ray_iou"]["classes"].get(label, {}) for name, record in records.items()}
        true = max((row.get("gt_rays", 0) for row in of.values()), default=0)
        flows = [number(moving[name].get(label, {}).get("ave")) for name in records]
        rows.append([label, str(true), *(number(row.get("IoU@2"), factor=100) for row in of.values()), *flows])
    return table(["class", "true rays", *(f"IoU@2, {name}" for name in records),
                  *(f"AVE moving, {name}" for name in records)], rows)


def run(args: argparse.Namespace) -> None:
    """Read the files and print their tables."""
    names = args.names or [Path(path).parent.name if Path(path).stem == "results" else Path(path).stem
                           for path in args.results]
    if len(set(names)) != len(names):
        raise ValueError(f"files have the same name: {names}; give --names")
    records = {name: read_record(path) for name, path in zip(names, args.results, strict=True)}
    print(summary_table(records))
    if args.classes:
        print("\n" + class_table(records))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
