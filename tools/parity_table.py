"""Tables of measured differences to the reference implementation, for docs/parity.md.

    python -m pytest tests/golden -o junit_family=xunit1 --junitxml=golden.xml
    python tools/parity_table.py golden.xml --device cpu

reads what the golden tests recorded and writes the tables as Markdown.
"""

import argparse
import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence

EVAL_TENSORS = ("depth", "context", "coarse_voxel_0", "coarse_voxel_1", "coarse_voxel_2", "pred_voxel_semantic_1_8",
                "pred_voxel_semantic_1_4", "pred_voxel_semantic_1_2", "voxel", "history_stage2", "history_stage1",
                "history_stage0", "semantic_logits", "flow")


def recorded(path: str, device: str) -> dict[str, dict[str, float]]:
    """Recorded properties of the golden tests on ``device``, by ``test/property``.

    Raises:
        SystemExit: the file holds none.
    """
    found = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name, _, parameters = case.get("name").partition("[")
        if device not in re.split(r"[-\]]", parameters):
            continue
        variant = next((v for v in ("openocc", "occ3d") if v in parameters), "")
        for entry in case.iter("property"):
            values = ast.literal_eval(re.sub(r"np\.float64\(([^)]*)\)", r"\1", entry.get("value")))
            found[f"{name}{'/' if variant else ''}{variant}/{entry.get('name')}"] = values
    if not found:
        raise SystemExit(f"{path}: no recorded values of golden tests on {device!r}")
    return found


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table below a heading."""
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def columns(values: Mapping[str, float], prefix: str) -> list[str]:
    """Names such as ``frame0``, ``frame1`` that the keys of ``values`` begin with."""
    return sorted({key.split("/")[0] for key in values if key.startswith(prefix)})


def small(value: float | None) -> str:
    """A difference in two digits."""
    return "" if value is None else f"{value:.1e}"


def eval_table(values: Mapping, name: str, title: str) -> str:
    """Differences of the evaluation tensors of one config, frame by frame."""
    errors = values[f"test_eval_equals_the_reference/{name}/errors"]
    equal = values[f"test_eval_equals_the_reference/{name}/equal_semantics"]
    frames = columns(errors, "frame")
    rows = [[f"`{tensor}`", *(small(errors.get(f"{frame}/{tensor}")) for frame in frames)]
            for tensor in EVAL_TENSORS if f"{frames[0]}/{tensor}" in errors]
    rows.append(["classes equal", *(f"{100 * equal[frame]:.4f} %" for frame in frames)])
    return table(title, ["tensor", *frames], rows)


def train_table(values: Mapping, title: str) -> str:
    """Relative differences of the losses, and the largest of the gradient norms."""
    errors = values["test_training_equals_the_reference/relative_errors"]
    steps = columns(errors, "step")
    names = sorted({key.split("/")[1] for key in errors if "/grad/" not in key})
    rows = [[f"`{name}`", *(small(errors[f"{step}/{name}"]) for step in steps)] for name in names]
    largest = [max(v for key, v in errors.items() if key.startswith(f"{step}/grad/")) for step in steps]
    return table(title, ["quantity", *steps], [*rows, ["gradient norms, largest", *map(small, largest)]])


def second_set_tables(values: Mapping, device: str) -> str:
    """Differences of the second set: image branch, then voxel path."""
    image = values["test_image_branch/errors"]
    voxel = values["test_voxel_path_and_losses/errors"]
    steps = columns(voxel, "step")
    names = sorted({key.split("/")[1] for key in voxel})
    rows = [[f"`{name}`", *(small(voxel.get(f"{step}/{name}")) for step in steps)] for name in names]
    return (table(f"Second set, image branch ({device})", ["tensor", "difference"],
                  [[f"`{name}`", small(error)] for name, error in sorted(image.items())]) + "\n"
            + table(f"Second set, voxel path ({device})", ["tensor", *steps], rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("xml", help="JUnit file of the golden tests")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    values, device = recorded(args.xml, args.device), {"cpu": "CPU", "cuda": "CUDA"}[args.device]
    sys.stdout.write("\n".join([eval_table(values, "openocc", f"OpenOcc, evaluation ({device})"),
                                eval_table(values, "occ3d", f"Occ3D, evaluation ({device})"),
                                train_table(values, f"OpenOcc, training ({device})"),
                                second_set_tables(values, device)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
