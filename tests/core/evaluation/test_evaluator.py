"""Evaluation of a model: the same counters however the samples are shared out, and nothing else is touched."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import evaluation_case as case
import numpy as np
import pytest
import torch
from processes import run_job

from mmdet3d.core.evaluation import Evaluator, EvaluatorOptions
from mmdet3d.core.evaluation.collection import exact_collection, published_collection
from mmdet3d.core.evaluation.prediction_files import PredictionFiles
from mmdet3d.datasets.metrics.coverage import CoverageError
from mmdet3d.datasets.scoring import GroundTruthSource, SampleScore, SampleScorer, summarise

HERE = Path(__file__).resolve()
INLINE = {"workers_per_gpu": 0}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tiny_world):
    return case.dataset(tiny_world)


@pytest.fixture(scope="module")
def model(data):
    return case.model(data)


def evaluate(data, model, **options):
    return Evaluator(data, EvaluatorOptions(**{**INLINE, **options})).run(model)


@pytest.fixture(scope="module")
def plain(data, model, tmp_path_factory):
    """The evaluation with default options, and its prediction files."""
    folder = tmp_path_factory.mktemp("plain")
    return evaluate(data, model, out=str(folder)), folder


def numbers(evaluation):
    """All counters, bit by bit."""
    rays, voxels = evaluation.summary.counters["rays"], evaluation.summary.counters["voxels"]
    counted = {name: np.asarray(rays[name]).tolist() for name in ("gt", "pred", "tp", "flow_rays")}
    return {**counted, "flow_error": [value.hex() for value in np.asarray(rays["flow_error"]).tolist()],
            "confusion": np.asarray(voxels["confusion"]).tolist(), "tokens": rays["tokens"]}


def tokens_of(data):
    return [info["token"] for info in data.data_infos]


def test_the_case_says_something(plain, data):
    rays = plain[0].summary.rays
    assert rays["rays"] > 10000 and rays["flow_rays"] > 50 and rays["mAVE"] > 0.1 and rays["RayIoU"] > 0
    assert rays["samples"] == plain[0].samples == len(data) == sum(case.LENGTHS)
    assert plain[0].summary.missing == () and numbers(plain[0])["tokens"] == tokens_of(data)


def test_scores_are_those_of_the_files(plain, data):
    """Predictions that were written and the ground truth, scored by the tool's own way from NumPy arrays."""
    evaluation, folder = plain
    totals = []
    for index, info in enumerate(data.data_infos):
        scene, token = info["occ_path"].split("/")[-2:]
        with np.load(folder / scene / f"{token}.npz") as file:
            semantics, flow = file["semantics"], file["flow"]
        assert (semantics.dtype, flow.dtype) == (np.uint8, np.float16)
        assert semantics.shape == (40, 40, 8) and flow.shape == (40, 40, 8, 2)
        totals.append({"occ_results": semantics[None], "flow_results": flow[None], "index": [index]})
    assert len(list(folder.rglob("*"))) == len(data) + len(case.LENGTHS)  # nothing else: no temporary files
    result = data.evaluate(totals)
    assert result == {"miou": evaluation.summary.rays["miou"], "mave": evaluation.summary.rays["mave"]}


def test_repeating_gives_the_same_bits(plain, data, model):
    torch.manual_seed(1)
    assert numbers(evaluate(data, model)) == numbers(plain[0])


def test_workers_change_nothing(plain, data, model):
    assert numbers(evaluate(data, model, workers_per_gpu=2)) == numbers(plain[0])


def test_another_noise_seed_changes_the_flow_only(plain, data, model):
    other, mine = numbers(evaluate(data, model, noise_seed=1)), numbers(plain[0])
    assert other.pop("flow_error") != mine.pop("flow_error") and other == mine


def test_noise_of_the_generator_follows_its_seed(plain, data, model):
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(numbers(evaluate(data, model, noise_seed=None))["flow_error"])
    assert results[0] == results[1] != results[2]


def test_model_and_generators_are_left_alone(data, model):
    model.train()
    model.forward_projection.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model.memory = sentinel = object.__new__(type("Memory", (), {}))
    try:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
        evaluate(data, model, noise_seed=None)
        drawn = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
        assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002
        assert model.memory is sentinel
    finally:
        model.memory = None
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scene_does_not_depend_on_the_one_before_it(data, model, tmp_path):
    """The first sequence is the same with nothing before it, and the others are not, if the memory is carried over."""
    folder = tmp_path / "none"
    evaluate(data, model, scene_start="none", score=False, out=str(folder))
    evaluate(data, model, scene_start="carried", score=False, out=str(tmp_path / "carried"))
    changed = 0
    for info in data.data_infos:
        name = "/".join(info["occ_path"].split("/")[-2:]) + ".npz"
        with np.load(folder / name) as one, np.load(tmp_path / "carried" / name) as other:
            changed += not np.array_equal(one["flow"], other["flow"])
    assert 0 < changed <= sum(case.LENGTHS) - case.LENGTHS[0]


def test_batches_that_shrink(data, model):
    evaluation = evaluate(data, model, samples_per_gpu=3)
    assert evaluation.samples == len(data) and numbers(evaluation)["tokens"] == tokens_of(data)


def test_the_published_order_evaluates_every_sample_once(plain, data, model, caplog):
    evaluation = evaluate(data, model, order="published")
    assert evaluation.summary.rays["samples"] == len(data)
    with caplog.at_level(logging.WARNING):
        assert {*numbers(evaluation)["tokens"]} == {*tokens_of(data)}
    assert numbers(evaluation)["confusion"] == numbers(plain[0])["confusion"]  # the memory starts anew here, too


def test_without_scores_nothing_is_compared(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(data), "ground_truth", lambda *_: pytest.fail("read labels"))
    evaluation = evaluate(data, model, score=False, out=str(tmp_path))
    assert evaluation.summary is None and evaluation.samples == len(data)
    assert len(list(tmp_path.rglob("*.npz"))) == len(data)
    record = evaluation.record()
    assert "ray_iou" not in record and record["options"]["scene_start"] == "none"


def test_the_hit_cache_changes_nothing(plain, data, model, tmp_path):
    for _ in range(2):
        assert numbers(evaluate(data, model, cache=str(tmp_path))) == numbers(plain[0])
    assert len(list(tmp_path.rglob("*.npz"))) == len(data)


def test_wrong_options_are_refused(data):
    with pytest.raises(ValueError, match="order: expected one of"):
        Evaluator(data, EvaluatorOptions(order="random"))
    with pytest.raises(ValueError, match="scene_start: expected one of"):
        Evaluator(data, EvaluatorOptions(scene_start="prime"))
    with pytest.raises(ValueError, match="pairing: expected one of"):
        Evaluator(data, EvaluatorOptions(pairing="no"))


def test_a_prediction_that_cannot_be_written_ends_the_evaluation(data, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        evaluate(data, model, score=False, out=str(tmp_path / "file"))


def test_files_are_there_when_the_context_ends(tmp_path):
    with PredictionFiles(tmp_path, waiting=1) as files:
        for index in range(5):
            files.add("scene", f"token-{index}", torch.full((2, 3, 4), index, dtype=torch.uint8),
                      torch.zeros(2, 3, 4, 2, dtype=torch.float16))
    assert sorted(path.name for path in (tmp_path / "scene").iterdir()) == [f"token-{n}.npz" for n in range(5)]
    with np.load(tmp_path / "scene/token-3.npz") as file:
        assert file["semantics"].shape == (2, 3, 4) and (file["semantics"] == 3).all()


@pytest.mark.cuda
def test_a_gpu_scores_what_it_predicted(data, tmp_path):
    """Scores that are computed beside the next prediction are those of the files, scored on the CPU."""
    on_gpu = case.model(data).to("cuda")
    evaluation = evaluate(data, on_gpu, out=str(tmp_path), samples_per_gpu=2)
    scorer, truth, scores = SampleScorer(data.labels), GroundTruthSource(data), []
    for index, info in enumerate(data.data_infos):
        with np.load(tmp_path / f"{'/'.join(info['occ_path'].split('/')[-2:])}.npz") as file:
            arrays = torch.from_numpy(file["semantics"]), torch.from_numpy(file["flow"])
        scores.append(scorer(truth[index], *arrays))
    again = replace(evaluation, summary=summarise(scores, data.labels, tokens_of(data)))
    assert numbers(again) == numbers(evaluation)


# ---- bringing scores together ---------------------------------------------------------------------------------------


def score(index):
    return SampleScore(index, f"token-{index}", {}, {})


def test_exact_collection_sorts_and_refuses_doubles():
    ranks = [[[score(3)], [score(0)]], [[score(2), score(1)]]]
    assert [entry.index for entry in exact_collection(ranks)] == [0, 1, 2, 3]
    with pytest.raises(CoverageError, match="1 samples were evaluated twice: token-3"):
        exact_collection([*ranks, [[score(3)]]])


def test_published_collection_takes_turns_cuts_batches_and_keeps_the_first():
    ranks = [[[score(0)], [score(1)], [score(2)]], [[score(4)], [score(5)], [score(0)]]]
    assert [entry.index for entry in published_collection(ranks, 6)] == [0, 4, 1, 5, 2]
    assert [entry.index for entry in published_collection(ranks, 3)] == [0, 4, 1]
    assert [entry.index for entry in published_collection([[[score(1)], [score(0)], [score(1)]]], 1)] == [1, 0]
    assert published_collection([[[score(0)]], []], 6) == []


def test_missing_and_unknown_samples_are_named(data, model):
    scored = Evaluator(data, EvaluatorOptions(**INLINE))
    scores = list(scored.run(model).scores)
    tokens = tokens_of(data)
    with pytest.raises(CoverageError, match=f"1 of 9 samples are missing: {tokens[4]}"):
        summarise([*scores[:4], *scores[5:]], data.labels, tokens)
    with pytest.raises(CoverageError, match=f"1 samples do not belong to the split: {tokens[0]}"):
        summarise(scores, data.labels, tokens[1:])
    partial = summarise(scores[:4], data.labels, tokens, allow_missing=True)
    assert partial.missing == tuple(tokens[4:]) and partial.rays["samples"] == 4
    with pytest.raises(CoverageError, match="added twice"):
        summarise([*scores, replace(scores[0])], data.labels, tokens)


# ---- several processes ----------------------------------------------------------------------------------------------

WORKER = """
import json, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
import evaluation_case as case
from mmdet3d.core.parallel import leave_distributed
from processes import gloo_threads
from test_evaluator import Evaluator, EvaluatorOptions, numbers
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
data = case.dataset(Path(sys.argv[1]))
model = case.model(data)
results = []
for options in json.loads(sys.argv[3]):
    results.append(numbers(Evaluator(data, EvaluatorOptions(workers_per_gpu=0, **options)).run(model)))
leave_distributed()
assert gloo_threads() == 0
Path(sys.argv[2], f"rank_{{rank}}.json").write_text(json.dumps(results))
"""


def run_processes(count, world, folder, options):
    script = folder / "worker.py"
    script.write_text(WORKER.format(paths=[str(case.ROOT), *(str(HERE.parents[up]) for up in (2, 1, 0))]))
    done = run_job(count, script, world, folder, json.dumps(options), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.slow
def test_two_processes_count_what_one_counts(plain, tiny_world, data, tmp_path):
    out = tmp_path / "predictions"
    ranks = run_processes(2, tiny_world, tmp_path, [{"out": str(out)}, {"order": "published"}])
    assert ranks[0] == ranks[1]
    exact, published = ranks[0]
    assert exact == numbers(plain[0])
    assert len(list(out.rglob("*.npz"))) == len(data)
    assert {*published["tokens"]} <= {*tokens_of(data)} and len(published["tokens"]) == len({*published["tokens"]})
