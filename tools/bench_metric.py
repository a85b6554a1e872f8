"""Times the ray metric: samples a second, prediction and ground truth both cast, from eight origins each.

    python tools/bench_metric.py --device cuda --samples 500
    python tools/bench_metric.py --device cpu --threads 2 --samples 20 --json metric.json

Samples are added one after the other and the result is read once, as in an evaluation. "on the device" has labels and
flows there already, as after a model; "on the host" has NumPy arrays, as from files. Times are medians of the rounds.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def bench_sample() -> tuple:
    """Labels, flows and origins of one sample: (pred, gt, pred_flow, gt_flow, origins), NumPy."""
    path = ROOT / "tests" / "ops" / "test_ray_cast.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bench_sample()


def rounds_of(device: str, samples: int, on_device: bool) -> Callable[[], float]:
    """A function that counts samples and returns the seconds that this took, reading the result included."""
    import torch

    from mmdet3d.datasets.metrics import RayMetric

    *arrays, origins = bench_sample()
    if on_device:
        arrays = [torch.from_numpy(array).to(device) for array in arrays]
    pred, gt, pred_flow, gt_flow = arrays
    metric = RayMetric("openocc", device=device)
    empty = metric.state_dict()

    def count() -> float:
        metric.load_state_dict(empty)
        start = time.perf_counter()
        for number in range(samples):
            metric.add(str(number), pred, gt, origins, pred_flow, gt_flow)
        metric.result()
        return time.perf_counter() - start

    return count


def profile(device: str, count: Callable[[], float]) -> str:
    """Table of what the time of one round goes to."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profiler(activities=activities) as record:
        count()
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=50)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="samples of a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument("--profile", action="store_true", help="also show what the time goes to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if min(args.samples, args.rounds, args.threads or 1) < 1:
        parser.error("--samples, --rounds and --threads must be at least 1")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: rounds of {args.samples} samples")
    rates = {}
    for place in ("device", "host") if args.device == "cuda" else ("host",):
        count = rounds_of(args.device, args.samples, on_device=place == "device")
        count()
        seconds = statistics.median(count() for _ in range(args.rounds))
        rates[place] = args.samples / seconds
        print(f"on the {place}: {1000 * seconds / args.samples:.3f} ms a sample, {rates[place]:.1f} samples/s")
        if args.profile:
            print(profile(args.device, count))
    if args.json:
        from mmdet3d.utils.files import write_json

        write_json(args.json, {"device": name, "samples": args.samples, "samples_per_second": rates})
    return 0


if __name__ == "__main__":
    sys.exit(main())
