"""Compare two folders of predictions, for example of two devices, arithmetic modes or checkpoints.

    python tools/compare_predictions.py results_exact results_fast --json difference.json

Prints the share of voxels with the same class, that of the voxels occupied in either, and the largest difference of
flow where both predict a class that moves, over all files <scene>/<token>.npz that are in both folders. Files that are
in one folder only are an error.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.labels import OPENOCC, label_set
from mmdet3d.datasets.metrics.files import read_prediction
from mmdet3d.utils.command import run_tool
from mmdet3d.utils.files import write_json
from mmdet3d.utils.text import listing


def prediction_files(folder: str) -> dict[str, Path]:
    """Predictions of a folder by ``<scene>/<token>.npz``."""
    files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*.npz"))}
    if not files:
        raise DataError(f"no prediction (.npz) found in {folder}")
    return files


def compare(first: str, second: str, free: int) -> dict:
    """Agreement of two folders.

    Raises:
        DataError: a file is damaged, or is in one folder only.
    """
    mine, theirs = prediction_files(first), prediction_files(second)
    if alone := sorted(set(mine) ^ set(theirs)):
        raise DataError(f"{len(alone)} predictions are in one folder only: {listing(alone)}")
    voxels = same = occupied = same_occupied = 0
    least, flow_difference = 1.0, 0.0
    for name in mine:
        (a, flow_a), (b, flow_b) = read_prediction(mine[name]), read_prediction(theirs[name])
        if a.shape != b.shape:
            raise DataError(f"{name}: shapes {a.shape} and {b.shape} differ")
        equal, either = a == b, (a != free) | (b != free)
        voxels, same = voxels + a.size, same + int(equal.sum())
        occupied, same_occupied = occupied + int(either.sum()), same_occupied + int((equal & either).sum())
        least = min(least, float(equal.mean()))
        if flow_a is not None and flow_b is not None and equal.any():
            difference = np.abs(flow_a.astype(np.float32) - flow_b.astype(np.float32))[equal]
            flow_difference = max(flow_difference, float(difference.max()))
    return {"files": len(mine), "same_class": same / voxels, "same_class_least_file": least,
            "same_class_where_occupied": same_occupied / max(occupied, 1), "largest_flow_difference": flow_difference}


def tell(record: dict, path: str | None) -> None:
    """Print the agreement, and write it if a file is named."""
    for name, value in record.items():
        print(f"{name.replace('_', ' ')}: {value:.6f}" if isinstance(value, float) else f"{name}: {value}")
    if path:
        write_json(path, record)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="folder of predictions")
    parser.add_argument("second", help="another one")
    parser.add_argument("--dataset", default=OPENOCC.name, help="label set, for what is free (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    return run_tool(lambda: tell(compare(args.first, args.second, label_set(args.dataset).free_index), args.json),
                    debug=args.debug, failure=1)


if __name__ == "__main__":
    sys.exit(main())
