"""Check that the output holds the tensors that its class loads, when names, shapes or the config make it doubtful.

An input that lacks a tensor which the others have is refused while tensors are matched. What all inputs lack alike, or a
config with which none of them would load, shows only here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...anatomy import Anatomy, infer_anatomy
from ...anatomy.gaps import doubts
from ...errors import CheckpointError
from ...wording import some
from .alignment import is_recomputed
from .meta_model import build_model
from .renaming import Loaded, load_names

__all__ = ["check_complete"]

Shapes = Mapping[str, tuple[int, ...]]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_UNCHECKED = "; whether the output loads was not checked"


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What transformers would do with the tensors.

    Args:
        missing: Parameters that would get random values.
        wrong: Parameters whose shape differs, with both shapes.
        unread: Tensors that would be left out.
    """

    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def check_complete(
    where: str,
    config: Mapping[str, Any],
    shapes: Shapes,
    left_out: Collection[str] = (),
    *,
    always: str | None = None,
    anatomy: Anatomy | None = None,
) -> list[str]:
    """Refuse an output that transformers could not load completely.

    If nothing in names, shapes and config is doubtful, transformers is not imported, as that takes seconds.

    Args:
        where: The model that the messages name: the one whose config the output gets.
        config: config.json of the output.
        shapes: Names and shapes of its tensors.
        left_out: Names of tensors that the user asked to leave out.
        always: Why to check even if nothing else is doubtful.
        anatomy: The structure of these tensors with this config, if it is known.

    Returns:
        Warnings: doubts that cannot be settled, as transformers is missing or does not know the class, and tensors that
        it would not load.

    Raises:
        CheckpointError: Tensors are missing or have other shapes than the config describes, or no model can be built.
    """
    anatomy = anatomy or infer_anatomy(shapes, config)
    doubted = doubts(shapes, anatomy, config) or ([always] if always else [])
    if not doubted:
        return []
    model = build_model(config) if config else None
    if model is None:
        return [f"{where}: {each}{_UNCHECKED}" for each in doubted]
    because = f"{where}: {some(doubted, 2)}"
    if isinstance(model, str):
        raise CheckpointError(f"{because}; transformers cannot build the model of this config.json: {model}")
    loaded = load_names(model, shapes)
    if loaded is None:
        return [f"{where}: {each}{_UNCHECKED}" for each in doubted]
    verdict = _judge(model, loaded, shapes, left_out)
    name = type(model).__name__
    if verdict.missing:
        raise CheckpointError(
            f"{because}; {name} needs tensors that none of the models has, and would give them random values: "
            f"{some(verdict.missing)}. Fetch the models again, or correct config.json"
        )
    if verdict.wrong:
        raise CheckpointError(
            f"{because}; {name} needs tensors of other shapes: {some(verdict.wrong, 2)}. Correct config.json, or use "
            "models of this config"
        )
    if any(anatomy.parts[each].stack == anatomy.main for each in verdict.unread):
        raise CheckpointError(
            f"{because}; {name} would not load {some(verdict.unread)}. Correct config.json, or use models of this config"
        )
    return [f"{because}; {name} would not load {some(verdict.unread)}"] if verdict.unread else []


def _judge(model: Any, loaded: Loaded, shapes: Shapes, left_out: Collection[str]) -> _Verdict:
    state = model.state_dict()
    dropped = load_names(model, dict.fromkeys(left_out))
    excused = {*model.all_tied_weights_keys, *(dropped.targets.values() if dropped else ())}
    optional = _patterns(model, "_keys_to_ignore_on_load_missing")
    ignored = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    verdict = _Verdict()
    for name in sorted(state.keys() - loaded.parameters - excused):
        if not is_recomputed(name) and not any(re.search(pattern, name) for pattern in optional):
            verdict.missing.append(name)
    held: dict[str, set[int]] = {}
    for name in loaded.converted & loaded.targets.keys():
        if (match := _EXPERT.search(name)) is not None:
            held.setdefault(loaded.targets[name], set()).add(int(match[1]))
    for target, numbers in sorted(held.items()):
        if target in state and len(numbers) != len(state[target]):
            verdict.wrong.append(f"{target} holds {len(numbers)} experts, the config describes {len(state[target])}")
    for name, target in loaded.targets.items():
        if target in state:
            shape = tuple(state[target].shape)
            if name not in loaded.converted and shape != tuple(shapes[name]):
                verdict.wrong.append(f"{name} is {list(shapes[name])}, the config describes {list(shape)}")
        elif not is_recomputed(name) and not any(re.search(pattern, target) for pattern in ignored):
            verdict.unread.append(name)
    return verdict


def _patterns(model: Any, attribute: str) -> list[str]:
    return list(getattr(model, attribute, None) or ())
