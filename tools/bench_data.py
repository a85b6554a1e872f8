"""Times the data side against plain versions of the same work, both in one run.

    taskset -c 0,1 python tools/bench_data.py --json data.json
    python tools/bench_data.py --labels data/nuscenes/gts/<scene>/<token>/labels.npz

multiscale: the three coarse label grids of one sample, and the whole of tools/generate_ms_occ.py, against a loop over
the blocks (tests/datasets/converters/literal_multiscale.py). Without --labels it works on a street of its own.
"""

import argparse
import importlib.util
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mmdet3d.datasets.converters.multiscale_gt import FACTORS, downsample_scales
from mmdet3d.datasets.converters.parallel import available_cpus
from mmdet3d.datasets.infos import load_infos
from mmdet3d.datasets.npz import read_arrays
from mmdet3d.utils.files import write_json

ROOT = Path(__file__).resolve().parent.parent
FREE = {"occ3d": 17, "openocc": 16}


def load_literal() -> Callable:
    """The loop over blocks, from the tests."""
    path = ROOT / "tests" / "datasets" / "converters" / "literal_multiscale.py"
    if not path.is_file():
        raise SystemExit(f"{path.relative_to(ROOT)} does not exist: run this in a source checkout")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.downsample_literally


def street(seed: int = 0) -> np.ndarray:
    """[200, 200, 16] Occ3D labels as dense as a real sample: about one voxel in sixteen is occupied."""
    rng = np.random.default_rng(seed)
    grid = np.full((200, 200, 16), FREE["occ3d"], np.uint8)
    seen = np.hypot(*np.meshgrid(np.arange(-100, 100), np.arange(-100, 100), indexing="ij")) < 75
    grid[..., 2][seen & (rng.random((200, 200)) < 0.9)] = 11
    grid[:, 120:150, 2:4][seen[:, 120:150, None] & (rng.random((200, 30, 2)) < 0.8)] = 13
    for label, count in ((15, 10), (16, 12), (4, 25), (7, 20)):
        for x, y in rng.integers(30, 160, (count, 2)):
            box = grid[x:x + 10, y:y + 8, 3:3 + int(rng.integers(4, 13))]
            box[rng.random(box.shape) < 0.35] = label
    return grid


def cpu_ms(function: Callable) -> float:
    """CPU time of one call in milliseconds."""
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start)


def bench_grids(labels: np.ndarray, free: int, rounds: int) -> dict:
    """The three grids of one sample; literal and fast take turns, so that both meet the same machine."""
    literal = load_literal()
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(cpu_ms(lambda: [literal(labels, factor, free) for factor in FACTORS]))
        for _ in range(10):
            downsample_scales(labels, FACTORS, free)
        fast += [cpu_ms(lambda: downsample_scales(labels, FACTORS, free)) for _ in range(50)]
    for factor, grid in zip(FACTORS, downsample_scales(labels, FACTORS, free), strict=True):
        np.testing.assert_array_equal(grid, literal(labels, factor, free))
    return {"case": "three grids, one core, CPU time", "literal_ms": statistics.median(slow),
            "fast_ms": statistics.median(fast), "rounds": rounds}


def write_samples(root: Path, labels: np.ndarray, count: int) -> Path:
    """A data set of ``count`` samples with the same labels; its info file."""
    pose = {"ego2global_translation": [0.0] * 3, "ego2global_rotation": [1.0, 0.0, 0.0, 0.0]}
    infos = []
    for index in range(count):
        folder = root / "gts" / "scene" / f"{index:06d}"
        folder.mkdir(parents=True)
        if index == 0:
            np.savez_compressed(folder / "labels.npz", semantics=labels, mask_lidar=labels, mask_camera=labels)
        else:
            (folder / "labels.npz").write_bytes((root / "gts/scene/000000/labels.npz").read_bytes())
        infos.append({"token": f"{index:06d}", "timestamp": index, "scene_token": "s", "prev": "", "cams": {},
                      "occ_path": str(folder), "can_bus": np.zeros(18), "lidar2ego_translation": [0.0] * 3,
                      "lidar2ego_rotation": [1.0, 0.0, 0.0, 0.0], **pose})
    path = root / "infos.pkl"
    path.write_bytes(pickle.dumps({"infos": infos, "metadata": {"version": "bench"}}))
    return path


def literal_tool(infos: list[dict], free: int) -> None:
    """The same files, one sample and one block after the other."""
    literal = load_literal()
    for info in infos:
        labels = read_arrays(f"{info['occ_path']}/labels.npz", "semantics")["semantics"]
        for factor in (2, 4, 8):
            grid = literal(labels, factor, free)
            np.savez_compressed(f"{info['occ_path']}/labels_1_{factor}.npz", semantics=grid, flow=grid)


def bench_tool(labels: np.ndarray, dataset: str, workers: int, samples: int, literal_samples: int) -> dict:
    """The whole tool as a command, start of the processes and files included."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        info_file = write_samples(root, labels, samples)
        infos = load_infos(info_file)[:literal_samples]
        start = time.perf_counter()
        literal_tool(infos, FREE[dataset])
        slow = (time.perf_counter() - start) / literal_samples
        command = [sys.executable, str(ROOT / "tools/generate_ms_occ.py"), "--dataset", "occ3d", "--pkl_path",
                   str(info_file), "--overwrite", "--workers", str(workers), "--json", str(root / "summary.json")]
        if dataset == "openocc":
            (root / "gts").rename(root / "openocc_v2")
            command[3] = "openocc"
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        fast = (time.perf_counter() - start) / samples
    return {"case": f"whole tool, {workers} workers, wall time per sample", "literal_ms": 1000 * slow,
            "fast_ms": 1000 * fast, "samples": samples, "literal_samples": literal_samples}


def bench_multiscale(args: argparse.Namespace) -> list[dict]:
    """Both measurements of the coarse labels."""
    if args.labels:
        labels = np.ascontiguousarray(read_arrays(args.labels, "semantics")["semantics"].astype(np.uint8))
    else:
        labels = street()
    return [bench_grids(labels, FREE[args.dataset], args.rounds),
            bench_tool(labels, args.dataset, args.workers, args.samples, args.rounds)]


PARTS = {"multiscale": bench_multiscale}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), default="multiscale")
    parser.add_argument("--labels", type=Path, help="label file of a real sample (labels.npz)")
    parser.add_argument("--dataset", choices=tuple(FREE), default="occ3d", help="what the labels are (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the whole tool (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="of the whole tool (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="samples of the loop over blocks (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    facts = {"machine": platform.processor() or platform.machine(), "cpus": available_cpus(),
             "python": platform.python_version(), "numpy": np.__version__, "labels": str(args.labels or "street")}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = PARTS[args.part](args)
    print(f"{'case':<50}{'plain ms':>12}{'ms':>12}{'ratio':>9}")
    for row in rows:
        row["ratio"] = row["literal_ms"] / row["fast_ms"]
        print(f"{row['case']:<50}{row['literal_ms']:>12.3f}{row['fast_ms']:>12.3f}{row['ratio']:>8.1f}x")
    if args.json:
        write_json(args.json, {"machine": facts, "part": args.part, "cases": rows})


if __name__ == "__main__":
    main()
