"""Draw the curves of trainings: loss, learning rate and, where it was measured, RayIoU.

    python tools/plot_log.py work_dirs/run_a work_dirs/run_b --out curve.png

Reads the *.log.json of the folders, or files that are named. Where a training was resumed, the newest log counts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directory or .log.json file")
    parser.add_argument("--out", metavar="FILE", default="curve.png", help="picture, .png, .svg or .pdf (%(default)s)")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the runs; default: those of the folders")
    parser.add_argument("--losses", nargs="+", default=["loss"], metavar="KEY", help="what to draw (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.names is not None and len(args.names) != len(args.runs):
        parser.error(f"--names: expected {len(args.runs)}, one for each run, got {len(args.names)}")
    if Path(args.out).suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--out: expected a .png, .svg or .pdf file, got {args.out}")
    return args


def read_log(run: str) -> dict[str, dict[int, dict]]:
    """What a run logged, as {"train" or "val": {iteration: values}}.

    Raises:
        ValueError: there is no log, or nothing in it; names the file and the line.
    """
    path = Path(run)
    files = sorted(path.glob("*.log.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: found no *.log.json")
    log: dict[str, dict[int, dict]] = {"train": {}, "val": {}}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
            if isinstance(values, dict) and values.get("mode") in log and isinstance(values.get("iter"), int):
                log[values["mode"]][values["iter"]] = values
    if not log["train"] and not log["val"]:
        raise ValueError(f"{files[-1]}: holds no lines of a training")
    return log


def points(lines: dict[int, dict], key: str) -> tuple[list[int], list[float]]:
    """Iterations in which ``key`` was logged as a number, ascending, and its values."""
    found = [(iteration, values[key]) for iteration, values in sorted(lines.items())
             if isinstance(values.get(key), int | float)]
    return [iteration for iteration, _ in found], [value for _, value in found]


def draw(logs: dict[str, dict], losses: Sequence[str], out: str) -> None:
    """Write the picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install {error.name}, or bash tools/setup_env.sh"
                         ) from error

    from mmdet3d.utils.files import atomic_write

    panels = [("train", losses, "loss", "log"), ("train", ["lr"], "learning rate", "linear")]
    if any(points(log["val"], "RayIoU")[0] for log in logs.values()):
        panels.append(("val", ["RayIoU"], "RayIoU (validation)", "linear"))
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (mode, keys, title, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, log in logs.items():
            for key in keys:
                label = name if len(keys) == 1 else f"{name}: {key}"
                axes.plot(*points(log[mode], key), label=label, marker="o" if mode == "val" else None, linewidth=1.2)
        axes.set(title=title, xlabel="iteration", yscale=scale)
        axes.grid(alpha=0.3, which="both")
        if len(logs) > 1 or len(keys) > 1:
            axes.legend(fontsize="small")
    with atomic_write(out) as file:
        figure.savefig(file, format=Path(out).suffix[1:].lower(), dpi=110)


def run(args: argparse.Namespace) -> None:
    """Read the logs and draw them."""
    names = args.names or [Path(run).resolve().stem if Path(run).is_file() else Path(run).resolve().name
                           for run in args.runs]
    if len(set(names)) != len(names):
        raise ValueError(f"runs have the same name: {names}; give --names")
    logs = {name: read_log(run) for name, run in zip(names, args.runs, strict=True)}
    missing = [key for key in args.losses if not any(points(log["train"], key)[0] for log in logs.values())]
    if missing:
        known = sorted({key for log in logs.values() for values in log["train"].values() for key in values})
        raise ValueError(f"--losses: {missing} were not logged; found {known}")
    draw(logs, args.losses, args.out)
    print(f"{args.out}: {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 on success, 2 after an error."""
    args = parse_args(argv)
    from mmdet3d.utils.command import run_tool

    return run_tool(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
