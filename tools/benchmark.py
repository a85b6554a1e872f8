"""Times a model: a frame in evaluation, its parts, and a training iteration, on inputs that anyone can make.

    python tools/benchmark.py config/stcocc/stcocc-r50-16f-openocc-12e.py --json frame.json
    python tools/benchmark.py config/stcocc/stcocc-r50-16f-openocc-12e.py --mode fast
    python tools/benchmark.py config/stcocc/stcocc-r50-16f-openocc-12e.py --train 1 2 --bf16 --graphs

The inputs are random pictures under the geometry of a driving vehicle (no data set is needed); --infos adds a
measurement with the samples of an info file and the work of loading them. The weights are random unless --checkpoint
names some; times do not depend on them. Times are wall times, medians after warm-up, with the device waited for.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mmdet3d.apis.benchmark import (
    drive_samples,
    spread,
    synchronise,
    time_frames,
    time_stages,
    time_training,
)
from mmdet3d.apis.inference import choose_device, init_model, load_config
from mmdet3d.core.predictor import MODES, Predictor
from mmdet3d.datasets.synthetic.stream import Drive
from mmdet3d.utils.command import run_tool
from mmdet3d.utils.files import write_json


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda,
                  "tf32 convolutions": torch.backends.cudnn.allow_tf32,
                  "tf32 matrix products": torch.backends.cuda.matmul.allow_tf32}
    else:
        facts["device"] = platform.processor() or platform.machine()
    return facts


def time_with_loading(predictor: Predictor, cfg: dict, infos: str, workers: int, frames: int) -> dict:
    """Latency of a frame from the files on, loader and workers included."""
    from mmdet3d.core.evaluation.samples import EvaluationSamples
    from mmdet3d.datasets.builder import build_dataset
    from mmdet3d.datasets.loader import build_dataloader

    samples = EvaluationSamples(build_dataset({**cfg["data"]["test"], "ann_file": infos}), None)
    memory, seconds, last = None, [], None
    for batch in build_dataloader(samples, 1, workers, training=False):
        *_, memory = predictor(batch["img_inputs"], batch["img_metas"], memory)
        synchronise(predictor.runner.device)
        now = time.perf_counter()
        if last is not None:
            seconds.append(now - last)
        last = now
        if len(seconds) == frames:
            break
    return spread(seconds[len(seconds) // 4 :])


def evaluation(args: argparse.Namespace, cfg: dict, device: torch.device) -> dict:
    """Frames: latency, throughput, memory, parts."""
    model = init_model(cfg, args.checkpoint, device)
    predictor = Predictor(model, mode=args.mode, graphs=False if args.no_graphs else None, inplace=True)
    drive = Drive(tuple(cfg["data_config"]["input_size"]), args.batch)
    samples = drive_samples(drive, args.warmup + args.frames, device, reuse=not args.no_reuse)
    record = time_frames(predictor, samples, warmup=args.warmup)
    print(f"{args.mode}: {record['latency']['median_ms']:.2f} ms a frame "
          f"({record['latency']['p10_ms']:.2f} to {record['latency']['p90_ms']:.2f}), "
          f"{record['samples_per_second']:.1f} samples a second, peak memory {record['peak_gib']:.2f} GiB, "
          f"CUDA graphs {'on' if record['graphs'] else 'off'}", flush=True)
    if args.stages:
        eager = Predictor(predictor.model, graphs=False, inplace=True)
        record["stages_ms"] = time_stages(eager, samples[: min(len(samples), 20)])
        for name, milliseconds in record["stages_ms"].items():
            print(f"  {name:<34}{milliseconds:>8.2f} ms")
    if args.infos:
        record["with_loading"] = time_with_loading(predictor, cfg, args.infos, args.workers, args.frames)
        print(f"  with loading, {args.workers} workers: {record['with_loading']['median_ms']:.2f} ms a frame")
    return record


def training(args: argparse.Namespace, cfg: dict, device: torch.device) -> list[dict]:
    """Iterations with each batch size."""
    from mmdet3d.models import build_model

    records = []
    for batch in args.train:
        torch.manual_seed(0)
        model = build_model(cfg["model"]).to(device)
        drive = Drive(tuple(cfg["data_config"]["input_size"]), batch)
        record = time_training(model, drive, iterations=args.frames, warmup=min(args.warmup, 5), bf16=args.bf16,
                               graphs=args.graphs)
        records.append({"samples": batch, "precision": "bf16" if args.bf16 else "fp32", **record})
        print(f"training, {batch} samples, {records[-1]['precision']}: {record['iteration']['median_ms']:.1f} ms an "
              f"iteration, peak memory {record['peak_gib']:.2f} GiB (reserved {record['reserved_gib']:.2f}), "
              f"CUDA graphs {'on' if record['graphs'] else 'off'}", flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return records


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file")
    parser.add_argument("--checkpoint", help="weights (default: random)")
    parser.add_argument("--device", help="cpu, cuda or cuda:<number> (default: a GPU if there is one)")
    parser.add_argument("--mode", choices=MODES, default="exact", help="arithmetic (default: exact)")
    parser.add_argument("--batch", type=int, default=1, help="samples side by side in evaluation (default: 1)")
    parser.add_argument("--frames", type=int, default=50, help="frames or iterations that count (default: 50)")
    parser.add_argument("--warmup", type=int, default=10, help="those before that do not (default: 10)")
    parser.add_argument("--no-graphs", action="store_true", help="do not replay CUDA graphs")
    parser.add_argument("--no-reuse", action="store_true", help="compute the features of earlier frames again")
    parser.add_argument("--stages", action="store_true", help="time the parts of the network, too")
    parser.add_argument("--infos", help="info file whose samples are loaded and predicted, too")
    parser.add_argument("--workers", type=int, default=4, help="loading processes with --infos (default: 4)")
    parser.add_argument("--train", type=int, nargs="+", metavar="SAMPLES",
                        help="time training iterations with these batch sizes instead")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs in training iterations")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if min(args.batch, args.frames) < 1 or args.warmup < 0 or any(n < 1 for n in args.train or ()):
        parser.error("--batch, --frames and --train must be at least 1, --warmup at least 0")
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, tell and write."""
    device, cfg = choose_device(args.device), load_config(args.config)
    facts = machine(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    record = {"config": args.config, "machine": facts}
    if args.train:
        record["training"] = training(args, cfg, device)
    else:
        record["evaluation"] = evaluation(args, cfg, device)
    if args.json:
        write_json(args.json, record)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit code."""
    args = parse(argv)

    return run_tool(lambda: run(args), debug=args.debug, failure=1)


if __name__ == "__main__":
    sys.exit(main())
