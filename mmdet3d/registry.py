"""Registries and the config builder.

One registry, :data:`MODELS`, holds every part of a model; :data:`DETECTORS`, :data:`HEADS`, :data:`ATTENTION` and the
other names that config files and users of the mmdet family know are the same object. :data:`DATASETS` and
:data:`PIPELINES` hold the data sets and the steps that make a sample. A ``type`` that is not ours is looked up in
mmdet's and mmcv's registries, so that ``ResNet`` and the like work as usual.

Unlike mmcv's ``build_from_cfg`` the builder never changes the config, and refuses unknown keys with a message that
names the place in the config, the key and the accepted keys.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

from mmcv.cnn import MODELS as MMCV_MODELS
from mmcv.utils import Registry

from mmdet3d.interfaces import accepts, has_member, members

_config_path: contextvars.ContextVar[str] = contextvars.ContextVar("config_path", default="")


class ConfigError(ValueError):
    """A config asks for something that does not exist or does not fit; the message says where."""


@contextlib.contextmanager
def config_place(name: str) -> Iterator[str]:
    """Within this context config errors are reported below ``name``."""
    outer = _config_path.get()
    path = f"{outer}.{name}" if outer and name else outer or name
    token = _config_path.set(path)
    try:
        yield path
    finally:
        _config_path.reset(token)


def _fallbacks(registry: Registry) -> list[Registry]:
    """Registries of mmdet and mmcv, asked in this order for types that are not registered in ``registry``."""
    if registry is DATASETS or registry is PIPELINES:
        from mmdet import datasets

        return [datasets.DATASETS if registry is DATASETS else datasets.PIPELINES]
    from mmcv.cnn.bricks import registry as bricks
    from mmdet.models.builder import MODELS as MMDET_MODELS
    from mmdet.models.utils.builder import TRANSFORMER

    return [MMDET_MODELS, TRANSFORMER, bricks.ATTENTION, bricks.TRANSFORMER_LAYER,
            bricks.TRANSFORMER_LAYER_SEQUENCE, bricks.POSITIONAL_ENCODING, MMCV_MODELS]


def _find_class(kind: Any, registry: Registry, path: str) -> type:
    if inspect.isclass(kind):
        return kind
    if not isinstance(kind, str):
        raise ConfigError(f"{path}.type: expected a registered name, got {kind!r}")
    if (found := registry.module_dict.get(kind)) is not None:
        return found
    for other in _fallbacks(registry):
        if (found := other.module_dict.get(kind)) is not None:
            return found
    near = difflib.get_close_matches(kind, registry.module_dict, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {sorted(registry.module_dict)}"
    raise ConfigError(f"{path}.type: {kind!r} is not registered in {registry.name!r}, mmdet or mmcv; {hint}")


def accepted_keys(cls: type) -> tuple[list[str], bool]:
    """Config keys that ``cls`` takes, and whether it takes any others too.

    A constructor with ``**kwargs`` is read as handing them to the constructor of its parent class. A class without a
    constructor takes nothing.
    """
    kinds = inspect.Parameter
    names: list[str] = []
    constructors = [base for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    if not constructors:
        return [], False
    for base in constructors:
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        names += [n for n, p in parameters.items()
                  if n not in ("self", *names) and p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        if not any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
            return names, False
    return names, True


def _near_matches(unknown: Collection[str], accepted: Collection[str]) -> str:
    """Text that names the accepted key next to each unknown one, where one is near."""
    return "".join(f" (did you mean {near[0]!r}?)" for key in unknown
                   if (near := difflib.get_close_matches(str(key), accepted, n=1)))


def check_keys(mapping: Mapping, accepted: Collection[str], place: str) -> None:
    """Refuse unknown keys in a plain dict, one without a ``type``, of the config that is being built.

    Args:
        mapping: The dict.
        accepted: Keys that it may have.
        place: Its key in the part of the config that is being built.

    Raises:
        ConfigError: ``mapping`` is no mapping or has another key; the message names the place, the key, the accepted
            keys, and the one that was probably meant.
    """
    with config_place(place) as path:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{path}: expected a dict, got {type(mapping).__name__}: {mapping!r}")
        if unknown := sorted(mapping.keys() - set(accepted), key=str):
            raise ConfigError(f"{path}: unknown {unknown}{_near_matches(unknown, accepted)}; accepted are "
                              f"{sorted(accepted)}")


def check_contract(part: Any, contract: type, *partial: type) -> None:
    """Refuse a part of the config that is being built which lacks what it will be asked for.

    Args:
        part: The part.
        contract: Protocol of :mod:`mmdet3d.interfaces` that it must fulfil.
        *partial: Further ones, which it must fulfil if it has any of their members.

    Raises:
        ConfigError: a member is missing, or cannot be called as the contract does; the message names the place in the
            config, the class, the member and what it is for.
    """
    path, kind = _config_path.get() or "config", type(part).__name__
    for one in (contract, *partial):
        wanted = members(one)
        if one is not contract and not any(has_member(part, name) for name, _, _ in wanted):
            continue
        for name, purpose, call in wanted:
            if not has_member(part, name):
                raise ConfigError(f"{path}: {kind} has no {name}{'()' if call else ''}: {purpose} ({one.__name__} of "
                                  "mmdet3d.interfaces)")
            if call and not accepts(getattr(part, name), call):
                raise ConfigError(f"{path}: {kind}.{name} takes {_names(inspect.signature(getattr(part, name)))}, but "
                                  f"is called with {_names(call)}: {purpose} ({one.__name__} of mmdet3d.interfaces)")


def _names(signature: inspect.Signature) -> str:
    """Parameters without types and defaults."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return f"({', '.join(stars.get(p.kind, '') + p.name for p in signature.parameters.values())})"


def build_from_config(cfg: Mapping, registry: Registry, default_args: Mapping | None = None) -> Any:
    """Build the object that ``cfg`` describes; ``cfg`` stays as it is.

    Args:
        cfg: Mapping with ``type`` (a registered name or a class) and the keyword arguments of its constructor.
        registry: Registry that is searched first.
        default_args: Arguments used where ``cfg`` does not set them.

    Returns:
        The constructed object.

    Raises:
        ConfigError: ``cfg`` is no mapping, has no ``type``, names an unknown type, or passes keys that the type does
            not take. Keys listed in the type's class attribute ``ignored_config_keys`` (published configs set them,
            nothing reads them) are accepted and dropped. A ``TypeError``, ``ValueError``, ``LookupError``,
            ``AssertionError`` or ``RuntimeError`` of the constructor is reported with the place in the config.
    """
    path = _config_path.get() or "config"
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{path}: expected a dict with a 'type', got {type(cfg).__name__}: {cfg!r}")
    if "type" not in cfg:
        raise ConfigError(f"{path}: the key 'type' is missing; found {sorted(cfg)}")
    cls = _find_class(cfg["type"], registry, path)
    ignored = getattr(cls, "ignored_config_keys", frozenset())
    args = {**(default_args or {}), **{k: v for k, v in cfg.items() if k != "type"}}
    args = {k: copy.deepcopy(v) for k, v in args.items() if k not in ignored}
    names, takes_any = accepted_keys(cls)
    if not takes_any and (unknown := sorted(args.keys() - set(names))):
        raise ConfigError(f"{path}: {cls.__name__} takes no {unknown}{_near_matches(unknown, names)}; it takes {names}")
    try:
        return cls(**args)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {cls.__name__}: {error}") from error
    except (LookupError, AssertionError, RuntimeError) as error:  # whose text alone says little
        raise ConfigError(f"{path}: {cls.__name__}: {type(error).__name__} {error}") from error


def build(cfg: Mapping, place: str = "", contract: type | None = None, *partial: type) -> Any:
    """Build a model part found under the key ``place`` of the config that is being built.

    Args:
        cfg: Its config.
        place: The key.
        contract: What the part must offer, see :func:`check_contract`.
        *partial: Likewise.
    """
    with config_place(place):
        part = build_from_config(cfg, MODELS)
        if contract is not None:
            check_contract(part, contract, *partial)
        return part


def import_modules(package: ModuleType) -> None:
    """Import every module in the folder of a package, which registers what they define."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not module.ispkg:
            importlib.import_module(module.name)


def _registry_build(cfg: Mapping, registry: Registry, default_args: Mapping | None = None) -> Any:
    return build_from_config(cfg, registry, default_args)


#: Every model part of this project, by the name used for ``type`` in config files.
MODELS = Registry("models", build_func=_registry_build, parent=MMCV_MODELS, scope="mmdet3d")
DETECTORS = BACKBONES = NECKS = HEADS = LOSSES = MODELS
TRANSFORMER = TRANSFORMER_LAYER = TRANSFORMER_LAYER_SEQUENCE = ATTENTION = POSITIONAL_ENCODING = MODELS

#: Data sets, by the name used for ``type`` in config files.
DATASETS = Registry("datasets", build_func=_registry_build, scope="mmdet3d")
#: Steps of the pipelines that make samples.
PIPELINES = Registry("pipelines", build_func=_registry_build, scope="mmdet3d")
