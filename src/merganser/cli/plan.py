"""`merganser plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..wording import count_text, plural, size_text, some, time_text
from . import _options as options
from .printing.adapters import adapter_plan_json, print_adapter_plan
from .printing.calibrations import calibration_rows
from .printing.permutation import permutation_lines
from .printing.text import head, passes_text, say, say_json, share_text, table
from .printing.vocabulary import vocabulary_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..engine.adapters.plan import AdapterPlan
    from ..engine.plan.plan import Plan
    from ..engine.plan.summary import InputSummary, PlanSummary, SidecarSummary, TensorSummary
    from ..engine.plan.tensor_groups import TensorGroup

_MOST_FILES = 8


def plan(
    recipe: options.RecipeFile,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    out_shard_size: options.ShardSize = options.SHARD_SIZE,  # type: ignore[assignment]  # parsed like what is given
    seed: options.Seed = None,
    max_memory: options.MaxMemory = None,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
    keep_stages: options.KeepStages = False,
    tensors: options.AllTensors = False,
    json: options.Json = False,
) -> None:
    """Show what a merge will read, do and write; nothing is written."""
    options.quieten_hub()
    from ..recipe import check_names, load_recipes

    recipes = load_recipes(recipe)
    check_names(recipes)  # report errors in the recipe before torch is imported
    from ..engine.adapters.plan import AdapterPlan
    from ..engine.merge import plan as plan_recipes
    from ..engine.plan.summary import summarise, tensor_summaries

    given = options.chosen(threads=threads, device=device, out_shard_size=out_shard_size, seed=seed)
    given |= options.chosen(max_memory=max_memory, cache_dir=cache_dir, stream=stream or None)
    target = plan_recipes(recipes, keep_stages=keep_stages, **given)
    stages = [*target.stages, target]
    if json:
        say_json({"stages": [_as_json(stage, tensors=tensors) for stage in stages]})
        return
    for number, stage in enumerate(stages):
        if number:
            say()
        if len(stages) > 1:
            name = f": {stage.recipe.name}" if stage.recipe.name else ""
            head(f"Stage {number + 1} of {len(stages)}{name}")
        if isinstance(stage, AdapterPlan):
            print_adapter_plan(stage)
        else:
            _print(stage, summarise(stage), tensor_summaries(stage) if tensors else [])


def _as_json(stage: Plan | AdapterPlan, *, tensors: bool) -> dict[str, Any]:
    from ..engine.adapters.plan import AdapterPlan
    from ..engine.plan.summary import summarise, tensor_summaries

    if isinstance(stage, AdapterPlan):
        return adapter_plan_json(stage)
    found = asdict(summarise(stage))
    found["donor"] = stage.shown(found["donor"])
    found["side_files"] = {stage.shown(model): names for model, names in found["side_files"].items()}
    for entry in found["census"]:
        entry["model"] = stage.shown(entry["model"])
    for entry in found["inputs"]:
        made = entry["path"] in stage.made
        entry["reference"] = stage.shown(entry["reference"])
        entry["path"] = None if made else entry["path"]
    for task in (found["sidecars"] or {}).get("tasks", ()):
        task["model"] = stage.shown(task["model"])
    for key in ("warnings", "differences"):
        found[key] = [stage.shown(line) for line in found[key]]
    if tensors:
        found["each_tensor"] = [asdict(tensor) for tensor in tensor_summaries(stage)]
    return found


def _print(stage: Plan, found: PlanSummary, tensors: list[TensorSummary]) -> None:
    from ..engine.plan.sections.census import census_text

    head(f"{_methods(found)} → {plural(found.tensors, 'tensor')}, {count_text(found.parameters)} parameters")
    _section("reads", table([_input(stage, entry) for entry in found.inputs], right=(2, 3, 4)))
    if found.donor not in found.side_files:
        say(f"  {stage.shown(found.donor)} the donor, has no files to give")
    for model, names in found.side_files.items():
        say(f"  {stage.shown(model)} gives {some(names, 6)}")
    if found.vocabulary is not None:
        _section("matches tokens", map(stage.shown, vocabulary_lines(found.vocabulary)))
    if found.permutation is not None:
        reference = stage.shown(found.permutation["to"])
        _section(f"aligns models to {reference}", map(stage.shown, permutation_lines(found.permutation)))
    if any(entry["copied"] or entry["left_out"] for entry in found.census):
        say(f"  {stage.shown(census_text(stage.census.values()))}")
    _section("makes", table(_groups(found.groups), right=(1,)))
    if tensors:
        _section("tensors", table([_tensor(tensor, several=len(found.methods) > 1) for tensor in tensors]))
    _section("writes", table(_files(found), right=(1,)))
    if found.sidecars:
        _section("keeps", table(_tasks(stage, found.sidecars), right=(2,)))
    if found.calibrations:
        _section("calibrates first", table(calibration_rows(found.calibrations)))
    _section("expects", table(_costs(found)))
    for title, lines in (("warns", found.warnings), ("differs from mergekit", found.differences)):
        if lines:
            _section(title, (f"  {stage.shown(line)}" for line in lines))


def _section(title: str, lines: Iterable[str]) -> None:
    say(title)
    for line in lines:
        say(line)


def _input(stage: Plan, entry: InputSummary) -> list[str]:
    tensors = plural(entry.tensors, "tensor")
    if entry.tensors_read not in (0, entry.tensors):
        tensors = f"{entry.tensors_read:,} of {tensors}"
    made = " (made by an earlier stage; planned from its headers)" if entry.path in stage.made else ""
    if entry.fetched:
        made = f" ({size_text(entry.fetched)} fetched by ranges)"
    return [
        entry.used_as,
        f"{stage.shown(entry.reference)}",
        plural(entry.files, "file"),
        size_text(entry.bytes),
        tensors,
        f"{', '.join(entry.dtypes)}{made}",
    ]


def _methods(found: PlanSummary) -> str:
    """Return the name of the method; if further methods merge some tensors, all names with their numbers of tensors."""
    if len(found.methods) == 1:
        return found.method
    return ", ".join(f"{name} ({plural(count, 'tensor')})" for name, count in found.methods.items())


def _groups(groups: Sequence[TensorGroup]) -> list[list[str]]:
    """Return rows that describe how tensors are made; parameters that all groups share are listed once."""
    merged = [group.parameters for group in groups if not group.copied]
    several = len({group.method for group in groups if not group.copied}) > 1
    everywhere = [
        (name, value)
        for name, value in (merged[0].items() if len(merged) > 1 else ())
        if not several and all(parameters[name] == value for parameters in merged)
    ]
    rows = [
        [
            _label(group),
            plural(group.tensors, "tensor"),
            "copied, equal in all inputs"
            if group.copied
            else f"{group.method}: " * several
            + _values([item for item in group.parameters.items() if item not in everywhere]),
        ]
        for group in groups
    ]
    return [*rows, ["everywhere", "", _values(everywhere)]] if everywhere else rows


def _label(group: TensorGroup) -> str:
    roles = ", ".join(group.roles)
    if group.copied:
        label = "integers"
    elif group.layers is not None:
        first, last = group.layers
        label = f"{f'layer {first}' if first == last else f'layers {first}-{last}'} {roles}".rstrip()
    else:
        label = roles or "all"
    return f"{label} ({some(group.names, 3 if len(group.names) < 4 else 1)})" if group.names else label


def _values(items: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items)


def _tensor(tensor: TensorSummary, *, several: bool) -> list[str]:
    method = [tensor.method] if several else []
    return [
        tensor.name,
        str(list(tensor.shape)),
        tensor.dtype,
        tensor.role,
        tensor.file,
        *method,
        _values(_texts(tensor)),
    ]


def _texts(tensor: TensorSummary) -> Iterator[tuple[str, str]]:
    from ..engine.plan.tensor_groups import value_text

    for name, value in tensor.parameters.items():
        each = value if isinstance(value, tuple) else (value,)
        yield name, ", ".join(value_text([one]) for one in each)


def _files(found: PlanSummary) -> list[list[str]]:
    dtypes = ", ".join(found.dtypes)
    names = list(found.files)
    if len(names) <= _MOST_FILES:
        return [[name, size_text(size), dtypes] for name, size in found.files.items()]
    largest = size_text(max(found.files.values()))
    return [[f"{names[0]} to {names[-1]}", size_text(found.bytes_written), f"{dtypes}, each {largest} or less"]]


def _tasks(stage: Plan, found: SidecarSummary) -> list[list[str]]:
    """Return rows that describe what is stored for each model, and what it takes to restore it."""
    rows = [
        [
            f"sidecars/{task.name}",
            stage.shown(task.model),
            size_text(task.bytes),
            share_text(task.bytes, task.full_bytes),
        ]
        for task in found.tasks
    ]
    if found.shared_bytes:
        rows.append(["sidecars/shared", "all", size_text(found.shared_bytes), "stored once"])
    return rows


def _costs(found: PlanSummary) -> list[list[str]]:
    work = f"{found.device}, {plural(found.threads, 'thread')}"
    rows = [
        ["read", f"{size_text(found.bytes_read)} in {passes_text(found.passes)}"],
        *_fetched(found),
        ["written", size_text(found.bytes_written)],
        *_beside(found.sidecars),
        ["peak memory", f"about {size_text(found.peak_memory)}, at most {size_text(found.max_memory)}"],
        ["time", f"about {time_text(max(1, round(found.seconds)))} on {work}"],
    ]
    return rows if found.seed is None else [*rows, ["seed", str(found.seed)]]


def _fetched(found: PlanSummary) -> list[list[str]]:
    """Return a row that says what comes over the network while the merge runs."""
    fetched = sum(entry.fetched for entry in found.inputs)
    if not fetched:
        return []
    again = " at most, as every pass that does not fit into memory fetches again" if found.passes > 1 else ""
    return [["fetched", f"{size_text(fetched)} from the Hub by ranges{again}; its time is not counted below"]]


def _beside(found: SidecarSummary | None) -> list[list[str]]:
    if found is None:
        return []
    written = found.shared_bytes + sum(task.bytes for task in found.tasks)
    base = ", to be restored with the base" if found.needs_base else ", to be restored without the base"
    return [["sidecars", f"{size_text(found.bytes_read)} read, {size_text(written)} written{base}"]]
