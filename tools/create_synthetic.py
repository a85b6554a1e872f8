"""Make a small driving world in the nuScenes format, without any download.

    python tools/create_synthetic.py --out data/synthetic
    python tools/create_data.py --root data/synthetic --version v1.0-mini

Writes images of six cameras, lidar points, Occ3D and OpenOcc labels, the nuScenes tables and CAN bus poses. The same
options always give the same files; an interrupted run is continued by the same command. docs/data_synthetic.md says
what is in the world.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def image_size(text: str) -> tuple[int, int]:
    """(width, height) of WxH."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT such as 800x450, got {text!r}")
    return int(match[1]), int(match[2])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    from mmdet3d.datasets.converters.parallel import available_cpus
    from mmdet3d.datasets.synthetic.names import VERSIONS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", default="data/synthetic", help="a new folder (%(default)s)")
    parser.add_argument("--scenes", type=int, default=4, metavar="N", help="a quarter are val scenes (%(default)s)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="key frames per scene (%(default)s)")
    parser.add_argument("--image-size", type=image_size, default=(800, 450), metavar="WxH",
                        help="the cameras' view stays the same (800x450)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (%(default)s)")
    parser.add_argument("--version", choices=VERSIONS, default=VERSIONS[0],
                        help="of the tables, and so whose scene names are used (%(default)s)")
    parser.add_argument("--workers", type=int, default=available_cpus(), metavar="N",
                        help="processes; 0 uses none but this (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args = parse_args(argv)

    from tqdm import tqdm

    from mmdet3d.datasets.synthetic.generate import write_dataset
    from mmdet3d.datasets.synthetic.names import scene_names
    from mmdet3d.datasets.synthetic.scene import WorldSettings

    start = time.perf_counter()
    try:
        settings = WorldSettings(scene_names(args.version, args.scenes), args.frames, args.image_size, args.seed,
                                 args.version)
        with tqdm(total=args.scenes * args.frames, unit="frame", disable=None) as bar:
            write_dataset(args.out, settings, args.workers, bar.update)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.scenes} scenes, {args.scenes * args.frames} key frames in "
          f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
