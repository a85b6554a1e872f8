"""Training steps of a whole (tiny) model: losses, where gradient flows, and the corrected variant."""

import pytest
import tiny_model as tiny
import torch

from mmdet3d.models import build_model
from mmdet3d.registry import ConfigError

LOSSES = ["loss_depth", *(f"loss_voxel_{kind}_c_1_{scale}" for scale in (1, 2, 4)
                          for kind in ("ce", "sem_scal", "geo_scal", "lovasz")), "loss_flow"]


def make(**options):
    model = tiny.build(**options)
    model.train()
    return model


def train(model, steps=2, learning_rate=1e-3):
    """Names of the parameters whose gradient was not zero in some step; outputs of the steps."""
    reached, outputs = set(), []
    for step in range(steps):
        model.zero_grad()
        outputs.append(model.train_step(tiny.training_batch(step)))
        outputs[-1]["loss"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if parameter.grad.any():
                reached.add(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad.clamp(-1, 1)
    return reached, outputs


def test_losses_of_a_batch():
    losses = make()(**tiny.training_batch(), return_loss=True)
    assert list(losses) == LOSSES
    assert all(loss.numel() == 1 and loss.isfinite() and loss.requires_grad for loss in losses.values())


def test_without_a_flow_head_there_is_no_flow_loss():
    batch = tiny.training_batch()
    del batch["voxel_flows"]
    assert list(make(flow_head=None)(**batch)) == LOSSES[:-1]


def test_a_training_step_sums_the_losses():
    torch.manual_seed(3)
    output = make().train_step(tiny.training_batch(), optimizer=None)
    assert set(output) == {"loss", "log_vars", "num_samples"} and output["num_samples"] == tiny.BATCH
    assert list(output["log_vars"]) == [*LOSSES, "loss"]
    assert all(isinstance(value, float) for value in output["log_vars"].values())
    total = sum(output["log_vars"][name] for name in LOSSES)
    assert output["loss"].item() == pytest.approx(total, rel=1e-5)
    assert output["log_vars"]["loss"] == pytest.approx(total, rel=1e-5)


def test_only_entries_that_are_called_losses_count():
    total, logged = tiny.build().parse_losses({"loss_a": torch.tensor([1.0, 3.0]), "accuracy": torch.tensor(7.0),
                                               "b_loss": torch.tensor(0.5)})
    assert total == 2.5 and list(logged.items()) == [("loss_a", 2.0), ("accuracy", 7.0), ("b_loss", 0.5), ("loss", 2.5)]


def test_every_parameter_is_trained_but_the_camera_embeddings():
    model = make()
    reached, _ = train(model)
    unused = {f"backward_projection_list.{s}.transformer.cams_embeds" for s in range(2)}
    assert {name for name, _ in model.named_parameters()} - reached == unused
    assert model.memory.sequence_ids.tolist() == [3, 5] and not any(h.requires_grad for h in model.memory.histories)


def test_the_loss_falls_on_a_repeated_batch():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        model.reset_memory()
        torch.manual_seed(0)
        loss = model.train_step(tiny.training_batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_no_gradient_from_the_final_logits_into_the_stage_logits():
    prediction, _ = make().run(*tiny.frame(0))
    stages = prediction.stage_logits
    grads = torch.autograd.grad(prediction.semantic_logits.sum(), stages, allow_unused=True, retain_graph=True)
    assert grads == (None, None)
    # Nor from the finest stage's logits into the coarser stage's.
    assert torch.autograd.grad(stages[0].sum(), stages[1], allow_unused=True, retain_graph=True) == (None,)
    # But the volume is reached.
    grad, = torch.autograd.grad(prediction.semantic_logits.square().sum(), prediction.volume)
    assert grad.any()


def test_each_loss_reaches_its_stage():
    model = make()
    losses = model(**tiny.training_batch())
    encoders = (stage.transformer.encoder for stage in model.backward_projection_list)
    fine, coarse = (encoder.occ_predictor.predicter[2].weight for encoder in encoders)
    for scale, weight in ((2, fine), (4, coarse)):
        grad, = torch.autograd.grad(losses[f"loss_voxel_lovasz_c_1_{scale}"], weight, retain_graph=True)
        assert grad.any()
    assert torch.autograd.grad(losses["loss_voxel_lovasz_c_1_4"], fine, allow_unused=True) == (None,)


def test_the_memory_of_training_is_that_of_the_batch_before():
    model = make()
    model(**tiny.training_batch(0))
    first = model.memory
    model(**tiny.training_batch(1))
    assert model.memory is not first and torch.equal(model.memory.bda, tiny.frame(1)[0][5])
    with pytest.raises(ValueError, match="continues sequence 9 .*but the memory follows sequence 3"):
        model(**tiny.training_batch(2, sequences=(9, 5)))


@pytest.mark.parametrize("name, words", [
    ("voxel_semantics_1_2", r"training needs \['voxel_semantics_1_2'\]; got \[.*'points', 'voxel_semantics_1_4'\]"),
    ("voxel_flows", "training needs voxel_flows, because the model has a flow head")])
def test_missing_targets_are_named(name, words):
    batch = tiny.training_batch()
    del batch[name]
    with pytest.raises(ValueError, match=words):
        make()(**batch)


# ---- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({"backward_num_layer": [2]}, r"backward_num_layer=\[2\] must have num_stage=2 entries"),
    ({"history_frame_num": [4, 2, 2]}, r"model.history_frame_num must have one entry per stage \(2\), got \[4, 2, 2\]"),
    ({"history_frame_num": None}, r"model.history_frame_num must have one entry per stage \(2\), got None"),
    ({"train_top_k": None, "val_top_k": None}, "model.train_top_k or val_top_k must have one entry per stage"),
    ({"pretrained": "model.pth"}, "model.pretrained is not supported; set load_from in the config")])
def test_configs_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny.build(**options)


def test_both_grids_must_be_the_same():
    config = tiny.config()
    config.forward_projection.img_view_transformer.grid_config = {**tiny.GRID, "x": [-48, 48, 8.0]}
    with pytest.raises(ConfigError, match="the encoder's grid_config of stage 0 is .*but the view transformer's"):
        build_model(config)


def test_arguments_that_builders_inject_are_accepted():
    model = tiny.build(train_cfg=None, test_cfg=None, pretrained=None, init_cfg=None)
    model.init_weights()
    assert [name for name, _ in model.named_children()][:4] == [
        "forward_projection", "backward_projection_list", "temporal_fusion_list", "occupancy_head"]


# ---- the corrected variant ------------------------------------------------------------------------------------------


def switches(fixed, official, path=()):
    """(path, value) of the boolean options that the corrected config has and the official one has not."""
    for key in fixed.keys() if isinstance(fixed, dict) else range(len(fixed)):
        known = isinstance(official, list) or key in official
        if known and isinstance(fixed[key], dict | list):
            yield from switches(fixed[key], official[key], (*path, key))
        elif not known:
            yield (*path, key), fixed[key]


def fixed_switches():
    fixed, official = (tiny.published(f"stcocc-r50-16f-openocc-12e{suffix}").to_dict() for suffix in ("-fixed", ""))
    return dict(switches(fixed, official))


def test_the_corrected_config_only_turns_switches():
    changes = fixed_switches()
    assert len(changes) >= 15 and all(isinstance(value, bool) for value in changes.values())
    assert {path[-1] for path in changes} >= {
        "train_top_k_in_eval", "legacy_adjacent_extrinsics", "truncate_toward_zero", "one_channel_invalid_test",
        "always_flip_previous", "stale_previous_at_start", "invert_bda", "legacy_axis_swap", "legacy_anchor_heights",
        "trainable_recurrence", "refresh_value_queue", "scrambled_reduction", "interleaved_history_rows",
        "shared_occlusion_buffer", "squared_sigma", "distance_to_neighbours", "softmax_depth", "corner_origin"}


def test_the_corrected_model_adds_only_its_recurrence_weights():
    with torch.device("meta"):
        fixed, official = (build_model(tiny.published(f"stcocc-r50-16f-openocc-12e{suffix}")).state_dict()
                           for suffix in ("-fixed", ""))
    added = {key: tuple(fixed.pop(key).shape) for key in set(fixed) - set(official)}
    assert added == {f"backward_projection_list.{s}.transformer.encoder.recurrence_weights": (2 if s < 2 else 1,)
                     for s in range(3)}
    assert list(fixed) == list(official)
    assert {k: v.shape for k, v in fixed.items()} == {k: v.shape for k, v in official.items()}


def test_the_corrected_model_trains():
    config = tiny.config()
    for (*path, key), value in fixed_switches().items():
        part = config
        for step in path:
            part = part[step]
        part[key] = value
    torch.manual_seed(0)
    model = build_model(config)
    model.train()
    reached, outputs = train(model)
    weights = {name for name, _ in model.named_parameters() if name.endswith("recurrence_weights")}
    assert len(weights) == 2 and weights <= reached
    assert {name for name, _ in model.named_parameters()} - reached == {
        f"backward_projection_list.{s}.transformer.cams_embeds" for s in range(2)}
    assert list(outputs[1]["log_vars"]) == [*LOSSES, "loss"]
