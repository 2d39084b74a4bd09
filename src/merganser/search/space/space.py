"""The search space of a recipe: its free values as dimensions, and the plain recipe for a point."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import RecipeError
from ...method import Parameter
from ...method.registry import get_method
from ...recipe.document.parsing import Document, parse_mapping, plain
from ...recipe.document.scalar import shown
from ...recipe.free import FreeValue, check_within, free_values
from ...recipe.load import RecipeSource, read_documents
from .dimension import Dimension, Point
from .paths import KEY as PATH
from .paths import LayerPath

_ROLES = {"attention": "attn", "mlp": "mlp", "others": None}
"""The filter of each role; the names of attention weights contain `attn` in all common architectures."""


Make: TypeAlias = "Callable[[Point], Any]"


class Space:
    """The free values of a recipe.

    Args:
        source: The recipe: a path, a YAML text, a mapping, or its documents.

    Attributes:
        dimensions: The dimensions, in the order of the recipe.

    Raises:
        RecipeError: The recipe is not YAML, has no free value, or one is malformed or has no range.
    """

    def __init__(self, source: RecipeSource | Sequence[Document]) -> None:
        documents = read_documents(source) if isinstance(source, str | Path | Mapping) else source
        self._file = documents[0].file
        self._documents = [plain(document.root) for document in documents]
        self.dimensions: list[Dimension] = []
        self._set: list[tuple[int, FreeValue, tuple[str | int, ...], Make]] = []
        self._paths: dict[int, LayerPath] = {}
        for number, document in enumerate(documents):
            prefix = f"{number + 1}: " if len(documents) > 1 else ""
            root = document.root.value
            if isinstance(root, dict) and PATH in root:
                self._paths[number] = LayerPath(root, document.file, prefix)
                self.dimensions += self._paths[number].dimensions
            for free in free_values(document.root, document.file):
                if not (number in self._paths and free.path[0] == PATH):
                    self._add(number, free, prefix)
        if not self.dimensions:
            raise RecipeError(
                f"{self._file}: leaves nothing open; write a value to find as {{search: [low, high]}} or "
                "{choices: [...]}, or merge it as it is with merganser merge"
            )

    def resolve(self, point: Point) -> str:
        """Return the recipe at a point, as YAML."""
        documents = copy.deepcopy(self._documents)
        for number, free, path, make in self._set:
            if path != free.path:
                # a value of each model: it moves from what all share to the model
                _put(documents[number], path, make(point))
                _drop(documents[number], free.path)
            else:
                _put(documents[number], path, make(point))
        for number, way in self._paths.items():
            documents[number] = {**documents[number], "slices": way.slices(point)}
            del documents[number][PATH]
        return "---\n".join(parse_mapping(document, self._file).text for document in documents)

    def start(self) -> dict[str, float | int]:
        """Return the point where a search begins."""
        count = max(1, *(len(_models(document)) for document in self._documents))
        point: dict[str, float | int] = {}
        for dimension in self.dimensions:
            if dimension.is_open(point):
                point[dimension.name] = dimension.start(count)
        return point

    @property
    def models(self) -> list[str]:
        """The models that a recipe of this space may name where the one at the start does not."""
        found = [model for way in self._paths.values() for model in way.models]
        for dimension in self.dimensions:
            if dimension.choices is not None and dimension.name.endswith(".model"):
                found += [str(choice) for choice in dimension.choices]
        return found

    def describe(self, point: Point) -> dict[str, Any]:
        """Return the values at a point by name, as they stand in the recipe."""
        return {dimension.name: dimension.value(point) for dimension in self.dimensions if dimension.name in point}

    def _add(self, number: int, free: FreeValue, prefix: str) -> None:
        document = self._documents[number]
        like = self._like(document, free)
        for path, who in self._places(document, free):
            name = f"{prefix}{_written(path)}" if path == free.path else f"{prefix}{_written(free.path)}[{who}]"
            self._set.append((number, free, path, self._make(free, like, name, per_model=path != free.path)))

    def _make(self, free: FreeValue, like: Dimension, name: str, *, per_model: bool) -> Make:
        """Add the dimensions of one value, and return what builds the value at a point."""
        before = free.path[: free.path.index("parameters")] if "parameters" in free.path else ()
        weight_of_one = per_model or any(isinstance(key, int) for key in before)

        def one(name: str) -> Make:
            dimension = Dimension(
                name=name,
                low=like.low,
                high=like.high,
                log=like.log,
                step=like.step,
                integer=like.integer,
                choices=like.choices,
                parameter=free.parameter,
                per_model=weight_of_one,
            )
            self.dimensions.append(dimension)
            return dimension.value

        def along_depth(name: str) -> Make:
            if free.layers == 1:
                return one(name)
            values = [one(f"{name}[{i + 1}/{free.layers}]") for i in range(free.layers)]
            return lambda point: [value(point) for value in values]

        if not free.per_role:
            return along_depth(name)
        roles = {role: along_depth(f"{name}[{role}]") for role in _ROLES}
        return lambda point: [
            {**({"filter": word} if (word := _ROLES[role]) else {}), "value": make(point)}
            for role, make in roles.items()
        ]

    def _places(self, document: Any, free: FreeValue) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Yield the paths that get a value of their own, each with the name of its model."""
        if not free.per_model or "models" in free.path:
            yield free.path, ""
            return
        if "slices" in document or free.path[0] != "parameters":
            raise RecipeError(
                f"{free.place}: 'per: model' is for the 'parameters' at the top of a recipe of 'models'; in slices, "
                "write a free value for each source"
            )
        found = False
        for index, model in enumerate(document.get("models") or []):
            if model.get("model") == document.get("base_model"):
                continue
            if free.path[-1] in (model.get("parameters") or {}):
                continue
            found = True
            yield ("models", index, "parameters", free.path[-1]), _short(model.get("model"))
        if not found:
            raise RecipeError(f"{free.place}: 'per: model', and every model has a value of its own")

    def _like(self, document: Any, free: FreeValue) -> Dimension:
        """Return the kind of a free value's dimensions; its range, if it gives none, comes from the method."""
        parameter = _parameter(document, free)
        if parameter is not None and free.per_model and not parameter.per_model:
            raise RecipeError(
                f"{free.place}: {parameter.name} is one value for all models of {document['merge_method']}, so "
                "'per: model' has no meaning"
            )
        if free.choices is not None:
            if parameter is not None:
                for choice in _scalars(free.choices):
                    parameter.check(choice, f"{free.place}.choices")
            return Dimension("", 0, len(free.choices) - 1, choices=free.choices)
        if parameter is not None and parameter.kind in ("flag", "choice"):
            if free.bounds is not None:
                raise RecipeError(f"{free.place}.search: {parameter.name} is {parameter.allowed}, which has no range")
            choices = parameter.choices or (False, True)
            return Dimension("", 0, len(choices) - 1, choices=choices)
        if parameter is not None and parameter.range is not None:
            check_within(free, parameter.range, parameter.allowed)
        low, high = free.bounds or _own_range(parameter, free)
        # whole ends mean whole numbers for a key of the recipe; a parameter of a method not yet chosen may be any number
        whole = free.parameter is None and all(_whole(n) for n in (low, high, free.step or 1))
        integer = parameter.kind == "integer" if parameter else whole
        if integer and not all(_whole(n) for n in (low, high, free.step or 1)):
            raise RecipeError(f"{free.place}.search: {free.parameter} is a whole number, got [{low:g}, {high:g}]")
        if free.log and low <= 0:
            raise RecipeError(f"{free.place}: a logarithmic range begins above 0; give [low, high]")
        if integer:
            low, high = int(low), int(high)
        step = int(free.step) if integer and free.step else free.step
        return Dimension("", low, high, free.log, step, integer)


def _parameter(document: Any, free: FreeValue) -> Parameter | None:
    """Return the method's parameter that a free value is of; None if it is of none, or the method is free itself.

    Raises:
        RecipeError: There is no such method or parameter.
    """
    method = document.get("merge_method") if isinstance(document, dict) else None
    if free.parameter is None or not isinstance(method, str):
        return None
    return get_method(method).parameter(free.parameter, str(free.place))


def _own_range(parameter: Parameter | None, free: FreeValue) -> tuple[float, float]:
    known = parameter.range if parameter is not None else None
    if known is not None and known.search is not None:
        return known.search
    if known is not None and math.isfinite(known.low) and math.isfinite(known.high) and not known.open:
        return known.low, known.high
    what = parameter.name if parameter is not None else shown(str(free.path[-1]))
    raise RecipeError(f"{free.place}: no range to search is known for {what}; give one: {{search: [low, high]}}")


def _scalars(choices: Sequence[Any]) -> Iterator[Any]:
    for choice in choices:
        yield from (each for each in (choice if isinstance(choice, list) else [choice]) if not isinstance(each, dict))


def _whole(number: float) -> bool:
    return isinstance(number, int)


def _models(document: Any) -> list[Any]:
    """Return the models of a document, or of its first slice, that are not its base."""
    listed = document.get("models") if isinstance(document, dict) else None
    if listed is None and isinstance(document, dict) and isinstance(document.get("slices"), list):
        first = document["slices"][0] if document["slices"] else {}
        listed = first.get("sources") if isinstance(first, dict) else None
    entries = listed if isinstance(listed, list) else []
    return [m for m in entries if isinstance(m, dict) and m.get("model") != document.get("base_model")]


def _written(path: Sequence[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def _short(model: Any) -> str:
    return str(model).rstrip("/").rpartition("/")[2]


def _put(document: Any, path: Sequence[str | int], value: Any) -> None:
    where = document
    for key, after in itertools.pairwise(path):
        if isinstance(where, dict) and where.get(key) is None:
            where[key] = {} if isinstance(after, str) else []
        where = where[key]
    where[path[-1]] = value


def _drop(document: Any, path: Sequence[str | int]) -> None:
    """Remove a key, and the mapping that held it if it is empty then."""
    where = document
    for key in path[:-1]:
        if key not in where:
            return
        where = where[key]
    where.pop(path[-1], None)
    if not where and len(path) > 1:
        _drop(document, path[:-1])
