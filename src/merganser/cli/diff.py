"""`merganser diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ..wording import count_text, number_text, plural, some
from . import _options as options
from .printing.progress import byte_progress
from .printing.text import head, say, say_json, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..inspection.difference import Difference, TensorDistance

_MOST_CHANGED = 10


def diff(
    a: options.Checkpoint,
    b: options.Checkpoint,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
    tensors: options.AllTensors = False,
    json: options.Json = False,
) -> None:
    """Compare two checkpoints, tensor by tensor, by layer and role."""
    options.quieten_hub()
    from ..inspection.difference import diff as compare
    from ..inspection.findings import difference_findings

    with byte_progress("diff") as progress:
        found = compare(a, b, cache_dir=cache_dir, stream=stream, progress=progress)
    if json:
        findings = [asdict(finding) for finding in difference_findings(found)]
        say_json({"identical": found.identical, **asdict(found), "findings": findings})
        return
    _print(found, every=tensors)
    for finding in difference_findings(found):
        say(finding.text)


def _print(found: Difference, *, every: bool) -> None:
    size = f"{plural(len(found.tensors), 'tensor')}, {count_text(sum(t.parameters for t in found.tensors))} parameters"
    if found.identical:
        head(f"identical: {size}, equal byte for byte")
        return
    equal = sum(tensor.distance.identical for tensor in found.tensors)
    retyped = [tensor for tensor in found.tensors if _only_retyped(tensor)]
    dtypes = ", ".join(dict.fromkeys(" and ".join(tensor.dtypes) for tensor in retyped))
    other = f"{len(retyped):,} hold equal values in another dtype ({dtypes}), " if retyped else ""
    differ = len(found.tensors) - equal - len(retyped)
    head(f"{size} compared: {differ:,} differ, {other}{equal:,} are equal byte for byte")
    total = found.total
    say(f"  relative change |A - B| / |A|  {number_text(total.relative_change)}")
    say(f"  cosine of A and B              {_cosine(total.cosine)}")
    say(f"  largest |A - B| of an element  {number_text(total.largest)}")
    _by_layer_and_role(found)
    changed = [tensor for tensor in found.tensors if not (tensor.distance.identical or _only_retyped(tensor))]
    if every:
        say("tensors")
        _tensors(found.tensors)
    elif changed:
        # tensors without a relative change (NaN, or from zero) come first: they need attention
        changed.sort(key=lambda t: -1 if t.distance.relative_change is None else 1 / (1 + t.distance.relative_change))
        say("most changed")
        _tensors(changed[:_MOST_CHANGED])
    for title, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            say(f"only in {title}: {some(names)}")
    for tensor in found.misshapen:
        say(f"other shape: {tensor.name} is {list(tensor.shape_a)} in A, {list(tensor.shape_b)} in B")


def _only_retyped(tensor: TensorDistance) -> bool:
    """Return whether two tensors of different dtypes hold the same numbers."""
    return len(set(tensor.dtypes)) > 1 and tensor.distance.largest == 0


def _by_layer_and_role(found: Difference) -> None:
    """Print the relative change of every layer and role; `=` marks equal ones."""
    roles = sorted({group.role for group in found.groups if group.layer is not None})
    cells = {
        (group.layer, group.role): "=" if group.distance.identical else number_text(group.distance.relative_change)
        for group in found.groups
    }
    layers = sorted({layer for layer, _ in cells if layer is not None})
    if layers:
        say("relative change by layer and role")
        rows = [
            ["layer", *roles],
            *([str(layer), *(cells.get((layer, role), "") for role in roles)] for layer in layers),
        ]
        for line in table(rows, right=range(len(roles) + 1)):
            say(line)
    outside = [[role, change] for (layer, role), change in cells.items() if layer is None]
    if outside:
        say("relative change outside the layers")
        for line in table(outside):
            say(line)


def _tensors(tensors: Sequence[TensorDistance]) -> None:
    rows = [["tensor", "change", "cosine", "largest", "dtype"]]
    for tensor in tensors:
        distance = tensor.distance
        if distance.identical:
            numbers = ["=", "=", "="]
        else:
            numbers = [
                number_text(distance.relative_change),
                _cosine(distance.cosine),
                number_text(distance.largest),
            ]
        dtypes = dict.fromkeys(tensor.dtypes)
        rows.append([tensor.name, *numbers, " and ".join(dtypes)])
    for line in table(rows, right=(1, 2, 3)):
        say(line)


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
