"""The merged model as calibrations within a merge see it: which models it is of, and its blocks without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ...checkpoint import open_checkpoint
from ...engine.finish import lay_out
from ...engine.plan.part import treatment_hash
from ...engine.plan.plan import Plan
from ...recipe import Source
from ..forward.skeleton import Skeleton

__all__ = ["merge_identity", "merged_skeleton", "merged_sources"]


def merge_identity(plan: Plan) -> str:
    """Return the hash of the merge that statistics belong to."""
    return treatment_hash(plan.tensors, plan.permutation)


def merged_sources(plan: Plan) -> list[Source]:
    """Return the models that are merged, without the base, in the order of the recipe."""
    return [source for source in plan.recipe.models if source.model != plan.recipe.base_model]


@contextmanager
def merged_skeleton(plan: Plan, folder: Path, dtype: torch.dtype | None = None) -> Iterator[Skeleton]:
    """Open the merged model without weights.

    Args:
        plan: The merge.
        folder: Where its config is written.
        dtype: Dtype in which it runs; None for its own.
    """
    lay_out(plan, folder)
    checkpoint = replace(open_checkpoint(str(folder)), reference="the merged model")
    with Skeleton(checkpoint, dtype) as skeleton:
        yield skeleton
