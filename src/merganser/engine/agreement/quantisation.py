"""Refuse quantised inputs that cannot be read, or whose differences from the base would be rounding and little else."""

from __future__ import annotations

from collections.abc import Mapping

from ...checkpoint import Checkpoint
from ...errors import CheckpointError, RecipeError
from ...recipe import ModelReference, Recipe
from ...wording import some

__all__ = ["check_quantised", "refuse_unreadable"]


def refuse_unreadable(recipe: Recipe, reference: ModelReference, checkpoint: Checkpoint) -> None:
    """Refuse weights that are quantised in a way that cannot be read.

    Raises:
        CheckpointError: They are.
    """
    found = checkpoint.quantisation
    if found is not None and found.unreadable is not None:
        raise CheckpointError(
            f"{recipe.place_of_model(reference)}: {reference}: its weights are quantised ({found.evidence}); "
            f"{found.unreadable}; use the unquantised model"
        )


def check_quantised(recipe: Recipe, checkpoints: Mapping[ModelReference, Checkpoint]) -> None:
    """Compare how the inputs are quantised.

    Raises:
        RecipeError: A model was quantised in another way than its base, and the recipe does not allow it; or it was
            quantised by AWQ, which rescales its tensors, and there is a base.
    """
    named = [recipe.base_model, *(piece.base_model for piece in recipe.slices)]
    bases = {base for base in named if base is not None}
    for reference, checkpoint in checkpoints.items():
        own = checkpoint.quantisation
        if own is not None and own.rescaled and bases:
            raise RecipeError(
                f"{recipe.place_of_model(reference)}: {reference}: AWQ scales norms and weights before it rounds them, so "
                "its tensors cannot be compared with those of a base; use the unquantised model, or a method without a "
                "base"
            )
    for base in bases:
        for reference, checkpoint in checkpoints.items():
            if reference in bases or recipe.quantised == "allow":
                continue
            ours, theirs = _schemes(checkpoint), _schemes(checkpoints[base])
            if ours != theirs:
                raise RecipeError(
                    f"{recipe.place_of_model(reference)}: {reference} is {_told(ours)}, its base {base} is {_told(theirs)}: the "
                    "difference of the two would be mostly rounding. Use models that are stored alike, or "
                    "write 'quantised: allow' into the recipe"
                )


def _schemes(checkpoint: Checkpoint) -> tuple[str, ...]:
    return () if checkpoint.quantisation is None else checkpoint.quantisation.schemes


def _told(schemes: tuple[str, ...]) -> str:
    return f"quantised ({some(schemes, 4)})" if schemes else "not quantised"
