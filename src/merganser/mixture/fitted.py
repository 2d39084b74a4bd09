"""Routers from what the experts read: prompts, and text of their domains by ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration.data.batches import Batch
from ..calibration.forward.skeleton import Skeleton
from ..checkpoint import Checkpoint, Reader
from ..errors import CheckpointError, NonFiniteError
from ..inference.language_model import open_tokenizer
from ..inference.stored import open_stored
from .forward import Run, batches_of_data, batches_of_prompts, counted_rows, router_inputs
from .models import DenseTensors, ExpertTensors, Layer
from .recipe import Expert, MixtureRecipe
from .routers import Routers, condition, direction, right_share

__all__ = ["Advance", "cheap_routers", "prompt_routers", "ridge_routers", "ridge_rows"]

Advance = Callable[[int, int], None]
_SEEN = 4096
"""Most held-out tokens of each domain on which the routers are tried."""


def _asked(recipe: MixtureRecipe) -> list[Expert]:
    """Return the experts that get a row from their prompts: the shared expert last."""
    return [*recipe.experts, *filter(None, [recipe.shared_expert])]


def _split(recipe: MixtureRecipe, rows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the router of a layer, and the gate of the shared expert if there is one."""
    count = len(recipe.experts)
    return torch.stack(list(rows[:count])), [row[None] for row in rows[count:]]


def cheap_routers(recipe: MixtureRecipe, base: Checkpoint, embedding: str, layers: int) -> Routers:
    """Make routers from the embeddings of prompts' tokens, the same for every layer, as mergekit-moe does.

    A row is the sum of the embeddings at length 1, minus that of the negative prompts, at length 1.

    Raises:
        CheckpointError: The base has no tokenizer, or prompts give no direction.
    """
    tokenizer = open_tokenizer(open_stored(str(recipe.base)))
    with Reader() as reader:
        table = reader.tensor(base.tensors[embedding])

    def unit(prompts: Sequence[str], place: str) -> Tensor | None:
        if not prompts:
            return None
        ids = [number for prompt in prompts for number in (*tokenizer.prefix, *tokenizer.ids(prompt))]
        if not ids:
            raise CheckpointError(f"{place}: the tokenizer gives no token for the prompts {list(prompts)}")
        return direction(table[ids].float(), None, place)[None]

    found = []
    for expert in _asked(recipe):
        place = str(expert.place)
        positive = unit(expert.positive, place)
        assert positive is not None
        found.append(direction(positive, unit(expert.negative, place), place))
    rows, gates = _split(recipe, found)
    return Routers([rows] * layers, gates * layers, {"condition": condition(rows)})


def prompt_routers(recipe: MixtureRecipe, base: Checkpoint, dense: DenseTensors, advance: Advance | None) -> Routers:
    """Make routers from what they will read of prompts: of the last token, or the mean over all tokens.

    The prompts pass through the dense model with the mixture's shared parts.

    Raises:
        MergeError: The model has no tokenizer, or cannot be run block by block.
    """
    asked = _asked(recipe)
    prompts = [(prompt, str(expert.place)) for expert in asked for prompt in (*expert.positive, *expert.negative)]
    found: list[Tensor] = []
    routers: list[Tensor] = []
    gates: list[Tensor] = []
    report: list[dict[str, Any]] = []
    average = recipe.gate_mode == "hidden_avg"

    def sink(run: int, number: int, batch: Batch, inputs: Tensor) -> None:
        own = counted_rows(batch, inputs)
        found.append(own.mean(0) if average else own[-1])

    def finished(layer: int) -> None:
        if layer < recipe.dense_layers:
            found.clear()
            return
        at, rows, own = 0, [], []
        for expert in asked:
            positive = torch.stack(found[at : at + len(expert.positive)])
            at += len(expert.positive)
            negative = torch.stack(found[at : at + len(expert.negative)]) if expert.negative else None
            at += len(expert.negative)
            rows.append(direction(positive, negative, str(expert.place)))
            own.append(positive)
        found.clear()
        router, gate = _split(recipe, rows)
        routers.append(router)
        gates.extend(gate)
        report.append(_described(router, own[: len(router)]))

    with Skeleton(base) as skeleton:
        tokenizer = open_tokenizer(open_stored(str(recipe.base)))
        batches = batches_of_prompts(prompts, tokenizer, skeleton)
        router_inputs(skeleton, [Run(batches, dense)], sink, finished, advance)
    return Routers(routers, gates, {"tried_on": "the positive prompts", **_summed(report, recipe.dense_layers)})


class _Domains:
    """Sums over what the routers read of each domain's text; all domains count alike."""

    def __init__(self, recipe: MixtureRecipe, fitted: Sequence[int], held: bool) -> None:
        self._recipe = recipe
        self._fitted = fitted
        self._held_out = held
        self._count = len(fitted)
        self.rows: list[Tensor] = []
        self.report: list[dict[str, Any]] = []
        self._dense = recipe.dense_layers > 0
        self._clear()

    def _clear(self) -> None:
        self._gram: list[Tensor | None] = [None] * self._count
        self._sum: list[Tensor | None] = [None] * self._count
        self._tokens = [0] * self._count
        self._held: list[list[Tensor]] = [[] for _ in range(self._count)]

    def sink(self, run: int, number: int, batch: Batch, inputs: Tensor) -> None:
        """Add the inputs of a batch, or keep them to try the routers on."""
        if self._dense:
            return
        rows = counted_rows(batch, inputs)
        fits = number < self._fitted[run]
        if fits != self._held_out and sum(map(len, self._held[run])) < _SEEN:
            self._held[run].append(rows[:_SEEN])
        if fits:
            self._gram[run] = _added(self._gram[run], (rows.T @ rows).double())
            self._sum[run] = _added(self._sum[run], rows.sum(0).double())
            self._tokens[run] += len(rows)

    def finished(self, layer: int) -> None:
        """Solve the router of a layer, if it has one."""
        self._dense = layer + 1 < self._recipe.dense_layers
        if layer < self._recipe.dense_layers:
            return
        grams = [gram / count for gram, count in zip(self._gram, self._tokens, strict=True) if gram is not None]
        means = [total / count for total, count in zip(self._sum, self._tokens, strict=True) if total is not None]
        rows = ridge_rows(sum(grams[1:], grams[0]), torch.stack(means), self._recipe.ridge)
        if not rows.isfinite().all():
            raise NonFiniteError(f"layer {layer}: the ridge regression of the router gives NaN or infinity")
        self.rows.append(rows)
        self.report.append(_described(rows, [torch.cat(own) for own in self._held]))
        self._clear()


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def ridge_rows(gram: Tensor, means: Tensor, ridge: float) -> Tensor:
    """Solve a router: the ridge regression from inputs to the domain they come from.

        rows = means (gram + ridge * mean(diagonal of gram) * I)^-1

    Args:
        gram: Sum over domains of the mean of x x^T, float64, shape [hidden, hidden].
        means: Mean of x of each domain, float64, shape [experts, hidden].
        ridge: Regularisation, relative to the mean square of the inputs.

    Returns:
        Shape [experts, hidden], float32.
    """
    scale = gram.diagonal().mean() * ridge
    regular = gram + scale * torch.eye(len(gram), dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed:
        return torch.full(means.shape, float("nan"))
    return torch.cholesky_solve(means.T, factor).T.float().contiguous()


def ridge_routers(
    recipe: MixtureRecipe,
    base: Checkpoint,
    dense: DenseTensors,
    experts: Sequence[Checkpoint],
    layers: list[Layer],
    reader: Reader,
    advance: Advance | None,
) -> Routers:
    """Make routers that tell the domains of the experts apart, in closed form from text (DUME).

    The text of each domain passes through the shared parts with its own expert's MLPs: what the routers read where they
    route rightly.

    Raises:
        MergeError: Data are missing or malformed, or the model cannot be run block by block.
    """
    with Skeleton(base) as skeleton:
        tokenizer = open_tokenizer(open_stored(str(recipe.base)))
        runs, fitted = [], []
        for expert, checkpoint in zip(recipe.experts, experts, strict=True):
            assert expert.data is not None
            batches, count = batches_of_data(expert.data, tokenizer, skeleton)
            runs.append(Run(batches, ExpertTensors(dense, expert, checkpoint, layers, reader)))
            fitted.append(count)
        held = all(len(run.batches) > count for run, count in zip(runs, fitted, strict=True))
        domains = _Domains(recipe, fitted, held)
        router_inputs(skeleton, runs, domains.sink, domains.finished, advance)
    tried = f"{'held-out' if held else 'the same'} tokens of each domain"
    # a gate of zeros: the shared expert counts half for every token
    gates = [torch.zeros(1, rows.shape[1]) for rows in domains.rows] if recipe.shared_expert else []
    return Routers(domains.rows, gates, {"tried_on": tried, **_summed(domains.report, recipe.dense_layers)})


def _described(rows: Tensor, inputs: Sequence[Tensor]) -> dict[str, Any]:
    share, load = right_share(rows, inputs)
    return {"condition": condition(rows), "right": share, "load": load}


def _summed(layers: Sequence[Mapping[str, Any]], first: int) -> dict[str, Any]:
    """Return what is known of all layers with routers, from layer `first` on: means, the worst layer, and each."""
    shares = [[share for share in each["right"] if share is not None] for each in layers]
    means = [sum(own) / len(own) if own else None for own in shares]
    known = [mean for mean in means if mean is not None]
    conditions = [each["condition"] for each in layers if each["condition"] is not None]
    return {
        "right": sum(known) / len(known) if known else None,
        "worst_layer": first + means.index(min(known)) if known else None,
        "worst_right": min(known) if known else None,
        "largest_condition": max(conditions) if len(conditions) == len(layers) else None,
        "largest_load": max(max(each["load"]) for each in layers),
        "layers": [dict(each) for each in layers],
    }
