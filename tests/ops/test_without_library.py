"""The operators where nothing is compiled, and without mmcv: the references run behind the same functions."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
sys.modules["mmcv"] = sys.modules["mmdet3d.ops._C"] = None  # importing either raises ImportError
import torch
from mmdet3d import ops
from mmdet3d.ops import _library
assert not _library.AVAILABLE and "python setup.py build_ext --inplace" in _library.load_error()
assert not hasattr(torch.ops.mmdet3d, "bev_pool_v2_forward")

depth, context = torch.rand(2, 1, 3, 2, 5, requires_grad=True), torch.rand(2, 1, 2, 5, 4, requires_grad=True)
cells = torch.arange(60).view(2, 1, 3, 2, 5) % 25 - 1
order = ops.sort_by_cell(cells, (2, 3, 4))
volume = ops.bev_pool_v2(depth, context, cells, (2, 3, 4), order=order)
assert torch.equal(volume, ops.bev_pool_v2_reference(depth, context, cells, (2, 3, 4)))
volume.sum().backward()
assert torch.count_nonzero(depth.grad) == (cells >= 0).sum()

case = torch.rand(2, 15, 3, 4, requires_grad=True), [(3, 5)], torch.rand(2, 7, 3, 1, 2, 2), torch.rand(2, 7, 3, 1, 2)
out = ops.ms_deform_attn(*case)
assert torch.equal(out, ops.ms_deform_attn_reference(*case))
out.sum().backward()
assert torch.count_nonzero(case[0].grad) > 0
print("done")
"""


def test_references_serve_without_the_library():
    finished = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0 and finished.stdout.strip() == "done", finished.stderr
