"""What plan and merge say of adapters that are merged into an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...wording import count_text, number_text, plural, size_text, some, time_text
from .text import head, say, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ...adapters import Adapter
    from ...engine.adapters.plan import AdapterPlan

_SPACES = {
    "factors": "on the factors as they were trained",
    "core": "on small matrices in common bases of the factors",
    "full": "on whole matrices, one module at a time",
}


def adapter_plan_json(plan: AdapterPlan) -> dict[str, Any]:
    """Return a plan as JSON."""
    from ...engine.adapters.merge import output_rank

    return {
        "name": plan.recipe.name,
        "method": plan.method.name,
        "kind": "adapter",
        "space": plan.space,
        "adapters": [
            {
                "reference": plan.shown(name),
                "ranks": adapter.ranks,
                "modules": len(adapter.changes),
                "bytes": sum(tensor.nbytes for tensor in adapter.tensors),
                "base": adapter.config.base,
            }
            for adapter, name in zip(plan.adapters, plan.names, strict=True)
        ],
        "rank": output_rank(plan),
        "modules": len(plan.modules),
        "copied": list(plan.copied),
        "bytes_written": _size(plan),
        "dtype": plan.dtype,
        "base": plan.base,
        "warnings": [plan.shown(line) for line in plan.warnings],
    }


def print_adapter_plan(plan: AdapterPlan) -> None:
    """Print a plan."""
    from ...engine.adapters.merge import output_rank

    rank = output_rank(plan)
    head(f"{plan.method.name} → an adapter of rank {rank}, {plural(len(plan.modules), 'module')}")
    say("reads")
    rows = zip(plan.adapters, plan.names, strict=True)
    for line in table([_row(plan, adapter, name) for adapter, name in rows], right=(2, 4)):
        say(line)
    say("makes")
    for line in table(
        [
            ["merges", _SPACES[plan.space]],
            ["parameters", _parameters(plan)],
            ["base", plan.base or "not named by any adapter"],
            *([["copied", some(list(plan.copied))]] if plan.copied else []),
        ]
    ):
        say(line)
    say("writes")
    for line in table([["adapter_model.safetensors", size_text(_size(plan)), plan.dtype]]):
        say(line)
    if plan.warnings:
        say("warns")
    for warning in plan.warnings:
        say(f"  {plan.shown(warning)}")


def print_merged_adapter(out: Path, record: Mapping[str, Any], stages: list[str | None]) -> None:
    """Print what was merged."""
    merged = record["merged_adapters"]
    head(
        f"{record['method']} · {plural(len(record['models']), 'adapter')} · {plural(merged['modules'], 'module')} · "
        f"{count_text(record['parameters'])} parameters · {time_text(record['timings']['seconds'])}"
    )
    if merged["error"] is not None:
        say(f"rank {merged['rank']} leaves {number_text(merged['error'])} of the merged change as error")
    size = sum(entry["bytes"] for entry in record["outputs"] if entry["file"].endswith(".safetensors"))
    say(f"wrote {out} (rank {merged['rank']}, {size_text(size)}) and {out / 'merge.json'}")
    if any(stages):
        say(f"after the stages {', '.join(filter(None, stages))}")
    say(f"check it:  merganser verify {out}")
    say(f'load it:   peft.PeftModel.from_pretrained(base, "{out}")')


def _row(plan: AdapterPlan, adapter: Adapter, name: str) -> list[str]:
    ranks = some([str(rank) for rank in adapter.ranks], 3)
    size = size_text(sum(tensor.nbytes for tensor in adapter.tensors))
    dtypes = ", ".join(dict.fromkeys(tensor.dtype.name for tensor in adapter.tensors))
    return ["adapter", plan.shown(name), f"rank {ranks}", plural(len(adapter.changes), "module"), size, dtypes]


def _parameters(plan: AdapterPlan) -> str:
    """Return the parameters of all modules; a value that is not the same everywhere is shown as its range."""
    found = []
    for name in plan.modules[0].parameters:
        values = [str(value) for value in dict.fromkeys(module.parameters[name] for module in plan.modules)]
        found.append(f"{name} {values[0]}" if len(values) == 1 else f"{name} {values[0]} to {values[-1]}")
    return ", ".join(found) or "none"


def _size(plan: AdapterPlan) -> int:
    from ...checkpoint import DTYPE_BY_NAME
    from ...engine.adapters.merge import output_rank

    elements = output_rank(plan) * sum(sum(module.shape) for module in plan.modules)
    return DTYPE_BY_NAME[plan.dtype].nbytes(elements) + sum(tensor.nbytes for tensor in plan.copied.values())
