"""The merged model as calibrations within a merge see it: which models it is of, and its blocks without weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ...checkpoint import Checkpoint, open_checkpoint
from ...engine.alignment.alignment import Member
from ...engine.finish import lay_out
from ...engine.plan.part import treatment_hash
from ...engine.plan.plan import Plan
from ...inference.stored import open_stored
from ...recipe import Source, check_recipe
from ..forward.skeleton import Skeleton
from ..single.preparation import Reading

__all__ = ["merge_identity", "merged_models", "merged_reading", "merged_skeleton", "merged_sources"]


def merge_identity(plan: Plan) -> str:
    """Return the hash of the merge that statistics belong to."""
    return treatment_hash(plan.tensors, plan.permutation)


def merged_sources(plan: Plan) -> list[Source]:
    """Return the models that are merged, in the order of the recipe: without the base, if the method uses one."""
    return list(check_recipe(plan.recipe).sources(0).models)


def merged_models(plan: Plan) -> list[Member]:
    """Return these models opened, with the rows of the merge's vocabulary."""
    return [Member.of(source.model, plan.checkpoints[source.model]) for source in merged_sources(plan)]


@contextmanager
def merged_reading(plan: Plan) -> Iterator[Reading]:
    """Return how all models read their texts within the merge."""
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folder = Path(root, "merged")
        lay_out(plan, folder)
        yield Reading(_opened(folder), None if plan.vocabulary is None else open_stored(folder))


def _opened(folder: Path) -> Checkpoint:
    return replace(open_checkpoint(str(folder)), reference="the merged model")


@contextmanager
def merged_skeleton(plan: Plan, folder: Path, dtype: torch.dtype | None = None) -> Iterator[Skeleton]:
    """Open the merged model without weights.

    Args:
        plan: The merge.
        folder: Where its config is written.
        dtype: Dtype in which it runs; None for its own.
    """
    lay_out(plan, folder)
    with Skeleton(_opened(folder), dtype) as skeleton:
        yield skeleton
