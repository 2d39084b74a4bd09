"""Check that transformers builds, from the output's config, the layers that the output has.

Names and shapes of stacked layers were compared with the donor's before. They do not show which kind of layer the
config asks for at each position: a dense layer where experts are stored would be loaded with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ...anatomy import Anatomy, infer_anatomy
from ...anatomy.settings.config import COUNT_KEYS, as_int, text_scopes
from ...errors import CheckpointError
from .alignment import Member
from .meta_model import build_model

__all__ = ["check_layers_load"]

Shapes = dict[str, tuple[int, ...]]

_MOST_LAYERS = 100
"""Largest number of layers that are built if all are alike."""


def check_layers_load(config: Mapping[str, Any], donor: Member, layers: Sequence[int]) -> None:
    """Refuse a config from which transformers would build layers that differ from the donor's.

    Both models are built on the meta device, without memory; this takes one or two seconds, mostly to import
    transformers. Only slices need it: whole models keep the donor's names, shapes and config. Names are compared as in
    `state_dict()`, so the names in the file do not matter. If the donor's layers are all alike and the config differs in
    nothing but their number, a model of fewer layers is built, as building thousands takes a minute. Nothing is checked if transformers is missing, does not know
    the class, or cannot build the donor.

    Args:
        config: config.json of the output.
        donor: Model whose config the output's was made from.
        layers: For each layer of the output, the donor's layer that describes it.

    Raises:
        CheckpointError: A layer would differ, or the model cannot be built. The message names the tensors.
    """
    if list(layers) == list(range(donor.anatomy.n_layers)):
        return
    before = _built(donor.checkpoint.config)
    if not isinstance(before, dict):
        return
    old = infer_anatomy(before, donor.checkpoint.config)
    if old.main is None or old.n_layers != donor.anatomy.n_layers:
        # the stack in memory is not the stack in the file, so its layers cannot be compared
        return
    held, count = _by_layer(before, old), len(layers)
    if count > _MOST_LAYERS and all(each == held[0] for each in held) and _is_longer(donor, config, count):
        layers = layers[:_MOST_LAYERS]
        config = _with_layers(config, _MOST_LAYERS, old=count)
    after = _built(config)
    what = f"the config for the chosen layers of {donor.reference}"
    if after is None:
        return
    if isinstance(after, str):
        raise CheckpointError(f"{what}: transformers cannot build the model: {after}")
    new = infer_anatomy(after, config)
    if new.main != old.main:
        return
    if new.n_layers != len(layers):
        raise CheckpointError(f"{what}: transformers would build {new.n_layers} layers, {len(layers)} were chosen")
    built = _by_layer(after, new)
    for position, index in enumerate(layers):
        if held[index] != built[position]:
            _compare(f"{what}: layer {position}", held[index], built[position])
    _compare(what, _outside(before, old), _outside(after, new))


def _compare(what: str, written: Shapes, built: Shapes) -> None:
    for name in sorted(written.keys() | built.keys()):
        own, other = written.get(name), built.get(name)
        if own == other:
            continue
        found = "is not written" if own is None else f"is written with {list(own)}"
        wanted = "would not be loaded" if other is None else f"would be loaded as {list(other)}"
        raise CheckpointError(
            f"{what}: {name} {found} and {wanted}, so transformers would not load the result; choose layers whose "
            "kinds the config can describe"
        )


def _is_longer(donor: Member, config: Mapping[str, Any], count: int) -> bool:
    """Return whether a config of `count` layers differs from the donor's in nothing but that number."""
    return _with_layers(config, donor.anatomy.n_layers, old=count) == donor.checkpoint.config


def _with_layers(config: Mapping[str, Any], count: int, *, old: int) -> dict[str, Any]:
    """Return a copy with `count` layers under every key that gives the number of layers as `old`."""
    result = copy.deepcopy(dict(config))
    for scope in text_scopes(result):
        for key in COUNT_KEYS:
            if as_int(scope.get(key)) == old:
                scope[key] = count
    return result


def _by_layer(shapes: Shapes, anatomy: Anatomy) -> list[Shapes]:
    """Return the shapes of every layer of the main stack, by the part of the name after the layer's number."""
    grouped: list[Shapes] = [{} for _ in range(anatomy.n_layers)]
    for name, part in anatomy.parts.items():
        if part.stack == anatomy.main and part.layer is not None:
            grouped[part.layer][name[len(f"{part.stack}.{part.layer}.") :]] = shapes[name]
    return grouped


def _outside(shapes: Shapes, anatomy: Anatomy) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(f"{anatomy.main}.")}


def _built(config: Mapping[str, Any]) -> Shapes | str | None:
    """Return the shapes in the `state_dict()` of a config's model; an error message or None as `build_model` does."""
    model = build_model(config)
    if model is None or isinstance(model, str):
        return model
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
