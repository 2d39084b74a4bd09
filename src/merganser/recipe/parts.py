"""Read the parts of a recipe that hold others: models, slices, their sources and parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import cast

from ..errors import RecipeError
from .document.place import Entry, Node
from .document.scalar import MAX_INTEGER, shown
from .fields.data import Data, make_data, names_source, read_data_fields
from .fields.reference import ModelReference
from .fields.setting import Setting
from .keys import MODEL_KEYS, SLICE_KEYS, SOURCE_KEYS
from .model import Slice, Source

__all__ = ["PartReader"]


class PartReader:
    """Reads the parts, and collects warnings.

    Args:
        warnings: Takes the warnings.
        stages: Names of results that recipes may use as models.
        data: What the recipe says of the data of all models.
    """

    def __init__(self, warnings: list[str], stages: Collection[str], data: Entry | None) -> None:
        self.warnings = warnings
        self.stages = stages
        self.data = data
        self.common = None if data is None else read_data_fields(data)

    def model(self, entry: Entry) -> Source:
        """Read an entry of `models`."""
        fields = entry.mapping(MODEL_KEYS, required=["model"])
        name = fields["name"].text(longest=100) if "name" in fields else None
        statistics, data = self.from_data(fields)
        of_base = fields["base_statistics"].text() if "base_statistics" in fields else None
        return Source(
            model=self.own(fields),
            layer_range=None,
            parameters=self.parameters(fields),
            place=entry.place,
            name=name,
            statistics=statistics,
            data=data,
            base_statistics=of_base,
        )

    def slice(self, entry: Entry) -> Slice:
        """Read an entry of `slices`."""
        fields = entry.mapping(SLICE_KEYS, required=["sources"])
        sources = tuple(self.source(item) for item in fields["sources"].items())
        lengths = {source.layer_range[1] - source.layer_range[0] for source in sources if source.layer_range}
        if len(lengths) > 1:
            ranges = ", ".join(str(list(source.layer_range)) for source in sources if source.layer_range)
            raise fields["sources"].error(f"all sources of a slice must have as many layers, got {ranges}")
        if "residual_weight" in fields:
            self.warnings.append(f"{fields['residual_weight'].place}: residual_weight has no effect, as in mergekit")
        base = self.reference(fields["base_model"]) if "base_model" in fields else None
        return Slice(sources, self.parameters(fields), base, entry.place)

    def source(self, entry: Entry) -> Source:
        """Read an entry of the `sources` of a slice."""
        fields = entry.mapping(SOURCE_KEYS, required=["model", "layer_range"])
        own, layers, parameters = self.own(fields), _layer_range(fields["layer_range"]), self.parameters(fields)
        statistics, data = self.from_data(fields)
        return Source(
            model=own,
            layer_range=layers,
            parameters=parameters,
            place=entry.place,
            name=None,
            statistics=statistics,
            data=data,
        )

    def own(self, fields: dict[str, Entry]) -> ModelReference:
        """Read the model of an entry, with its adapter."""
        reference = self.reference(fields["model"])
        return reference.with_adapter(fields["adapter"], self.stages) if "adapter" in fields else reference

    def from_data(self, fields: dict[str, Entry]) -> tuple[str | None, Data | None]:
        """Return the folder of a model's statistics, or the data to make them from."""
        if "statistics" in fields:
            if "data" in fields:
                raise fields["data"].error("give 'statistics' that are there, or 'data' to make them from, not both")
            return fields["statistics"].text(), None
        entry = fields.get("data", self.data)
        if entry is None:
            return None, None
        own = read_data_fields(fields["data"]) if "data" in fields else None
        if own is None and not names_source(self.common or {}):
            # settings for all models name no text: of this model the method may need none (the merge that aim changes)
            return None, None
        return None, make_data(entry, self.common, own)

    def reference(self, entry: Entry) -> ModelReference:
        """Read a reference to a model."""
        reference = ModelReference.parse(entry, self.stages)
        if reference.override_architecture:
            self.warnings.append(f"{entry.place}: override_architecture has no effect: tensors are matched by name")
        return replace(reference, override_architecture=None)

    def parameters(self, fields: dict[str, Entry]) -> dict[str, Setting]:
        """Read the `parameters` of an entry."""
        if "parameters" not in fields:
            return {}
        entry = fields["parameters"]
        settings = {name: Setting.parse(value) for name, value in entry.mapping().items()}
        for name, node in cast("dict[str, Node]", entry.value).items():
            if name not in settings:
                raise RecipeError(
                    f"{replace(entry.place, line=node.line)}: {shown(name)} has no value; write one, or leave it out"
                )
        return settings


def _layer_range(entry: Entry) -> tuple[int, int]:
    ends = entry.items() if isinstance(entry.value, list) and entry.value else []
    try:
        first, end = (item.whole_number(lowest=-MAX_INTEGER) for item in ends)
    except ValueError:
        raise entry.error("expected [first layer, layer after the last], two whole numbers") from None
    if first < 0 or end < 0:
        raise entry.error(f"layers count from 0, got [{first}, {end}]")
    if first == end:
        raise entry.error(f"[{first}, {end}] holds no layer: the end is not included")
    if first > end:
        raise entry.error(f"[{first}, {end}] runs backwards. Did you mean [{end}, {first}]?")
    return first, end
