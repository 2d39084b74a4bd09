"""Make the correlations that a recipe's `align` needs from the data that it names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DataError, MergeError, OutputError
from ...recipe import Recipe
from ...recipe.fields.align import Align
from ...statistics import CalibrationPlan
from ...statistics.correlations import CORRELATIONS_NAME, Correlations, open_correlations
from ..matching.run import about_pair, correlate, same_tokens, same_units
from ..matching.sums import Correlation, features
from ..output.target import remove_earlier, tidy
from ..output.writer import file_name
from ..planning.cost import rate_of_sums
from ..planning.plan import plan_prepared
from ..single.preparation import Prepared, prepare
from .wanted import folder_name, free_name

__all__ = ["WantedMatch", "make_match", "matches_wanted_by", "plan_match", "with_matches"]


@dataclass(frozen=True, slots=True)
class WantedMatch:
    """Correlations of a model's units with those of the reference.

    Args:
        name: Name of their folder.
        model: The model, as the recipe writes it.
        align: The recipe's `align`.
    """

    name: str
    model: str
    align: Align


def matches_wanted_by(recipe: Recipe, taken: Collection[str]) -> list[WantedMatch]:
    """Return the correlations that must be made before a recipe can be merged.

    Args:
        recipe: The recipe.
        taken: Names of folders that are taken.
    """
    align = recipe.align
    if align is None or align.data is None:
        return []
    used, found = list(taken), []
    for model in recipe.references():
        if model == align.to:
            continue
        used.append(free_name(f"matching-{folder_name(model.path)}", used))
        found.append(WantedMatch(used[-1], str(model), align))
    return found


def with_matches(recipe: Recipe, folders: Mapping[WantedMatch, Path | None]) -> Recipe:
    """Return the recipe with the folders of its correlations; None stands for one that is not made yet."""
    if recipe.align is None or not folders:
        return recipe
    made = {each.model: None if path is None else str(path) for each, path in folders.items()}
    return replace(recipe, align=replace(recipe.align, correlations=made))


def plan_match(wanted: WantedMatch, kept: Path | None, cache_dir: Path | None) -> CalibrationPlan:
    """Plan the comparison of a model with the reference.

    Args:
        wanted: What to make.
        kept: Where the correlations will be; None where that is temporary.
        cache_dir: Folder for models from the Hub.

    Raises:
        MergeError: The data or the models cannot be used; the message begins with the place in the recipe.
    """
    with _pair(wanted, cache_dir) as (reference, model):
        units, _ = same_units(reference, model, wanted.align.units)
        present = kept is not None and (kept / CORRELATIONS_NAME).exists()
        if present and kept is not None:
            _check_same(open_correlations(kept), reference, model, wanted, hashing=False)
        ours, theirs = (plan_prepared(own, wanted.model, wanted.name)[0] for own in (reference, model))
        found = [features(reference.skeleton, block, units) for block in reference.skeleton.blocks]
        # each input counts once, though several matrices read it, as those of queries, keys and values do
        seen = [{each.units: each for each in block.values()} for block in found]
        held = max(sum(Correlation.memory_of(each) for each in block.values()) for block in seen)
        sums = 2.0 * reference.counted * sum(e.width * e.size**2 for block in seen for e in block.values())
        return replace(
            theirs,
            name=wanted.name,
            statistics=(f"correlation with {wanted.align.to}",),
            bytes_read=ours.bytes_read + theirs.bytes_read,
            forward_operations=ours.forward_operations + theirs.forward_operations,
            sum_operations=sums,
            seconds=ours.seconds + theirs.seconds + sums / rate_of_sums(reference.skeleton.dtype),
            peak_memory=ours.peak_memory + theirs.peak_memory + held,
            spool_bytes=ours.spool_bytes + theirs.spool_bytes,
            statistics_bytes=sum(4 * each.size**2 for block in seen for each in block.values()),
            files=(CORRELATIONS_NAME, *(file_name(n, len(found), "correlations") for n in range(1, len(found) + 1))),
            present=present,
        )


def make_match(
    wanted: WantedMatch,
    folder: Path,
    *,
    kept: bool,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None,
) -> Correlations:
    """Compare a model with the reference, unless the correlations are there; an interrupted run continues.

    Args:
        wanted: What to make.
        folder: The folder for them.
        kept: Whether the folder is the user's: other correlations in it are refused, and replaced otherwise.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks and of all blocks.

    Raises:
        MergeError: They cannot be made; the message begins with the place in the recipe.
    """
    with _pair(wanted, cache_dir) as (reference, model):
        tidy(folder)
        if (folder / CORRELATIONS_NAME).exists():
            try:
                present = open_correlations(folder)
                _check_same(present, reference, model, wanted, hashing=True)
                return present
            except (DataError, OutputError):
                # others, or what is left of others by a run that was killed while it removed them
                if kept:
                    raise
            remove_earlier(folder, CORRELATIONS_NAME)
        return correlate(reference, model, wanted.align.units, folder, progress)


@contextmanager
def _pair(wanted: WantedMatch, cache_dir: Path | None) -> Iterator[tuple[Prepared, Prepared]]:
    """Prepare both models with the same data; errors begin with the place in the recipe."""
    align = wanted.align
    assert align.data is not None
    given: dict[str, Any] = {
        "statistics": ("count",),
        "choice": align.data.choice,
        "batch_tokens": align.data.batch_tokens,
    }
    try:
        with (
            prepare(str(align.to), align.data.source, cache_dir=cache_dir, **given) as reference,
            prepare(wanted.model, align.data.source, cache_dir=cache_dir, **given) as model,
        ):
            same_tokens(reference, model)
            yield reference, model
    except MergeError as error:
        raise type(error)(f"{align.place}: {error}") from None


def _check_same(
    present: Correlations, reference: Prepared, model: Prepared, wanted: WantedMatch, *, hashing: bool
) -> None:
    """Check that correlations are those that would be made.

    Raises:
        OutputError: They are of other models, or of other data.
    """
    about = about_pair(reference, model, wanted.align.units, hashing=hashing)
    models = [[own[key]["hash" if hashing else "sample"] for key in ("reference", "model")]
              for own in (present.about, about)]  # fmt: skip
    other = {
        "of other weights": models[0] != models[1],
        "of another tokenizer": present.about["tokenizer"] != about["tokenizer"],
        "of other data, or other sequences of them": present.about["parts"] != about["parts"],
        "of other units": not set(about["units"]) <= set(present.about["units"]),
    }
    found = next((reason for reason, differs in other.items() if differs), None)
    if found is not None:
        raise OutputError(
            f"{present.path}: the correlations there are {found} than the recipe's; remove them, or keep these in another "
            "folder"
        )
