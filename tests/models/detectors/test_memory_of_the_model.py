"""The memory that a detector keeps: when it is taken, which one fits, where it goes and who copies it."""

import copy
import dataclasses
import pickle

import pytest
import tiny_model as tiny
import torch

X, Y, Z = tiny.X, tiny.Y, tiny.Z


@pytest.fixture(scope="module")
def shared_model():
    return tiny.build()


@pytest.fixture
def model(shared_model):
    """With the memory of one frame."""
    shared_model.reset_memory()
    step(shared_model)
    return shared_model


def step(model, number=0, memory=None):
    """Continues from ``memory`` instead of the model's, if there is one."""
    inputs, metas = tiny.frame(number)
    model.memory = memory or model.memory
    with torch.no_grad():
        return model.simple_test(None, metas, img_inputs=inputs)


def with_histories(memory, *histories):
    return dataclasses.replace(memory, histories=histories)


@pytest.mark.parametrize("change, words", [
    (lambda m: dataclasses.replace(m, histories=m.histories[:1], sizes=m.sizes[:1]),
     "memory holds stages 1, this model needs 2"),
    (lambda m: dataclasses.replace(m, sizes=((Z, X, Y), m.sizes[1])),
     rf"holds grid sizes \(Z, Y, X\) \[\({Z}, {X}, {Y}\), .*\], this model needs \[\({Z}, {Y}, {X}\), "),
    (lambda m: dataclasses.replace(m, channels=8), "holds channels 8, this model needs 16"),
    (lambda m: with_histories(m, m.histories[0][..., :48], m.histories[1]),
     rf"T \* C\] \[\(2, {X * Y * Z}, 48\), .*\], this model needs \[\(2, {X * Y * Z}, 64\), "),
    (lambda m: with_histories(m, m.histories[0], m.histories[1][:, 1:]), r"this model needs .*\(2, 48, 32\)\]"),
    (lambda m: dataclasses.replace(m, bda=m.bda[:, :3, :3]),
     r"augmentations \(2, 3, 3\), this model needs \(2, 4, 4\)"),
    (lambda m: m.to("meta"), r"holds tensors on device \['meta'\], this model needs \['cpu'\]")])
def test_a_memory_that_does_not_fit_is_refused(model, change, words):
    memory = change(model.memory)
    with pytest.raises(ValueError, match=words):
        step(model, 1, memory)


def test_a_model_without_temporal_fusion_refuses_any_memory(model):
    with pytest.raises(ValueError, match="memory holds stages 2, this model needs 0"):
        step(tiny.build(temporal_fusion=None), 1, model.memory)


def test_the_memory_follows_the_model():
    model = tiny.build()
    step(model)
    shapes = [history.shape for history in model.memory.histories]
    assert model.to("meta") is model
    memory = model.memory
    assert {str(history.device) for history in memory.histories} == {"meta"}
    assert [history.shape for history in memory.histories] == shapes
    assert {str(t.device) for t in (memory.bda, memory.sequence_ids, memory.ego_translation)} == {"cpu"}


@pytest.mark.cuda
def test_the_memory_follows_the_model_to_the_device_and_back():
    model = tiny.build()
    step(model)
    before = model.memory
    model.cuda()
    assert {history.device.type for history in model.memory.histories} == {"cuda"}
    model.cpu()
    assert all(torch.equal(a, b) for a, b in zip(before.histories, model.memory.histories, strict=True))


def test_a_change_of_precision_leaves_the_memory_alone():
    model = tiny.build()
    step(model)
    before = model.memory.clone()
    model.double()
    assert next(model.parameters()).dtype == torch.float64
    for name in ("bda", "ego_translation"):
        assert torch.equal(getattr(model.memory, name), getattr(before, name))
    assert all(torch.equal(a, b) and a.dtype == torch.float32
               for a, b in zip(model.memory.histories, before.histories, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_begin_without_a_past(model, duplicate):
    memory = model.memory
    other = duplicate(model)
    assert other.memory is None and model.memory is memory
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    first, second = (step(m, 1, memory)[0]["occ_results"] for m in (model, other))
    assert (first == second).all()


def test_a_training_step_that_fails_leaves_the_memory_alone():
    model = tiny.build().train()
    model(**tiny.training_batch(0))
    memory = model.memory
    batch = tiny.training_batch(1)
    batch["voxel_semantics"] = batch["voxel_semantics"][:, :-1]
    with pytest.raises(ValueError):
        model(**batch)
    assert model.memory is memory
    model(**tiny.training_batch(1))  # the same batch again, mended
    assert model.memory is not memory
