"""Shrink a mixture: see what its experts do on text, make fewer of them layer by layer, and write a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...calibration.single.preparation import Data, Prepared, prepare
from ...checkpoint import Checkpoint, plan_shards
from ...engine.alignment.complete import check_complete
from ...engine.new_tensors import TensorSpool, copied_from
from ...engine.output.beside import folder_beside
from ...engine.output.staging import check_target
from ...engine.plan.part import place
from ...engine.plan.plan import Plan
from ...engine.plan.sections.census import InputCensus
from ...engine.plan.sections.mixture import ShrinkingSummary
from ...engine.plan.tensor import PlannedTensor
from ...engine.planner.planner import SHARD_BYTES, build_plan
from ...engine.run import Progress, Result, run_plan
from ...errors import DataError, NonFiniteError, UnsupportedError, did_you_mean
from ...recipe import load_recipe
from ...statistics import Choice
from ...statistics.choice import BATCH_TOKENS
from .config import Sizes, choose_sizes, sized_config
from .experts import Experts, Observed
from .layers import Layer, find_layers
from .method import Reduced, ShrinkingMethod
from .methods import METHODS
from .observe import observe

__all__ = ["Shrinking", "plan_shrinking", "shrink"]

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Shrinking:
    """What shrinking a mixture will do, from headers alone.

    Args:
        model: The model.
        method: Name of the method.
        sizes: Numbers of experts.
        layers: Number of layers of experts.
        parameters: Number of parameters of the model.
        parameters_after: Number of those of the output.
        expert_bytes: Memory that the experts of a layer take while they are merged.
        sequences: Number of sequences of the text.
        tokens: Number of its tokens that count.
    """

    model: str
    method: str
    sizes: Sizes
    layers: int
    parameters: int
    parameters_after: int
    expert_bytes: int
    sequences: int
    tokens: int


def plan_shrinking(
    model: str | Path, data: Data, *, experts: int, method: str, per_token: int | None = None, **options: Any
) -> Shrinking:
    """Return what `shrink` with the same arguments would do; no weights are read, and nothing is written.

    Raises:
        MergeError: As for `shrink`.
    """
    with _opened(model, data, experts, method, per_token, options) as found:
        return _described(str(model), found)


def shrink(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    experts: int,
    method: str,
    per_token: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    advance: Advance | None = None,
    out_shard_size: int = SHARD_BYTES,
    **options: Any,
) -> Result:
    """Reduce the experts of a mixture: fewer experts in every layer, and a router for these.

    Args:
        model: The mixture: a folder, or a Hub id.
        data: Files of text, or a data set, as for `merganser.calibration.calibrate`.
        out: Target folder; it appears when it is complete.
        experts: Number of experts of each layer of the output.
        method: Name of the method, one of `METHODS`.
        per_token: Number of experts that compute each token; None for what the model has, or all if these are fewer.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        fresh: Start again even if an interrupted run could be continued.
        progress: Receives reports of the writing.
        advance: Called with the number of finished blocks, and of all, while text passes through the model.
        out_shard_size: Largest size of an output file, bytes.
        **options: `sequences`, `length`, `seed`, `tokens`, `batch_tokens` and `cache_dir`, as for `calibrate`.

    Raises:
        DataError: The data, or an option, are not valid.
        CheckpointError: The model is missing or damaged; experts or rows of routers are missing.
        UnsupportedError: It is not a mixture, or cannot be run one block at a time.
        NonFiniteError: It, or a merged expert, has NaN or infinity.
        OutputError: The target cannot be written.
        Interrupted: Ctrl-C was pressed.
    """
    target = Path(out)
    check_target(target, overwrite=overwrite)
    with (
        _opened(model, data, experts, method, per_token, options) as found,
        folder_beside(target, "shrinking") as folder,
    ):
        hidden, made = folder / "hidden", folder / "made"
        hidden.mkdir()
        made.mkdir()
        recipe = load_recipe({"merge_method": "passthrough", "models": [{"model": str(model)}]})
        plan = build_plan(recipe, out_shard_size=out_shard_size, cache_dir=options.get("cache_dir"))
        spool = TensorSpool(made)
        groups: dict[str, Sequence[Sequence[int]]] = {}

        def sink(layer: Layer, seen: Observed) -> None:
            groups[layer.name] = _shrink_layer(found, layer, seen, spool)

        observe(found.prepared, found.layers, hidden, sink, advance)
        plan = _planned(plan, found, spool, groups, str(model), out_shard_size)
        return run_plan(plan, target, overwrite=overwrite, fresh=fresh, progress=progress)


@dataclass(frozen=True)
class _Opened:
    """A mixture that was opened and checked."""

    prepared: Prepared
    layers: list[Layer]
    sizes: Sizes
    method: ShrinkingMethod
    config: dict[str, Any]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.prepared.skeleton.checkpoint


@contextmanager
def _opened(
    model: str | Path, data: Data, experts: int, method: str, per_token: int | None, options: Mapping[str, Any]
) -> Iterator[_Opened]:
    if method not in METHODS:
        raise DataError(
            f"--method: {method!r} is not known.{did_you_mean(method, METHODS)} Known are {', '.join(METHODS)}"
        )
    given = dict(options)
    drawn = {key: given.pop(key) for key in ("sequences", "length", "seed", "tokens") if key in given}
    cache_dir, size = given.pop("cache_dir", None), given.pop("batch_tokens", BATCH_TOKENS)
    if given:
        raise TypeError(f"unknown options: {', '.join(given)}")
    with prepare(
        model, data, statistics=(), choice=Choice(**drawn), batch_tokens=size, cache_dir=cache_dir
    ) as prepared:
        skeleton = prepared.skeleton
        if skeleton.is_encoder_decoder:
            raise UnsupportedError(f"{model}: only decoders can be shrunk, and this is an encoder-decoder")
        layers = find_layers(skeleton)
        sizes = choose_sizes(skeleton.model.config, layers[0].count, experts, per_token, str(model))
        config = sized_config(skeleton.checkpoint.config, sizes, str(model))
        yield _Opened(prepared, layers, sizes, METHODS[method], config)


def _described(model: str, found: _Opened) -> Shrinking:
    tensors = found.checkpoint.tensors
    before = sum(tensor.numel for tensor in tensors.values())
    of_layer = [sum(tensors[name].numel for name in (*own.experts, *own.router)) for own in found.layers]
    gone = sum(count * (found.sizes.before - found.sizes.after) // found.sizes.before for count in of_layer)
    return Shrinking(
        model=model,
        method=found.method.name,
        sizes=found.sizes,
        layers=len(found.layers),
        parameters=before,
        parameters_after=before - gone,
        expert_bytes=4 * max(of_layer),
        sequences=len(found.prepared.samples),
        tokens=found.prepared.counted,
    )


def _shrink_layer(found: _Opened, layer: Layer, seen: Observed, spool: TensorSpool) -> list[list[int]]:
    """Shrink a layer, store its new tensors, and return which experts each new one is made of."""
    stored = found.prepared.skeleton.stored
    experts = layer.read(stored)
    reduced = reduce_in_parts(found.method, experts, seen, found.sizes)
    made = reduced.experts
    copied = [(new, own[0]) for new, own in enumerate(reduced.groups) if len(own) == 1]
    # a method may have added rounding to what it does not change
    for name, part in made.units.items():
        for new, old in copied:
            part[new] = experts.units[name][old]
    tensors = layer.written(made)
    for name in layer.router:
        rows = stored(name).double()
        # the rows of experts; a bias of the shape [1, experts] has them along its last axis
        rest = name is not layer.router[0] and rows.dim() == 2
        tensors[name] = rows @ reduced.router.T if rest else reduced.router @ rows
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{name}: merging its experts gives NaN or infinity")
        tensors[name] = tensor.to(getattr(torch, found.checkpoint.tensors[name].dtype.name)).contiguous()
    spool.add(tensors)
    return [list(own) for own in reduced.groups]


def reduce_in_parts(method: ShrinkingMethod, experts: Experts, seen: Observed, sizes: Sizes) -> Reduced:
    """Shrink the experts of a layer; where routing chooses among groups of them first, each group by itself."""
    if sizes.before == sizes.after:
        every = [[expert] for expert in range(sizes.before)]
        return Reduced(every, experts, torch.eye(sizes.before, dtype=torch.float64))
    size, count = sizes.before // sizes.parts, sizes.after // sizes.parts
    found = []
    for start in range(0, sizes.before, size):
        own = range(start, start + size)
        found.append(method.reduce(experts.chosen(own), seen.of(own), count))
    groups = [[member + size * part for member in each] for part, own in enumerate(found) for each in own.groups]
    router = torch.block_diag(*(own.router for own in found))  # type: ignore[no-untyped-call]
    return Reduced(groups, Experts.joined([own.experts for own in found]), router)


def _planned(
    plan: Plan,
    found: _Opened,
    spool: TensorSpool,
    groups: Mapping[str, Sequence[Sequence[int]]],
    model: str,
    shard_size: int,
) -> Plan:
    """Return the plan of the output: the plan of a copy, with the new tensors in place of those of experts and routers."""
    of_layer = {name: layer for layer in found.layers for name in (*layer.experts, *layer.router)}
    drafts: list[PlannedTensor] = []
    used: set[str] = set()
    for tensor in plan.tensors:
        if tensor.name not in of_layer:
            drafts.append(tensor)
        elif tensor.name in spool.tensors:
            info = found.checkpoint.tensors[tensor.name]
            drafts.append(copied_from(tensor, spool.planned(tensor.name, info, tensor.dtype, "of fewer experts")))
            used.add(tensor.name)
    assert used == spool.tensors.keys()
    shards = plan_shards([(draft.name, draft.dtype, draft.shape) for draft in drafts], shard_size, {})
    # copies, as most are tensors of the given plan, too
    tensors = place([replace(draft) for draft in drafts], shards)
    config = sized_config(plan.config, found.sizes, model)
    unsure = check_complete(
        model, config, {tensor.name: tensor.shape for tensor in tensors}, always="the number of experts was changed"
    )
    summary = ShrinkingSummary(
        method=found.method.name,
        experts=found.sizes.after,
        experts_before=found.sizes.before,
        experts_per_token=found.sizes.chosen_after,
        groups={name: [list(own) for own in each] for name, each in groups.items()},
        data=found.prepared.part(),
        digest=spool.digest,
    )
    return replace(
        plan,
        tensors=tensors,
        shards=shards,
        config=config,
        warnings=[*plan.warnings, *unsure, *found.sizes.notes],
        census={reference: _census(own, of_layer, found, groups) for reference, own in plan.checkpoints.items()},
        mixture=summary,
    )


def _census(
    checkpoint: Checkpoint,
    of_layer: Mapping[str, Layer],
    found: _Opened,
    groups: Mapping[str, Sequence[Sequence[int]]],
) -> InputCensus:
    """Return what became of the tensors of the model."""
    left: dict[str, str] = {}
    for layer in found.layers:
        kept = {expert for own in groups[layer.name] for expert in own}
        for names in layer.single.values():
            left |= {name: "its expert is dropped" for expert, name in enumerate(names) if expert not in kept}
    merged = len(of_layer) - len(left)
    copied = len(checkpoint.tensors) - len(of_layer)
    return InputCensus(merged, copied, {**checkpoint.left_out, **left})
