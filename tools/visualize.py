"""Draw samples of a data set: six cameras, the labels in 3D and from above, arrows for motion.

    python tools/visualize.py --infos data/synthetic/stcocc-nuscenes_infos_val.pkl --index 0 --points --voxels
    python tools/visualize.py --infos data/synthetic/stcocc-nuscenes_infos_val.pkl --index 0 --count 8 \
        --pred results --out outputs/compared --video outputs/compared.gif

Samples are counted in time order. Writes <out>/<scene>/<token>.png. --points draws the lidar points into the images,
red near and violet from 50 m on; --voxels the labels (with --pred the predicted ones) that every pixel looks at. With
--pred, a folder of <scene>/<token>.npz or <token>.npz as tools/infer.py and tools/test.py write them, the prediction
stands beside the ground truth. A prediction with fewer voxels is compared with labels that are coarsened as for
training. No window and no OpenGL are needed.

Exit code: 0 if all is well, 2 after an error, 130 when interrupted.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FORMATS = {"png": ("PNG", {}), "jpg": ("JPEG", {"quality": 85})}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infos", required=True, metavar="FILE", help="info pickle")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="first sample, in time order (%(default)s)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="how many samples (%(default)s)")
    parser.add_argument("--dataset", choices=("openocc", "occ3d"), default="openocc", help="labels (%(default)s)")
    parser.add_argument("--pred", metavar="DIR", help="folder of predictions")
    parser.add_argument("--points", action="store_true", help="lidar points in the images")
    parser.add_argument("--voxels", action="store_true", help="labels in the images")
    parser.add_argument("--out", metavar="DIR", default="outputs/visualize", help="where to write (%(default)s)")
    parser.add_argument("--format", choices=tuple(FORMATS), default="png", help="of the pictures (%(default)s)")
    parser.add_argument("--width", type=int, default=1920, metavar="PIXELS", help="of the pictures (%(default)s)")
    parser.add_argument("--video", metavar="FILE.gif", help="also an animation of all samples")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.count < 1 or args.index < 0 or not 320 <= args.width <= 8192:
        parser.error("--index must not be negative, --count at least 1, --width 320 to 8192")
    if args.video and Path(args.video).suffix.lower() != ".gif":
        parser.error(f"--video writes GIF files, got {args.video}")
    return args


def prediction_file(folder: str, info: Mapping) -> Path:
    """Prediction of a sample."""
    from mmdet3d.datasets.infos import DataError, scene_name
    from mmdet3d.datasets.metrics.files import find_prediction

    path = find_prediction(folder, scene_name(info), info["token"])
    if path is None:
        name = f"{info['token']}.npz"
        raise DataError(f"sample {info['token']} has no prediction: neither {Path(folder) / scene_name(info) / name} "
                        f"nor {Path(folder) / name}")
    return path


def read_truth(info: Mapping, info_file: str, labels, size: Sequence[int]):
    """Labels and flow of a sample, coarsened to ``size`` voxels."""
    from mmdet3d.datasets.converters.multiscale_gt import blocks_of
    from mmdet3d.datasets.pipelines.occupancy import ground_truth_step

    step = ground_truth_step(labels, {"coarsen": blocks_of(size)})
    found = step({"sample_idx": info["token"], "occ_gt_path": info["occ_path"], "info_file": info_file})
    return found["voxel_semantics"], found.get("voxel_flows")


def open_cameras(info: Mapping, args: argparse.Namespace, grid, labels) -> dict:
    """Images by camera at the size in which they are drawn, with what is asked for drawn into them."""
    from PIL import Image

    from mmdet3d.core.visualization.cameras import draw_labels, draw_points, image_from_ego, image_from_lidar, scaled
    from mmdet3d.datasets.infos import resolve_path
    from mmdet3d.datasets.labels import CAMERAS
    from mmdet3d.datasets.pipelines.depth import LoadPointsFromFile

    points = None
    if args.points:
        source = {"sample_idx": info["token"], "pts_filename": info.get("lidar_path"), "info_file": args.infos}
        points = LoadPointsFromFile()(source)["points"].numpy()
    images = {}
    for name in (name for name in CAMERAS if name in info["cams"]):
        with Image.open(resolve_path(info["cams"][name]["data_path"], args.infos)) as file:
            factor = args.width / 3 / file.width
            image = file.convert("RGB").resize((round(args.width / 3), round(file.height * factor)),
                                               Image.Resampling.LANCZOS)
        if args.voxels:
            image = draw_labels(image, grid, labels, scaled(image_from_ego(info, name), factor))
        if points is not None:
            image = draw_points(image, points, scaled(image_from_lidar(info, name), factor), max(1, args.width // 960))
        images[name] = image
    return images


def draw_sample(info: Mapping, args: argparse.Namespace, labels):
    """The picture of a sample."""
    from mmdet3d.core.visualization.compare import compose_comparison
    from mmdet3d.core.visualization.grid import OccupancyGrid
    from mmdet3d.core.visualization.occupancy import compose_frame
    from mmdet3d.datasets.infos import scene_name
    from mmdet3d.datasets.labels import GRID_SIZE
    from mmdet3d.datasets.metrics.files import read_prediction

    prediction, size = None, GRID_SIZE
    if args.pred:
        prediction = read_prediction(prediction_file(args.pred, info))
        size = prediction[0].shape
    truth = read_truth(info, args.infos, labels, size)
    grid = OccupancyGrid.make((prediction or truth)[0], labels)
    images = open_cameras(info, args, grid, labels)
    title = f"{scene_name(info)}   {info['token']}"
    marks = [text for wanted, text in ((args.points, "lidar points"), (args.voxels, "voxels")) if wanted]
    notes = [labels.name, *(["in the images: " + " and ".join(marks)] if marks else [])]
    if prediction is None:
        return compose_frame(images, *truth, labels, title, ["ground truth", *notes], width=args.width)
    if labels.name == "occ3d":
        prediction = (prediction[0], None)
    return compose_comparison(images, truth, prediction, labels, title, notes, width=args.width)


def run(args: argparse.Namespace) -> list[Path]:
    """Draw and write; the pictures."""
    from tqdm import tqdm

    from mmdet3d.core.visualization.drawing import save_image
    from mmdet3d.datasets.infos import load_infos, scene_name
    from mmdet3d.datasets.labels import label_set
    from mmdet3d.utils.files import prediction_path

    infos, labels = load_infos(args.infos), label_set(args.dataset)
    if args.index >= len(infos):
        raise ValueError(f"--index {args.index}: {args.infos} holds samples 0 to {len(infos) - 1}")
    kind, options = FORMATS[args.format]
    paths, frames = [], []
    for info in tqdm(infos[args.index : args.index + args.count], unit="sample", disable=not sys.stderr.isatty()):
        path = prediction_path(args.out, scene_name(info), info["token"]).with_suffix(f".{args.format}")
        picture = draw_sample(info, args, labels)
        paths.append(save_image(picture, path, kind, **options))
        if args.video:
            frames.append(picture.quantize(128))
    if args.video:
        paths.append(save_image(frames[0], args.video, "GIF", save_all=True, append_images=frames[1:], duration=500,
                                loop=0))
    return paths


def tell(paths: Sequence[Path]) -> None:
    """Say where the pictures are."""
    for path in paths:
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error, which is told in one line."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: tell(run(args)), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
