"""Plans of models and of adapters: what is done with either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RecipeError

if TYPE_CHECKING:
    from .adapters.plan import AdapterPlan
    from .plan.plan import Plan
    from .run import Result

__all__ = ["lay_out_either", "run_either", "the_model"]


def run_either(
    plan: Plan | AdapterPlan, out: Path, *, overwrite: bool = False, fresh: bool = False, **given: Any
) -> Result:
    """Run a plan.

    Args:
        plan: Of a model or an adapter.
        out: Target folder.
        overwrite: Replace a target that merganser wrote before.
        fresh: For models: start again.
        **given: For models: as for `run_plan`.

    Raises:
        MergeError: An input or the target is invalid.
    """
    from .adapters.merge import run_adapters
    from .adapters.plan import AdapterPlan
    from .run import Result, run_plan

    if isinstance(plan, AdapterPlan):
        return Result(out, run_adapters(plan, out, overwrite=overwrite))
    return run_plan(plan, out, overwrite=overwrite, fresh=fresh, **given)


def lay_out_either(plan: Plan | AdapterPlan, folder: Path) -> None:
    """Write a plan's output without weights, for the planning of later stages.

    Raises:
        OutputError: It cannot be written.
    """
    from .adapters.merge import lay_out as lay_out_adapter
    from .adapters.plan import AdapterPlan
    from .finish import lay_out

    if not isinstance(plan, AdapterPlan):
        lay_out(plan, folder)
        return
    try:
        lay_out_adapter(plan, folder)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None


def the_model(plan: Plan | AdapterPlan) -> Plan:
    """Return the plan of a model.

    Raises:
        RecipeError: The plan makes an adapter.
    """
    from .adapters.plan import AdapterPlan

    if isinstance(plan, AdapterPlan):
        raise RecipeError(f"{plan.recipe.place}: makes an adapter, and a model is needed; name MODEL+ADAPTER")
    return plan
