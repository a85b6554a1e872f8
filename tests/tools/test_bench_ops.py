"""bench_ops.py: its rows, and the share of the ceiling."""

import json

import pytest
from loading import load_tool

bench_ops = load_tool("bench_ops")


def test_the_share_of_the_ceiling_is_that_of_the_slower_kind_of_work():
    ceilings = {"bytes": 2e9, "flops": 1e12}
    assert bench_ops.share_of_ceiling({"bytes": 1e6}, ceilings, 1.0) == 0.5
    assert bench_ops.share_of_ceiling({"bytes": 1e6, "flops": 8e8}, ceilings, 1.0) == 0.8
    assert bench_ops.share_of_ceiling({"bytes": 1e6, "flops": 1e6}, ceilings, 2.0) == 0.25


def test_all_operators_with_cases_are_timed():
    known = ["bev_pool_v2", "class_guidance", "history_warp", "ms_deform_attn", "oa_cross_attention", "plane_sweep",
             "ray_cast", "row_argmax", "upsample_add", "upsample_mlp"]
    assert set(known) <= set(bench_ops.timed_operators())
    assert "src" not in bench_ops.timed_operators()


def test_rows_are_printed_and_written(tmp_path, capsys):
    bench_ops.main(["--op", "upsample_add", "--device", "cpu", "--seconds", "0.001",
                    "--json", str(tmp_path / "ops.json")])
    record = json.loads((tmp_path / "ops.json").read_text())
    (row,) = record["cases"]
    share = bench_ops.share_of_ceiling(row["work"], record["ceilings"], row["compiled_ms"])
    assert row["share_of_ceiling"] == share > 0
    assert f"{100 * share:.1f}%" in capsys.readouterr().out


@pytest.mark.cuda
def test_a_gpu_has_times_without_launches(tmp_path):
    bench_ops.main(["--op", "upsample_add", "--device", "cuda", "--seconds", "0.01",
                    "--json", str(tmp_path / "ops.json")])
    record = json.loads((tmp_path / "ops.json").read_text())
    (row,) = record["cases"]
    assert row["queued_ms"] > 0
    assert row["share_of_ceiling"] == bench_ops.share_of_ceiling(row["work"], record["ceilings"], row["queued_ms"])
