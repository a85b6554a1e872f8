"""Evaluate a checkpoint on the test data of a config.

    python tools/test.py CONFIG CHECKPOINT
    bash tools/dist_test.sh CONFIG CHECKPOINT GPUS

Every process scores the predictions of its scenes as they appear; the result is the same for any number of processes
and loader workers. It prints the table of the reference evaluation and writes <work dir>/results.json. --out also
writes every prediction to DIR/<scene>/<token>.npz. docs/testing.md explains the options.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    from mmcv import DictAction

    from mmdet3d.utils.command import add_predictor_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file with the weights")
    parser.add_argument("--averaged", action="store_true",
                        help="of the checkpoint of a training, evaluate the averaged weights")
    parser.add_argument("--work-dir", metavar="DIR", help="where results.json goes; default: work_dir of the config, "
                                                          "else work_dirs/<name of the config>")
    parser.add_argument("--out", metavar="DIR", help="also write every prediction to DIR/<scene>/<token>.npz")
    parser.add_argument("--format-only", action="store_true",
                        help="write predictions (--out, default: results) without comparing them with anything")
    starts = add_predictor_options(parser)
    starts.add_argument("--carry-over", action="store_const", dest="scene_start", const="carried",
                        help="the same as --scene-start carried")
    parser.add_argument("--samples-per-gpu", type=int, metavar="N",
                        help="batch size of a process; default: data.test_dataloader of the config, else 1. The "
                             "published model mixes the samples of a batch, so that results depend on it")
    parser.add_argument("--workers-per-gpu", type=int, metavar="N", help="processes that load; default: as configured")
    parser.add_argument("--order", choices=("exact", "published"), default="exact",
                        help="exact: every sample once; published: order and collection of the reference, in which "
                             "samples come twice or never (%(default)s)")
    parser.add_argument("--noise", choices=("sample", "generator"), default="sample",
                        help="where the flow head's noise comes from: a hash of --seed and the sample, or torch's "
                             "generator as in the reference (%(default)s)")
    parser.add_argument("--pairing", choices=("token", "index"), default="token",
                        help="whose lidar positions a sample is seen from, see docs/metrics.md (%(default)s)")
    parser.add_argument("--scenes", metavar="FILE", help="scene.json of the nuScenes tables, for --pairing index")
    parser.add_argument("--cache", metavar="DIR", help="keep where rays hit the ground truth, for the next evaluation")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic cuDNN algorithms")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none",
                        help="what started the processes (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1, for one process; default: the first GPU, else the CPU")
    parser.add_argument("--allow-unsafe-checkpoint", action="store_true",
                        help="read a checkpoint that could run code: only from people you trust")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _accept_options_of_the_reference(parser)
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _accept_options_of_the_reference(parser: argparse.ArgumentParser) -> None:
    from mmcv import DictAction

    group = parser.add_argument_group("accepted as the reference's test script has them")
    group.add_argument("--eval", nargs="*", metavar="NAME", help="evaluating is the default; names are not read")
    group.add_argument("--gpu-ids", type=int, nargs="+", metavar="N", help="as --device cuda:N")
    group.add_argument("--gpu-id", type=int, metavar="N", help="as --device cuda:N")
    group.add_argument("--gpu-collect", action="store_true", help="not needed: only counters are collected")
    group.add_argument("--tmpdir", metavar="DIR", help="not needed, likewise")
    group.add_argument("--no-aavt", action="store_true", help="has no effect")
    group.add_argument("--eval-options", "--options", nargs="+", action=DictAction, metavar="KEY=VALUE",
                       help="has no effect; overrides of the config are --cfg-options")
    group.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by older launchers; not read")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.out is not None and args.out.endswith((".pkl", ".pickle")):
        parser.error(f"--out {args.out}: expected a folder; predictions are written one file a sample as they appear, "
                     "not all together (19 GB for nuScenes)")
    if args.format_only:
        args.out = args.out or "results"
    gpus = [*(args.gpu_ids or ()), *(() if args.gpu_id is None else (args.gpu_id,))]
    if len(gpus) > 1:
        parser.error(f"a process uses one GPU, got {gpus}; for several: bash tools/dist_test.sh")
    if gpus and args.device:
        parser.error("--device and --gpu-ids say the same; give one of them")
    if (gpus or args.device) and args.launcher != "none":
        parser.error("with --launcher every process takes the GPU with its local number; leave out --device and "
                     "--gpu-ids")
    args.device = f"cuda:{gpus[0]}" if gpus else args.device
    if (args.scenes is None) == (args.pairing == "index"):
        parser.error("--pairing index needs --scenes FILE" if args.scenes is None else
                     "--scenes is for --pairing index only")
    for name in ("samples_per_gpu", "workers_per_gpu"):
        value = getattr(args, name)
        if value is not None and value < (name == "samples_per_gpu"):
            parser.error(f"--{name.replace('_', '-')} must be at least {int(name == 'samples_per_gpu')}, got {value}")


def run(args: argparse.Namespace) -> int:
    """Evaluate and report; 0."""
    import torch

    from mmdet3d.apis.inference import choose_device, init_model, load_config
    from mmdet3d.apis.test import evaluate_model, write_record
    from mmdet3d.apis.train import set_random_seed, work_dir_of
    from mmdet3d.core.parallel import init_distributed
    from mmdet3d.datasets.samplers.sequence import distributed_place
    from mmdet3d.utils.logging import setup_logger

    cfg = load_config(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    device = init_distributed(args.launcher, cfg.get("dist_params"))
    if args.launcher == "none":
        device = choose_device(args.device)
    rank, _ = distributed_place()
    logger = setup_logger(level=cfg.get("log_level", "INFO"), rank=rank)
    for name in ("gpu_collect", "tmpdir", "no_aavt", "eval_options"):
        if getattr(args, name):
            logger.info("--%s has no effect here", name.replace("_", "-"))
    set_random_seed(args.seed, args.deterministic)
    torch.backends.cudnn.benchmark = bool(cfg.get("cudnn_benchmark")) and not args.deterministic
    options = _options(args, cfg)
    model = init_model(cfg, args.checkpoint, device, averaged=args.averaged, allow_unsafe=args.allow_unsafe_checkpoint)
    evaluation = evaluate_model(cfg, model, options)
    if rank == 0:
        path = write_record(work_dir_of(cfg, args.work_dir) / "results.json", evaluation, config=args.config,
                            checkpoint=args.checkpoint, averaged=args.averaged, seed=args.seed,
                            deterministic=args.deterministic, device=torch.device(device).type)
        report(evaluation, path)
    return 0


def _options(args: argparse.Namespace, cfg):
    from mmdet3d.core.evaluation import EvaluatorOptions
    from mmdet3d.core.evaluation.settings import evaluation_settings

    _, loader = evaluation_settings(cfg)
    given = {name: getattr(args, name) for name in loader if getattr(args, name) is not None}
    saves = cfg.get("model", {}).get("save_results", False)
    return EvaluatorOptions(
        **{**loader, **given}, order=args.order, scene_start=args.scene_start, pairing=args.pairing, scenes=args.scenes,
        cache=args.cache, score=not args.format_only, out=args.out or ("results" if saves else None),
        noise_seed=args.seed if args.noise == "sample" else None, mode=args.mode, fold=args.fuse_conv_bn)


def report(evaluation, path: Path) -> None:
    """Print table and numbers."""
    from mmdet3d.datasets.metrics.moving import format_moving

    options, summary = evaluation.options, evaluation.summary
    if summary is not None:
        print(summary.table())
        print(summary.headline)
        rays = summary.rays
        print(", ".join(f"{name} {rays[name]:.4f}" for name in ("RayIoU", "mAVE", "occ_score")),
              f"(mAVE over {rays['flow_rays']} rays); voxel mIoU {summary.voxels['miou']:.2f} %")
        if summary.moving["rays"]:
            print(format_moving(summary.moving))
        if summary.missing:
            print(f"NOT ALL SAMPLES: {len(summary.missing)} were left out by --order published")
    rate = evaluation.samples / max(evaluation.seconds, 1e-9)
    print(f"{evaluation.samples} samples in {evaluation.seconds:.1f} s ({rate:.2f} a second), "
          f"{evaluation.world_size} processes x batch {options.samples_per_gpu}; order: {options.order}; start of "
          f"a scene: {options.scene_start}; noise: "
          f"{'by torch' if options.noise_seed is None else f'by sample, seed {options.noise_seed}'}")
    if options.out is not None:
        print(f"predictions: {options.out}")
    print(f"results: {path}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error, which is told in one line."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID")) if args.launcher != "none" else None
    code = run_tool(lambda: run(args), debug=args.debug, who="" if rank is None else f"rank {rank}: ")
    if code and args.launcher != "none":  # an orderly exit could wait for the other processes, which wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    from mmdet3d.core.parallel import leave_distributed

    leave_distributed()
    return code


if __name__ == "__main__":
    sys.exit(main())
