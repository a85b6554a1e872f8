"""Samples per second of the train and test pipelines, before and after.

    taskset -c 0,1 python tools/bench_pipeline.py config/stcocc/stcocc-r50-16f-openocc-12e.py --json pipeline.json

Without --info-file it works on frames of the small synthetic data set (data/synthetic-small, made if it is not there),
with their images brought to the size of nuScenes' own.

"literal" decodes and resizes all images of a sample with Pillow, normalises them with arithmetic and copies the test
sample, as straightforward code does. "pipeline" are the steps of the config as they are, "uint8" the same with
``ship_uint8``. All three give the same values. Where other programs run, CPU seconds per sample (loader and workers
together) say more than samples per second.
"""

import argparse
import copy
import pickle
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from mmcv import Config
from mmcv.parallel import collate
from PIL import Image
from torch.utils.data import DataLoader

from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.converters.parallel import available_cpus
from mmdet3d.datasets.infos import load_infos, resolve_path
from mmdet3d.datasets.pipelines.augmentation import ImageAugmentation
from mmdet3d.datasets.pipelines.images import ImageReader, PrepareImageInputs
from mmdet3d.datasets.synthetic.prepare import INFO_FILE, prepare_dataset
from mmdet3d.utils.files import write_json
from mmdet3d.utils.normalise import MEAN, STD

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("literal", "pipeline", "uint8")


class LiteralReader(ImageReader):
    """Reads every image anew and resizes all of it."""

    def read(self, path, augmentation: ImageAugmentation, info_file=None, what: str = "image") -> np.ndarray:
        """Augmented image, (H, W, 3) uint8 RGB."""
        image = self.open(path, info_file, what).convert("RGB")
        image = image.resize(augmentation.resize_dims, Image.Resampling.BICUBIC).crop(augmentation.crop)
        if augmentation.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image.rotate(augmentation.rotate, Image.Resampling.NEAREST))


class LiteralImages(PrepareImageInputs):
    """The image step, normalising with arithmetic, image by image."""

    def __init__(self, **options) -> None:
        super().__init__(**options, ship_uint8=True, reader=LiteralReader())

    def __call__(self, results: dict) -> dict:
        """See the parent class."""
        results = super().__call__(results)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        images = torch.stack([(image.float() - mean) / std for image in results["img_inputs"][0]])
        results["img_inputs"] = (images, *results["img_inputs"][1:])
        return results


def small_set() -> Path:
    """Info file of the small synthetic data set, which is made if it is not there."""
    info_file = ROOT / "data/synthetic-small" / INFO_FILE.format(split="train")
    return info_file if info_file.is_file() else prepare_dataset(info_file.parent, workers=available_cpus())["train"]


def make_sequence(info_file: Path, frames: int, folder: Path, label_folder: Path | None,
                  image_size: tuple[int, int] | None = None) -> Path:
    """An info file with one sequence of ``frames`` frames that repeats records, every image under its own name.

    Images of another size than ``image_size`` (width, height) are scaled to it and written as JPEG anew.
    """
    records = load_infos(info_file)
    sources: dict[str, tuple[Path, float]] = {}
    infos = []
    for i in range(frames):
        info = copy.deepcopy(records[i % len(records)])
        info.update(token=f"frame{i}", timestamp=i, scene_token="scene", prev=f"frame{i - 1}" if i else "")
        info["occ_path"] = str(label_folder.absolute() if label_folder else resolve_path(info["occ_path"], info_file))
        info["lidar_path"] = str(resolve_path(info["lidar_path"], info_file).absolute())
        for name, camera in info["cams"].items():
            original = camera["data_path"]
            if original not in sources:
                target = folder / f"source{len(sources)}.jpg"
                sources[original] = scaled_image(resolve_path(original, info_file), image_size, target)
            path, factor = sources[original]
            camera["cam_intrinsic"] = np.diag([factor, factor, 1.0]) @ camera["cam_intrinsic"]
            link = folder / f"{name}_{i}"
            link.symlink_to(path.absolute())
            camera["data_path"] = str(link)
        infos.append(info)
    path = folder / "infos.pkl"
    path.write_bytes(pickle.dumps({"infos": infos, "metadata": {}}))
    return path


def scaled_image(path: Path, size: tuple[int, int] | None, target: Path) -> tuple[Path, float]:
    """An image file of ``size``, ``path`` itself if it has it, and the factor by which it was scaled."""
    with Image.open(path) as image:
        if size is None or image.size == size:
            return path, 1.0
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=92)
        return target, size[0] / image.width


def dataset_of(config: Mapping, info_file: Path, variant: str):
    """The data set of ``data.train`` or ``data.test`` with the steps of a variant."""
    config = {**config, "ann_file": str(info_file), "sequences_split_num": 1}
    first, *others = (dict(step) for step in config["pipeline"])
    if variant == "literal":
        first["type"] = LiteralImages
        others = [(lambda results: copy.deepcopy(results)), *others] if config.get("test_mode") else others
    else:
        first["ship_uint8"] = variant == "uint8"
    return build_dataset({**config, "pipeline": [first, *others]})


def cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(dataset, workers: int) -> dict[str, float]:
    """Samples per second after the first sample, and CPU seconds per sample."""
    collate_fn = partial(collate, samples_per_gpu=1)
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=collate_fn)
    cpu = cpu_seconds()
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    wall = time.perf_counter() - start
    del batches  # ends the workers, whose time counts only then
    return {"samples_per_s": count / wall, "cpu_s_per_sample": (cpu_seconds() - cpu) / (count + 1)}


def report(rows: Sequence[Mapping]) -> None:
    """Print a table."""
    print(f"{'split':6} {'workers':>7} {'variant':9} {'samples/s':>10} {'CPU s/sample':>13} {'faster (CPU)':>13}")
    for row in rows:
        before = next(r for r in rows if (r["split"], r["workers"]) == (row["split"], row["workers"]))
        print(f"{row['split']:6} {row['workers']:7} {row['variant']:9} {row['samples_per_s']:10.2f} "
              f"{row['cpu_s_per_sample']:13.3f} {before['cpu_s_per_sample'] / row['cpu_s_per_sample']:12.1f}x")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--info-file", type=Path, help="info pickle whose frames are repeated (data/synthetic-small)")
    parser.add_argument("--image-size", type=int, nargs=2, default=(1600, 900), metavar=("W", "H"),
                        help="bring images to this size first, 0 0: as they are (1600 900)")
    parser.add_argument("--label-folder", type=Path, help="one folder with labels for all samples; default: their own")
    parser.add_argument("--frames", type=int, default=16, help="length of the sequence (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=1, help="keep the best of so many runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    data = Config.fromfile(str(args.config)).data.to_dict()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        info_file = make_sequence(args.info_file or small_set(), args.frames, Path(folder), args.label_folder,
                                  tuple(args.image_size) if all(args.image_size) else None)
        for split in ("train", "test"):
            for workers in args.workers:
                for variant in VARIANTS:
                    runs = [measure(dataset_of(data[split], info_file, variant), workers) for _ in range(args.repeat)]
                    best = {"samples_per_s": max(run["samples_per_s"] for run in runs),
                            "cpu_s_per_sample": min(run["cpu_s_per_sample"] for run in runs)}
                    rows.append({"split": split, "workers": workers, "variant": variant, **best})
    report(rows)
    if args.json:
        write_json(args.json, {
            "config": str(args.config), "frames": args.frames, "image_size": args.image_size,
            "infos": str(args.info_file or "data/synthetic-small"), "machine": platform.processor() or
            platform.machine(), "cpus": available_cpus(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
