"""Print the kinship of models: how similar their task vectors are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...wording import count_text, number_text, plural
from .text import head, say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...inspection.task_vectors import Kinship, Matrix

_MATRICES = (
    ("cosine of task vectors", "cosine", ".4f"),
    ("correlation of task vectors (Pearson)", "correlation", ".4f"),
    ("distance between models (Euclidean)", "distance", ".4g"),
    ("sign conflict: share of the elements that both changed, changed in opposite directions", "sign_conflict", ".1%"),
)


def kinship_json(found: Kinship, *, every: bool) -> dict[str, Any]:
    """Return a kinship and its interpretation as one JSON document; with every tensor if `every`."""
    from ...inspection.findings import kinship_findings

    described = asdict(found)
    if not every:
        described["tensors"] = len(found.tensors)
    return {**described, "findings": [asdict(finding) for finding in kinship_findings(found)]}


def print_kinship(found: Kinship, *, every: bool) -> None:
    """Print a kinship: each model, the matrices of similarities, and their interpretation."""
    from ...inspection.findings import kinship_findings

    total = found.total
    head(
        f"{plural(len(found.models), 'model')} · base {found.base} · {plural(total.tensors, 'tensor')}, "
        f"{count_text(total.parameters)} parameters"
    )
    _models(found)
    if len(found.models) > 1:
        for title, name, form in _MATRICES:
            say(title)
            _matrix(getattr(total, name), form)
        _mean(found)
        _by_layer_and_role(found)
    if every:
        say("tensors")
        _tensors(found)
    if found.left_out:
        say("not compared")
        for line in table([[left.name, left.reason] for left in found.left_out]):
            say(line)
    findings = kinship_findings(found)
    if findings:
        say("in words")
    for finding in findings:
        say(f"  {finding.text}")


def _models(found: Kinship) -> None:
    from ...inspection.task_vectors import FAR

    total = found.total
    rows = [["model", "change", "rounding", "cosine", "changed", f"beyond {FAR}", "largest", ""]]
    for i, name in enumerate(found.models):
        numbers = [
            number_text(total.change[i]),
            _form(total.rounding[i], ".1%"),
            _form(total.base_cosine[i], ".6f"),
            f"{total.changed[i]:.1%}",
        ]
        rows.append([str(i + 1), *numbers, f"{total.far[i]:.1%}", number_text(total.largest[i]), name])
    for line in table(rows, right=range(7)):
        say(line)


def _matrix(matrix: Matrix, form: str) -> None:
    numbers = [str(i + 1) for i in range(len(matrix))]
    rows = [["model", *numbers]]
    rows += [[number, *(_form(value, form) for value in row)] for number, row in zip(numbers, matrix, strict=True)]
    for line in table(rows, right=range(len(matrix) + 1)):
        say(line)


def _mean(found: Kinship) -> None:
    """Print the mean over all pairs, the kinship of several models in Model Kinship (arXiv:2410.12613)."""
    from ...inspection.task_vectors import mean_of_pairs

    total = found.total
    said = [
        f"{name} {number_text(mean_of_pairs(matrix))}"
        for name, matrix in (("cosine", total.cosine), ("correlation", total.correlation), ("distance", total.distance))
    ]
    say(f"mean of pairs: {', '.join(said)}")


def _by_layer_and_role(found: Kinship) -> None:
    """Print the mean cosine of every layer and role."""
    from ...inspection.task_vectors import mean_of_pairs

    cells = {(group.layer, group.role): number_text(mean_of_pairs(group.kin.cosine)) for group in found.groups}
    roles = sorted({role for layer, role in cells if layer is not None})
    layers = sorted({layer for layer, _ in cells if layer is not None})
    if layers:
        say("mean cosine by layer and role")
        rows = [["layer", *roles]]
        rows += [[str(layer), *(cells.get((layer, role), "") for role in roles)] for layer in layers]
        for line in table(rows, right=range(len(roles) + 1)):
            say(line)
    outside = [[role, cosine] for (layer, role), cosine in cells.items() if layer is None]
    if outside:
        say("mean cosine outside the layers")
        for line in table(outside, right=[1]):
            say(line)


def _tensors(found: Kinship) -> None:
    from ...inspection.task_vectors import mean_of_pairs

    numbers: Sequence[str] = [str(i + 1) for i in range(len(found.models))]
    rows = [["tensor", *(f"change {number}" for number in numbers), "cosine", "sign conflict"]]
    for tensor in found.tensors:
        kin = tensor.kin
        means = [number_text(mean_of_pairs(kin.cosine)), _form(mean_of_pairs(kin.sign_conflict), ".1%")]
        rows.append([tensor.name or "", *map(number_text, kin.change), *means])
    for line in table(rows, right=range(1, len(numbers) + 3)):
        say(line)


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
