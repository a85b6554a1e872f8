"""Predict occupancy and flow for the frames of an info file, and draw them.

    python tools/infer.py config/stcocc/stcocc-r50-16f-openocc-12e.py --checkpoint work_dirs/run/latest.pth \
        --infos data/nuscenes/stcocc-nuscenes_infos_val.pkl --limit 10

Without --infos it runs on a small synthetic data set, which it makes first if it is not there; without --checkpoint the
weights are random, which shows that everything works but predicts nothing. For each frame it writes
<out>/<scene>/<token>.npz (semantics, flow) and <out>/<scene>/<token>.png, and at the end <out>/summary.json.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    from mmdet3d.utils.command import add_predictor_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file of the model")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; default: random ones")
    parser.add_argument("--averaged", action="store_true",
                        help="of the checkpoint of a training, use the averaged weights")
    parser.add_argument("--allow-unsafe-checkpoint", action="store_true",
                        help="read a checkpoint that could run code: only from people you trust")
    parser.add_argument("--infos", metavar="FILE", help="info pickle; default: the val part of data/synthetic-small")
    parser.add_argument("--out", metavar="DIR", default="outputs/infer", help="where to write (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a CUDA device if there is one")
    add_predictor_options(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N frames")
    parser.add_argument("--seed", type=int, default=0,
                        help="of random weights and of the flow head's noise (%(default)s)")
    parser.add_argument("--no-picture", action="store_true", help="write predictions only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, got {args.limit}")
    if args.averaged and args.checkpoint is None:
        parser.error("--averaged needs --checkpoint")
    return args


def say(text: str) -> None:
    """Write a line without breaking the progress display."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def prefetch(frames: Sequence, count: int) -> Iterator:
    """The first ``count`` frames; the next one is read while the current one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(frames.__getitem__, 0)
        for index in range(count):
            frame = coming.result()
            if index + 1 < count:
                coming = pool.submit(frames.__getitem__, index + 1)
            yield frame


def draw(path: Path, frame, semantics, flow, settings, notes: list[str]) -> None:
    """Write the picture of one frame."""
    from PIL import Image

    from mmdet3d.core.visualization.occupancy import compose_frame, save_png

    images = {name: Image.open(file) for name, file in frame.image_files.items()}
    moving = flow if settings.labels.name == "openocc" or flow.any() else None
    picture = compose_frame(images, semantics, moving, settings.labels, f"{frame.scene}   {frame.token}", notes,
                            point_cloud_range=settings.point_cloud_range)
    save_png(picture, path)


def synthetic_frames(folder: Path) -> Path:
    """Info file of the small synthetic data set in ``folder``, which is made if it is not there."""
    from tqdm import tqdm

    from mmdet3d.datasets.converters.parallel import available_cpus
    from mmdet3d.datasets.synthetic.prepare import INFO_FILE, SMALL, prepare_dataset

    info_file = folder / INFO_FILE.format(split="val")
    if not info_file.is_file():
        say(f"no --infos: making a small synthetic data set in {folder}")
        with tqdm(total=len(SMALL.scenes) * SMALL.frames, unit="frame", disable=not sys.stderr.isatty()) as bar:
            prepare_dataset(folder, SMALL, available_cpus(), bar.update)
    return info_file


def run(args: argparse.Namespace) -> dict:
    """Predict all frames; the summary."""
    from tqdm import tqdm

    from mmdet3d.apis.inference import FrameSettings, init_model, load_config, open_frames
    from mmdet3d.core.predictor import Predictor
    from mmdet3d.utils.files import prediction_path, save_prediction
    from mmdet3d.utils.transfer import to_numpy

    out = Path(args.out)
    cfg = load_config(args.config)
    settings = FrameSettings.from_config(cfg)
    info_file = args.infos or synthetic_frames(ROOT / "data" / "synthetic-small")
    frames = open_frames(cfg, info_file)  # before the model, which takes longer to find fault with
    count = min(len(frames), args.limit or len(frames))
    model = init_model(cfg, args.checkpoint, args.device, seed=args.seed, averaged=args.averaged,
                       allow_unsafe=args.allow_unsafe_checkpoint)
    weights = f"weights: {Path(args.checkpoint).name}" if args.checkpoint else "RANDOM WEIGHTS: not a prediction"
    if model.random_weights:
        say("no --checkpoint: the weights are random, the results mean nothing")
    predictor = Predictor(model, scene_start=args.scene_start, noise_seed=args.seed, mode=args.mode,
                          fold=args.fuse_conv_bn, inplace=True)
    notes = [weights, Path(args.config).stem, settings.labels.name]
    records, memory = [], None
    for frame in tqdm(prefetch(frames, count), total=count, unit="frame", disable=not sys.stderr.isatty()):
        prediction = prediction_path(out, frame.scene, frame.token)
        index = frame.img_metas[0]["index"]
        start = time.perf_counter()
        semantics, flow, memory = predictor(frame.img_inputs, frame.img_metas, memory)
        semantics, flow = to_numpy(semantics[0], flow[0])
        seconds = time.perf_counter() - start
        save_prediction(prediction, semantics, flow)
        record = {"index": int(index), "scene": frame.scene, "token": frame.token, "prediction": str(prediction),
                  "seconds": round(seconds, 4), "occupied_voxels": int((semantics != settings.labels.free_index).sum())}
        if not args.no_picture:
            picture = prediction.with_suffix(".png")
            draw(picture, frame, semantics, flow, settings, notes)
            record["picture"] = str(picture)
        say(record.get("picture", record["prediction"]))
        records.append(record)
    return {"config": args.config, "checkpoint": args.checkpoint, "averaged": args.averaged,
            "random_weights": model.random_weights, "infos": str(info_file), "device": str(predictor.runner.device),
            "seed": args.seed, "scene_start": args.scene_start, "mode": args.mode, "fuse_conv_bn": args.fuse_conv_bn,
            "dataset_name": settings.labels.name, "frames": records}


def finish(summary: dict, out: Path) -> None:
    """Write the summary and say what was done."""
    from mmdet3d.utils.files import write_json

    path = out / "summary.json"
    write_json(path, summary)
    first, *later = [record["seconds"] for record in summary["frames"]]
    text = f"{1 + len(later)} frame{'s' if later else ''} on {summary['device']}, time in the model: {first:.2f} s"
    say(text + (f" for the first, then {sum(later) / len(later):.2f} s each" if later else ""))
    if summary["random_weights"]:
        say("random weights: use --checkpoint for real predictions")
    say(f"summary: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error, which is told in one line."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: finish(run(args), Path(args.out)), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
