"""Make a small driving world in the nuScenes format, without any download.

    python tools/create_synthetic.py --out data/synthetic
    python tools/create_synthetic.py --small --out data/synthetic-small

Writes images of six cameras, lidar points, Occ3D and OpenOcc labels with the coarse ones, the nuScenes tables, CAN bus
poses and the info files: all that the configs for it read. The same options always give the same files; an interrupted
run is continued by the same command. docs/data_synthetic.md says what is in the world.
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
    from mmdet3d.datasets.synthetic.prepare import SMALL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", default="data/synthetic", help="a new folder (%(default)s)")
    parser.add_argument("--small", action="store_true",
                        help=f"{len(SMALL.scenes)} scenes of {SMALL.frames} frames, to try things; no other option "
                             "about the content goes with it")
    parser.add_argument("--scenes", type=int, default=4, metavar="N", help="a quarter are val scenes (%(default)s)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="key frames per scene (%(default)s)")
    parser.add_argument("--image-size", type=image_size, default=(800, 450), metavar="WxH",
                        help="the cameras' view stays the same (800x450)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (%(default)s)")
    parser.add_argument("--version", choices=VERSIONS, default=VERSIONS[0],
                        help="of the tables, and so whose scene names are used (%(default)s)")
    parser.add_argument("--workers", type=int, default=available_cpus(), metavar="N",
                        help="processes; 0 uses none but this (%(default)s)")
    args = parser.parse_args(argv)
    content = ("scenes", "frames", "image_size", "seed", "version")
    if args.small and (given := [name for name in content if getattr(args, name) != parser.get_default(name)]):
        parser.error(f"--small says what to write; it does not go with --{given[0].replace('_', '-')}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args = parse_args(argv)

    from tqdm import tqdm

    from mmdet3d.datasets.synthetic.names import scene_names
    from mmdet3d.datasets.synthetic.prepare import SMALL, prepare_dataset
    from mmdet3d.datasets.synthetic.scene import WorldSettings

    start = time.perf_counter()
    try:
        settings = SMALL if args.small else WorldSettings(scene_names(args.version, args.scenes), args.frames,
                                                          args.image_size, args.seed, args.version)
        frames = len(settings.scenes) * settings.frames
        with tqdm(total=frames, unit="frame", disable=None) as bar:
            infos = prepare_dataset(args.out, settings, args.workers, bar.update)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(settings.scenes)} scenes, {frames} key frames in {time.perf_counter() - start:.0f} s")
    print("info files: " + ", ".join(map(str, infos.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
