"""Score what needs no training on the test data of a config, as tools/test.py scores a checkpoint.

    python tools/baselines.py CONFIG --out majority.json
    python tools/baselines.py CONFIG --predictor untrained --out untrained.json

majority: for each voxel around the car the label that it has most often in the training data, and zero flow.
untrained: the model as it is before the first iteration of a training with the same --seed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    from mmcv import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file")
    parser.add_argument("--predictor", choices=("majority", "untrained"), default="majority",
                        help="what is scored (%(default)s)")
    parser.add_argument("--out", metavar="FILE.json", default="baseline.json", help="where scores go (%(default)s)")
    parser.add_argument("--save", metavar="FILE.npy", help="also write the labels of the majority, uint8 [X, Y, Z]")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and the flow head (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first GPU, else the CPU")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.save and args.predictor != "majority":
        parser.error("--save is for --predictor majority")
    return args


def score_majority(cfg, device, args: argparse.Namespace):
    """The evaluation of the most frequent labels, and how many samples they come from."""
    import numpy as np
    from tqdm import tqdm

    from mmdet3d.core.evaluation.baselines import evaluate_constant, majority_labels
    from mmdet3d.core.evaluation.settings import evaluation_settings
    from mmdet3d.datasets import build_dataset
    from mmdet3d.utils.files import atomic_write

    train = build_dataset(cfg.data.train, place="data.train")
    test = build_dataset(evaluation_settings(cfg)[0], place="data.test")

    def progress(what: str):
        return lambda loop: tqdm(loop, desc=what, unit="sample", disable=None, dynamic_ncols=True)

    labels = majority_labels(train, progress("labels of the training data"))
    if args.save:
        with atomic_write(args.save) as file:
            np.save(file, labels)
    return evaluate_constant(test, labels, device, progress("scoring")), {"train_samples": len(train)}


def score_untrained(cfg, device, args: argparse.Namespace):
    """The evaluation of the model with the weights that a training begins with."""
    from mmdet3d.apis.test import evaluate_model
    from mmdet3d.apis.train import build_training_model, set_random_seed
    from mmdet3d.core.evaluation import EvaluatorOptions
    from mmdet3d.core.evaluation.settings import evaluation_settings

    set_random_seed(args.seed)
    model = build_training_model(cfg, device, resumes=False, allow_unsafe=False)
    options = EvaluatorOptions(**evaluation_settings(cfg)[1], noise_seed=args.seed)
    return evaluate_model(cfg, model, options), {}


def run(args: argparse.Namespace) -> None:
    """Score, print and write."""
    from mmdet3d.apis.inference import choose_device, load_config
    from mmdet3d.apis.test import write_record
    from mmdet3d.datasets.metrics.moving import format_moving
    from mmdet3d.utils.logging import setup_logger

    cfg = load_config(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    setup_logger(level=cfg.get("log_level", "INFO"))
    device = choose_device(args.device)
    score = score_majority if args.predictor == "majority" else score_untrained
    evaluation, about = score(cfg, device, args)
    path = write_record(args.out, evaluation, config=args.config, predictor=args.predictor, seed=args.seed,
                        device=device.type, **about)
    summary = evaluation.summary
    print(summary.table())
    print(f"{args.predictor}: RayIoU {summary.rays['RayIoU']:.4f}, voxel mIoU {summary.voxels['miou']:.2f} %, "
          f"{evaluation.samples} samples in {evaluation.seconds:.0f} s")
    if summary.moving["rays"]:
        print(format_moving(summary.moving))
    print(f"results: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error, 130 when interrupted."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
