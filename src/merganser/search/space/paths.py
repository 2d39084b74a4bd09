"""Paths through the layers of models, as a search space: which blocks of layers follow each other, and how strongly each acts.

The blocks of all models, in order, are offered several times over. Each offer, a slot, is used or skipped, and what is used makes a
deeper, shallower or mixed model. A slot may have a scale, which is a value only where the slot is used.

Source: the search in the data flow space of Akiba et al., Evolutionary optimization of model merging recipes, Nature Machine Intelligence 2025,
arXiv 2403.13187. There the input of a layer is scaled, by a factor for each pair of layers that follow each other, which no
architecture has weights for; here what a block adds is scaled (its output projections), which is an ordinary model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...errors import RecipeError
from ...recipe.document.place import Entry, Node, Place
from ...recipe.free import FreeValue, read_free
from .dimension import Dimension

KEY = "path"

_KEYS = ("models", "layers", "block", "repeat", "scale")
_SCALES = (0.5, 1.5)
"""The range of `scale: {search: auto}`."""
_OUTPUTS = ("o_proj", "down_proj")
"""What adds to the residual stream, in all common architectures."""
_MOST = 1000
_SKIP, _USE = "skip", "use"

Point: TypeAlias = "Mapping[str, float | int]"


@dataclass(frozen=True)
class Slot:
    """An offer of a block of layers.

    Args:
        model: The model.
        first: Its first layer.
        end: The layer behind its last one.
        use: Whether it is used; None if it always is.
        scale: The scale of what it adds; None for 1.
    """

    model: str
    first: int
    end: int
    use: Dimension | None
    scale: Dimension | None

    def is_used(self, point: Point) -> bool:
        """Return whether the slot is used at a point."""
        return self.use is None or self.use.value(point) == _USE

    def factor(self, point: Point) -> float:
        """Return its scale at a point."""
        return 1.0 if self.scale is None else float(self.scale.value(point))


class LayerPath:
    """The slots of a document, from its key `path`.

    Args:
        root: The document.
        file: Name of the file, for messages.
        prefix: Beginning of the names of dimensions.

    Raises:
        RecipeError: It is malformed.
    """

    def __init__(self, root: Mapping[str, Node], file: str, prefix: str) -> None:
        entry = Entry(root[KEY], Place(file, root[KEY].line, KEY))
        fields = entry.mapping(_KEYS, ("models", "layers"))
        for key in ("slices", "models"):
            if key in root:
                raise entry.error(f"takes the place of {key!r}; give one of them")
        method = root.get("merge_method")
        if method is not None and method.value != "passthrough":
            raise entry.error("is for merge_method: passthrough, which copies layers")
        self.models = [item.text() for item in fields["models"].items()]
        if len(set(self.models)) < len(self.models):
            raise fields["models"].error("a model is listed twice; 'repeat' offers its layers again")
        layers = fields["layers"].whole_number(1)
        block = fields["block"].whole_number(1) if "block" in fields else 1
        repeat = fields["repeat"].whole_number(1) if "repeat" in fields else 1
        if block > layers:
            raise fields["block"].error(f"a block of {block} layers, and the models have {layers}")
        if len(self.models) * repeat * -(-layers // block) > _MOST:
            raise entry.error(f"more than {_MOST} slots; make blocks larger")
        scale = read_free((KEY, "scale"), fields["scale"]) if "scale" in fields else None
        self.slots = list(_slots(self.models, layers, block, repeat, scale, prefix))
        if len(self.slots) < 2:
            raise entry.error("offers one block of one model, which leaves nothing open")

    @property
    def dimensions(self) -> list[Dimension]:
        """The dimensions, each scale behind the slot that it is of."""
        return [d for slot in self.slots for d in (slot.use, slot.scale) if d is not None]

    def slices(self, point: Point) -> list[dict[str, Any]]:
        """Return the slices of a recipe at a point; what goes on where the slice before it ends is part of that."""
        found: list[tuple[str, int, int, float]] = []
        for slot in self.slots:
            if not slot.is_used(point):
                continue
            factor = slot.factor(point)
            if found and found[-1][0] == slot.model and found[-1][2] == slot.first and found[-1][3] == factor == 1.0:
                found[-1] = (slot.model, found[-1][1], slot.end, 1.0)
            else:
                found.append((slot.model, slot.first, slot.end, factor))
        return [{"sources": [_source(*each)]} for each in found]


def _slots(models: list[str], layers: int, block: int, repeat: int, scale: FreeValue | None, prefix: str) -> Any:
    number = 0
    for turn in range(repeat):
        for model in models:
            short = model.rstrip("/").rpartition("/")[2]
            for first in range(0, layers, block):
                end = min(first + block, layers)
                name = f"{prefix}{KEY}[{number}] {short} {first}-{end}"
                # a search begins with the first model as it is
                own = turn == 0 and model == models[0]
                choices = (_USE, _SKIP) if own else (_SKIP, _USE)
                # what comes first is the first block of the first model, as it is: it sees the embeddings
                use = None if number == 0 else Dimension(name, 0, 1, choices=choices)
                when = None if use is None else (name, choices.index(_USE))
                factor = None if scale is None or use is None else _scale(scale, f"{name} scale", when)
                yield Slot(model, first, end, use, factor)
                number += 1


def _scale(free: FreeValue, name: str, when: tuple[str, int] | None) -> Dimension:
    if free.choices is not None:
        for choice in free.choices:
            if isinstance(choice, bool) or not isinstance(choice, int | float):
                raise RecipeError(f"{free.place}: a scale is a number, got {choice!r}")
        # begins at 1, if that is one of them
        ordered = tuple(sorted(free.choices, key=lambda choice: choice != 1))
        return Dimension(name, 0, len(ordered) - 1, choices=ordered, when=when)
    low, high = free.bounds or _SCALES
    middle = 1.0 if low <= 1.0 <= high else None
    return Dimension(name, float(low), float(high), free.log, free.step, middle=middle, when=when)


def _source(model: str, first: int, end: int, factor: float) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [first, end]}
    if factor != 1.0:
        scales: list[dict[str, Any]] = [{"filter": name, "value": factor} for name in _OUTPUTS]
        source["parameters"] = {"scale": [*scales, {"value": 1.0}]}
    return source
