"""Times the compiled operators against their plain PyTorch references, at the sizes of the released model.

    python tools/bench_ops.py --op all --device cuda
    python tools/bench_ops.py --op ms_deform_attn --device cpu --threads 2 --json ops.json

Each ``tests/ops/test_<op>.py`` says what is timed, through ``bench_cases(device, dtype)``, which returns a list of
(name, compiled callable, reference callable) and, where that means something, the least work: {"bytes": what has to be
read and written once, "flops": floating-point operations}. Times are medians after warm-up.

On a GPU a call by itself may take longer to launch than to run. So there are two times: "compiled" and "reference" are
of single calls, launches included; "queued" is of compiled calls whose launches the GPU does not wait for, as in a
network whose host runs ahead or in a CUDA graph. Rates are of the latter.

The share of the ceiling is the time that this work would take at the rates measured first, of copying a large tensor
and of a matrix product in the precision asked for (float32 without TF32), as a part of the time that was taken. It is
100 % for a copy, and less for what reads again what its caches could not hold, or cannot use matrix products.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
QUEUED_CALLS = 10  # behind one piece of other work
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def timed_operators() -> list[str]:
    """Operators whose tests say what is timed."""
    from mmdet3d.utils.operators import operator_folders

    tests = {op: ROOT / "tests" / "ops" / f"test_{op}.py" for op in operator_folders()}
    return [op for op, path in tests.items() if path.is_file() and "def bench_cases(" in path.read_text()]


def load_cases(op: str, device: str, dtype: torch.dtype) -> list[tuple]:
    """Cases of one operator, from its test module."""
    path = ROOT / "tests" / "ops" / f"test_{op}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bench_cases(device, dtype)


def median_ms(function: Callable, device: str, seconds: float) -> tuple[float, int]:
    """Median time of one call in milliseconds, and of how many calls, measured for about ``seconds``."""
    return _median(lambda: (_cuda_ms if device == "cuda" else _cpu_ms)(function), seconds)


def queued_ms(function: Callable, seconds: float) -> float:
    """Median time of one call on the GPU, measured for about ``seconds``, without its launches.

    Several calls are launched while the GPU is busy with a product that takes longer than their launches.
    """
    matrix = torch.ones(8192, 8192, device="cuda")
    return _median(lambda: _cuda_ms(function, QUEUED_CALLS, lambda: matrix @ matrix), seconds)[0]  # 20 ms and more


def _median(measure: Callable[[], float], seconds: float) -> tuple[float, int]:
    """Median of what ``measure`` returns within about ``seconds``, after three to warm up, and of how many."""
    for _ in range(3):
        begin = time.perf_counter()
        measure()
        took = time.perf_counter() - begin
    repeats = max(5, min(200, int(seconds / max(took, 1e-6))))
    return statistics.median(measure() for _ in range(repeats)), repeats


def _cpu_ms(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def _cuda_ms(function: Callable, calls: int = 1, before: Callable = lambda: None) -> float:
    """Time of one of ``calls``, which are launched behind what ``before`` launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def measure_ceilings(device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Bytes a second that a copy reads and writes, and operations a second of a matrix product in ``dtype``."""
    torch.backends.cuda.matmul.allow_tf32 = False
    numbers, side = (2**28, 8192) if device == "cuda" else (2**24, 1024)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    copy_ms, _ = median_ms(lambda: target.copy_(source), device, seconds)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    product_ms, _ = median_ms(lambda: matrix @ matrix, device, seconds)
    return {"bytes": 2 * source.nbytes / copy_ms * 1e3, "flops": 2 * side**3 / product_ms * 1e3}


def share_of_ceiling(work: dict[str, float], ceilings: dict[str, float], ms: float) -> float:
    """What the slower of the two kinds of work would take at its ceiling, as a part of the time taken."""
    return max(amount / ceilings[kind] for kind, amount in work.items()) / ms * 1e3


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    facts = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts | {"threads": torch.get_num_threads(), "cpus": os.cpu_count()}


def measure_cases(ops: list[str], device: str, dtype: str, seconds: float, ceilings: dict[str, float]
                  ) -> Iterator[dict]:
    """Times every case of ``ops``, and prints a row for each."""
    print(f"{'case':<44}{'compiled ms':>13}{'reference ms':>14}{'ratio':>8}{'queued ms':>11}{'GB/s':>8}"
          f"{'of ceiling':>12}")
    for op in ops:
        for name, compiled, reference, *work in load_cases(op, device, DTYPES[dtype]):
            fast, repeats = median_ms(compiled, device, seconds)
            slow, _ = median_ms(reference, device, seconds)
            row = {"op": op, "case": name, "compiled_ms": fast, "reference_ms": slow, "ratio": slow / fast,
                   "repeats": repeats}
            line = f"{name:<44}{fast:>13.3f}{slow:>14.3f}{slow / fast:>7.1f}x"
            taken = fast
            if device == "cuda":
                taken = row["queued_ms"] = queued_ms(compiled, seconds)
            line += f"{row.get('queued_ms', nan):>11.4f}"
            if work:
                share = share_of_ceiling(work[0], ceilings, taken)
                row |= {"work": work[0], "share_of_ceiling": share}
                line += f"{work[0]['bytes'] / taken / 1e6:>8.0f}{100 * share:>11.1f}%"
            print(line, flush=True)
            yield row


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]  # the latter for helpers of the tests
    operators = timed_operators()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=(*operators, "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each callable (default: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    from mmdet3d.ops._library import AVAILABLE, built_with_cuda, load_error
    from mmdet3d.utils.files import write_json

    if not AVAILABLE:
        raise SystemExit(f"nothing to compare: {load_error()}")
    if args.device == "cuda" and not (torch.cuda.is_available() and built_with_cuda()):
        raise SystemExit("--device cuda needs a CUDA device and operators built with CUDA")
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), f"dtype {args.dtype}", sep=", ")
    ceilings = measure_ceilings(args.device, DTYPES[args.dtype], args.seconds)
    print(f"a copy reads and writes {ceilings['bytes'] / 1e9:.0f} GB/s, {args.dtype} matrix products do "
          f"{ceilings['flops'] / 1e12:.2f} TFLOP/s")
    rows = []
    for row in measure_cases(operators if args.op == "all" else [args.op], args.device, args.dtype, args.seconds,
                             ceilings):
        rows.append(row)
        if args.json:  # after every case: a run that is broken off has measured something, too
            write_json(args.json, {"machine": facts, "dtype": args.dtype, "ceilings": ceilings, "cases": rows})


if __name__ == "__main__":
    main()
