"""Building from configs: what is accepted, what is refused and with which words, and that configs stay as they are."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from mmcv import Config
from mmcv.utils import Registry
from torch import nn

from mmdet3d.models import build_model
from mmdet3d.models.backbones import ResNet
from mmdet3d.models.detectors.stage_configs import stage_configs
from mmdet3d.registry import (
    DETECTORS,
    HEADS,
    MODELS,
    ConfigError,
    accepted_keys,
    build,
    build_from_config,
    check_keys,
    config_place,
)

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "config/stcocc").glob("*.py"))
PUBLISHED = next(path for path in CONFIGS if path.stem == "stcocc-r50-16f-openocc-12e")
TINY = next(path for path in CONFIGS if path.stem == "stcocc-tiny-synthetic")
TOYS = Registry("toys")


class Parent:
    def __init__(self, size, colour="red", *, shape=None):
        self.size, self.colour, self.shape = size, colour, shape


@TOYS.register_module()
class Toy(Parent):
    ignored_config_keys = frozenset({"price"})

    def __init__(self, *args, wheels=4, **kwargs):
        super().__init__(*args, **kwargs)
        if wheels < 0:
            raise ValueError(f"wheels must not be negative, got {wheels}")
        self.wheels = wheels


@TOYS.register_module()
class Box:
    def __init__(self, content, **anything):
        self.content, self.anything = content, anything


def load(path):
    return Config.fromfile(str(path)).model


def plain(config):
    """A copy made of plain dicts, lists and tuples."""
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return type(config)(map(plain, config)) if isinstance(config, list | tuple) else config


def typed_dicts(config, path=()):
    """Paths of all dicts with a ``type``."""
    items = enumerate(config) if isinstance(config, list | tuple) else config.items()
    if isinstance(config, dict) and "type" in config:
        yield path
    for key, value in items:
        if isinstance(value, dict | list | tuple):
            yield from typed_dicts(value, (*path, key))


def at(config, path):
    for key in path:
        config = config[key]
    return config


def error_of(config):
    """Message of the ConfigError that building the model gives; on the meta device, where no weight is drawn."""
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_model(config)
    return str(caught.value)


# ---- one object -----------------------------------------------------------------------------------------------------


def test_arguments_defaults_and_classes_as_type():
    toy = build_from_config({"type": "Toy", "size": 3, "wheels": 2}, TOYS, {"colour": "blue", "wheels": 8})
    assert (toy.size, toy.wheels, toy.colour, toy.shape) == (3, 2, "blue", None)
    assert isinstance(TOYS.build({"type": Toy, "size": 1}), Toy)
    assert TOYS.build({"type": "Toy", "size": 1}, ).wheels == 4


def test_kwargs_hand_the_parents_keys_on():
    assert accepted_keys(Toy) == (["wheels", "size", "colour", "shape"], False)
    assert accepted_keys(Box) == (["content"], True)
    assert build_from_config({"type": "Toy", "size": 1, "shape": "round"}, TOYS).shape == "round"
    words = r"Toy takes no \['siz'\] \(did you mean 'size'\?\); it takes \['wheels', 'size', 'colour', 'shape'\]"
    with pytest.raises(ConfigError, match=words):
        build_from_config({"type": "Toy", "siz": 1}, TOYS)
    assert "zero_init_residual" in accepted_keys(ResNet)[0] and not accepted_keys(ResNet)[1]


def test_a_constructor_that_takes_anything_gets_anything():
    assert build_from_config({"type": "Box", "content": 1, "lid": 2}, TOYS).anything == {"lid": 2}


def test_ignored_keys_are_dropped():
    toy = build_from_config({"type": "Toy", "size": 1, "price": 9}, TOYS)
    assert toy.size == 1
    with pytest.raises(ConfigError, match="prize"):
        build_from_config({"type": "Toy", "size": 1, "prize": 9}, TOYS)


@pytest.mark.parametrize("config, words", [
    ({"type": "Toi", "size": 1}, ["house.room.type: 'Toi'", "'toys'", "did you mean 'Toy'?"]),
    ({"type": "Elephant"}, ["house.room.type: 'Elephant'", "known here: ['Box', 'Toy']"]),
    ({"type": 7}, ["house.room.type: expected a registered name, got 7"]),
    ({"type": "Toy", "size": 1, "wheel": 3}, ["house.room: Toy takes no ['wheel']", "did you mean 'wheels'?"]),
    ({"type": "Toy"}, ["house.room: Toy: ", "missing 1 required", "'size'"]),
    ({"size": 1}, ["house.room: the key 'type' is missing; found ['size']"]),
    ("Toy", ["house.room: expected a dict with a 'type', got str: 'Toy'"]),
    ([{"type": "Toy"}], ["house.room: expected a dict with a 'type', got list"]),
    ({"type": "Toy", "size": 1, "wheels": -1}, ["house.room: Toy: wheels must not be negative, got -1"]),
])
def test_refusals_say_where_and_what(config, words):
    with pytest.raises(ConfigError) as caught, config_place("house"), config_place("room"):
        build_from_config(config, TOYS)
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_place_ends_with_its_context_even_after_an_error():
    with pytest.raises(ConfigError), config_place("house"):
        build_from_config({}, TOYS)
    with pytest.raises(ConfigError, match="^config: the key 'type'"):
        build_from_config({}, TOYS)


def test_the_object_does_not_share_mutable_values_with_the_config():
    config = {"type": "Box", "content": [1, {"deep": []}]}
    box = build_from_config(config, TOYS)
    box.content.append(2)
    box.content[1]["deep"].append(3)
    assert config == {"type": "Box", "content": [1, {"deep": []}]}


def test_one_registry_under_many_names_with_the_spellings_of_published_configs():
    assert MODELS is DETECTORS is HEADS
    for official, name in (("LSSVStereoForwardPorjection", "LSSVStereoForwardProjection"),
                           ("CustormLearnedPositionalEncoding", "CustomLearnedPositionalEncoding")):
        assert MODELS.get(official) is MODELS.get(name)


def test_types_of_mmdet_and_mmcv_are_found_after_our_own():
    from mmdet.models.losses import L1Loss

    assert isinstance(build({"type": "L1Loss", "loss_weight": 2.0}), L1Loss)
    assert isinstance(build({"type": "SinePositionalEncoding", "num_feats": 3}), nn.Module)
    assert MODELS.get("ResNet") is ResNet
    with pytest.raises(ConfigError, match=r"neck: L1Loss takes no \['los_weight'\] \(did you mean 'loss_weight'\?\)"):
        build({"type": "L1Loss", "los_weight": 2.0}, "neck")


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_building_never_changes_a_config(path):
    config = load(path)
    before = copy.deepcopy(plain(config))
    with torch.device("meta"):
        build_model(config)
    assert plain(config) == before


@pytest.mark.parametrize("child, parent", [("stcocc_r50_704x256_16f_occ3d_36e", "stcocc-r50-16f-occ3d-36e"),
                                           ("stcocc_r50_704x256_16f_openocc_12e", "stcocc-r50-16f-openocc-12e")])
def test_official_names_are_the_same_configs(child, parent):
    child, parent = (Config.fromfile(str(PUBLISHED.with_name(f"{name}.py"))) for name in (child, parent))
    assert plain(child._cfg_dict) == plain(parent._cfg_dict)


def test_an_unknown_type_names_its_place_and_a_near_match():
    config = load(PUBLISHED)
    config.occupancy_head.type = "OcHead"
    assert error_of(config).startswith("model.occupancy_head.type: 'OcHead' is not registered in 'models'")
    assert error_of(config).endswith("did you mean 'OccHead'?")


def test_a_deep_place_is_named_in_full():
    config = load(PUBLISHED)
    layer = config.backward_projection.transformer.encoder.transformerlayers
    layer.attn_cfgs[1].deformable_attention.sigmas = 2
    assert error_of(config).startswith(
        "model.backward_projection (stage 0).transformer.encoder.transformerlayers[0].attn_cfgs[1].deformable_attention"
        ": OA_MSDeformableAttention3D takes no ['sigmas'] (did you mean 'sigma'?); it takes ['embed_dims', 'num_heads'")


def test_a_value_that_does_not_fit_is_reported_with_its_place():
    config = load(PUBLISHED)
    config.forward_projection.img_view_transformer.grid_config.x = [-40, 40, 0.7]
    assert error_of(config) == ("model.forward_projection.img_view_transformer: LSSVStereoForwardProjection: "
                                "grid_config x=[-40.0, 40.0, 0.7] holds no whole number of voxels")


PARTS = list(typed_dicts(load(PUBLISHED)))


def test_all_parts_of_the_published_config_are_looked_at():
    config = load(PUBLISHED)
    names = {at(config, path)["type"] for path in PARTS}
    assert names >= {"STCOcc", "ResNet", "CustomFPN", "LSSVStereoForwardPorjection", "CustomResNet3D", "BEVFormer",
                     "OA_MSDeformableAttention3D", "OccFlowHead", "SparseFusion", "CustormLearnedPositionalEncoding"}


@pytest.mark.parametrize("path", PARTS, ids=lambda path: ".".join(map(str, path)) or "model")
def test_a_bogus_key_anywhere_in_the_published_config_is_refused(path):
    config = load(PUBLISHED)
    at(config, path)["bogus_key"] = 1
    message = error_of(config)
    assert "bogus_key" in message and message.startswith("model")
    # The place is named by the keys that lead to it (a norm_cfg is reported by the module it belongs to).
    for key in path[:-1]:
        assert str(key).strip("0123456789") in message


def test_every_misspelt_key_of_a_config_is_refused():
    whole = plain(load(TINY))
    paths = [(*path, key) for path in typed_dicts(whole) for key in at(whole, path) if key != "type"]
    assert len(paths) > 90
    accepted = []
    for *path, key in paths:
        config = copy.deepcopy(whole)
        part = at(config, path)
        part[f"{key}_"] = part.pop(key)
        try:
            if path[:1] == ["backward_projection"]:  # what the detector does with it, in this order
                build(stage_configs(config["backward_projection"], 2, [2, 2])[0], "model.backward_projection")
            else:  # a part alone is refused as it is within the model, only faster
                build(part, "model")
            accepted.append((*path, key))
        except ConfigError as error:
            assert str(error).startswith("model"), error
    assert accepted == []


def test_a_misspelt_key_of_the_2d_block_is_named():
    config = load(TINY)
    config.backward_projection.transformer.encoder.transformerlayers.conv_cfgs = dict(embed_dim=16)
    assert error_of(config).endswith(".transformerlayers[0].conv_cfgs: unknown ['embed_dim'] (did you mean "
                                     "'embed_dims'?); accepted are ['embed_dims']")


ENCODER = ("backward_projection", "transformer", "encoder")
TRANSFORM = ("forward_projection", "img_view_transformer")


@pytest.mark.parametrize("path, key, near", [
    ((*ENCODER, "data_config"), "inputsize", "input_size"),
    ((*ENCODER, "grid_config"), "dept", "depth"),
    ((*ENCODER, "transformerlayers", "conv_cfgs"), "embed_dim", "embed_dims"),
    ((*TRANSFORM, "grid_config"), "dept", "depth"),
    ((*TRANSFORM, "depthnet_cfg"), "use_dnc", "use_dcn")])
def test_unknown_keys_of_plain_dicts_name_their_place_and_a_near_match(path, key, near):
    config = load(PUBLISHED)
    at(config, path)[key] = 1
    message = error_of(config)
    assert message.startswith("model.") and f".{path[-1]}: unknown [{key!r}] (did you mean {near!r}?)" in message
    assert repr(near) in message.split("accepted are")[1]


def test_plain_dicts_that_are_none():
    words = r"^house.room: expected a dict, got list: \['door'\]$"
    with pytest.raises(ConfigError, match=words), config_place("house"):
        check_keys(["door"], ("door",), "room")
    check_keys({"door": 1}, ("door", "window"), "room")
    with pytest.raises(ConfigError, match=r"^room: unknown \[7, 'roof'\]; accepted are \['door'\]$"):
        check_keys({"roof": 1, "door": 2, 7: 3}, ("door",), "room")


@pytest.mark.parametrize("error, words", [
    (AssertionError(), "house: Grumpy: AssertionError"), (IndexError("too far"), "house: Grumpy: IndexError too far"),
    (RuntimeError("no size"), "house: Grumpy: RuntimeError no size"),
    (KeyError("lid"), "house: Grumpy: KeyError 'lid'"),
    (TypeError("no"), "house: Grumpy: no")])
def test_errors_of_a_constructor_get_their_place(error, words):
    class Grumpy:
        def __init__(self):
            raise error

    with pytest.raises(ConfigError, match=words) as caught, config_place("house"):
        build_from_config({"type": Grumpy}, TOYS)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("key", ["transformer", "positional_encoding"])
def test_a_missing_part_of_the_backward_projection_is_named(key):
    config = load(TINY)
    del config.backward_projection[key]
    assert f"model.backward_projection: the key '{key}' is missing" in error_of(config)


def test_every_ignored_key_is_unknown_to_its_constructor():
    for cls in set(MODELS.module_dict.values()):
        if cls.__module__.startswith("mmdet3d."):
            names, _ = accepted_keys(cls)
            assert not set(names) & getattr(cls, "ignored_config_keys", frozenset()), cls
            assert inspect.getdoc(cls)
