"""The two scripts that call the set-up step first, in a copy where Python is real and what they call is not."""

import pytest


def test_callers_pass_on_what_is_not_for_the_set_up(machine):
    machine.note("has-wheel")
    result = machine.run("--infos", "my frames.pkl", "--find-links", str(machine.home), script="quickstart.sh")
    assert result.returncode == 0, result.stderr
    config = machine.root / "config/stcocc/stcocc-r50-16f-openocc-12e.py"
    assert result.stdout == f"infer {config} --out {machine.root}/outputs/quickstart --infos my frames.pkl\n"
    assert machine.run("-k", "a or b", script="run_tests.sh").stdout == f"pytest {machine.root} -k a or b\n"
    assert "usage:" in machine.run("--help", script="quickstart.sh").stdout


def test_quickstart_does_what_is_not_done(machine):
    machine.note("has-wheel")
    first = machine.run("--iterations", "50", "--out", "my pictures", script="quickstart.sh")
    assert first.returncode == 0, first.stderr
    config = machine.root / "config/stcocc/stcocc-tiny-synthetic.py"
    data = machine.root / "data/synthetic-quickstart"
    files = " ".join(f"data.{part}.ann_file={data}/stcocc-nuscenes_infos_{split}.pkl"
                     for part, split in (("train", "train"), ("val", "val"), ("test", "val")))
    run = "my pictures/50-iterations"
    table = ("results_table --names majority untrained trained -- my pictures/majority.json my pictures/untrained.json "
             f"{run}/trained/results.json")
    assert first.stdout.splitlines() == [
        f"create_synthetic --scenes 8 --frames 6 --image-size 400x225 --out {data}",
        f"baselines {config} --out my pictures/majority.json --cfg-options {files}",
        f"baselines {config} --predictor untrained --out my pictures/untrained.json --cfg-options {files}",
        f"train {config} --work-dir {run}/training --auto-resume --cfg-options {files} runner.max_iters=50 "
        "lr_config.step=[40]",
        f"test {config} {run}/training/iter_50.pth --work-dir {run}/trained --out {run}/predictions "
        f"--cfg-options {files}",
        f"visualize --infos {data}/stcocc-nuscenes_infos_val.pkl --index 2 --count 4 --pred {run}/predictions "
        f"--out {run}/pictures.part",
        f"plot_log {run}/training --out {run}/curve.png", table]
    assert (machine.home / run / "table.md").read_text() == table + "\n"
    assert (machine.home / run / "pictures").is_dir() and "these are no nuScenes scores" in first.stderr

    again = machine.run("--iterations=50", "--out=my pictures", script="quickstart.sh")
    assert again.stdout.splitlines() == [table] and again.stderr.count("already there:") == 7
    longer = machine.run("--iterations", "60", "--out", "my pictures", script="quickstart.sh")
    assert [line.split()[0] for line in longer.stdout.splitlines()] == [
        "train", "test", "visualize", "plot_log", "results_table"]


@pytest.mark.parametrize("arguments, message", [
    (["--iterations", "none"], "--iterations: expected a number from 1, got none"), (["--out"], "--out needs a value"),
    (["--seed", "3"], "unknown option: --seed (--help lists them)")])
def test_quickstart_refuses_what_it_does_not_know(machine, arguments, message):
    machine.note("has-wheel")
    result = machine.run(*arguments, script="quickstart.sh")
    assert result.returncode == 1 and message in result.stderr and not result.stdout


def test_a_failed_step_of_the_quickstart_ends_it(machine):
    machine.note("has-wheel")
    (machine.root / "tools/train.py").write_text("raise SystemExit(3)")
    result = machine.run("--iterations", "50", script="quickstart.sh")
    assert result.returncode == 3 and "scoring the trained model" not in result.stderr
