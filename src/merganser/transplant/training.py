"""Train the network that makes the rows of merged tokens: on text, with all other weights of the model as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.alignment.alignment import Member
from ..errors import DataError, NonFiniteError, UnsupportedError
from ..inference.language_model import open_model
from ..inference.stored import open_stored
from .grown import Values
from .hypernetwork import Hypernetwork

__all__ = ["Trained", "learn", "train_rows"]

LENGTH = 128
"""Tokens of a sequence."""
BATCH = 4
"""Sequences of a step."""
RATE = 2e-3
_WARM = 5
_MEASURED = 8


@dataclass(frozen=True, eq=False)
class Trained:
    """Rows of new tokens.

    Args:
        embedding: Rows of the embedding, float32, shape [new, width].
        head: Rows of the head, float32, shape [new, width]; None if they are those of the embedding.
        before: Loss per token on held-out sequences with the mean of the parts, nats.
        after: The same with the trained rows.
    """

    embedding: Tensor
    head: Tensor | None
    before: float
    after: float


def learn(
    member: Member,
    parts: Sequence[Sequence[int]],
    first: int,
    texts: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    steps: int,
    cache_dir: Path | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Values] | None, Mapping[str, Any]]:
    """Open a model and train rows of new tokens.

    Args:
        member: The model.
        parts: As for `train_rows`.
        first: As for `train_rows`.
        texts: As for `train_rows`.
        held: As for `train_rows`.
        steps: As for `train_rows`.
        cache_dir: Folder for models from the Hub.
        advance: As for `train_rows`.

    Returns:
        The rows, float32, by the name of the tensor that gets them, or None if they are not better than the mean of the
        parts on the text held out; and what was measured, for the record.

    Raises:
        MergeError: As for `train_rows`, or the model cannot be run.
    """
    opened = open_model(open_stored(str(member.reference), cache_dir=cache_dir))
    tensors = opened.source.read()
    # the networks are float32; products of a model in bfloat16 take less than half the time where the processor has them
    narrow = tensors[str(member.anatomy.embedding)].dtype == torch.bfloat16
    model = opened.load(tensors, torch.bfloat16 if narrow else torch.float32, torch.device("cpu"))
    name = str(member.reference)
    found = train_rows(model, parts, first, texts, held, steps=steps, reference=name, advance=advance)
    measured = {"train_steps": steps, "loss_of_mean": found.before, "loss_of_trained": found.after}
    if found.after >= found.before:
        return None, measured
    rows = {member.anatomy.embedding: found.embedding}
    if found.head is not None:
        rows[member.anatomy.head] = found.head
    elif member.anatomy.head in member.checkpoint.tensors:
        # a copy of the embedding that is stored, too
        rows[member.anatomy.head] = found.embedding
    return {str(tensor): values.numpy() for tensor, values in rows.items()}, measured


def train_rows(
    model: Any,
    parts: Sequence[Sequence[int]],
    first: int,
    texts: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    *,
    steps: int,
    seed: int = 0,
    reference: str = "the model",
    advance: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train a network for the embedding of new tokens, and one for the head unless it is tied.

    The loss is that of language modelling on the text, in which the new tokens occur; only the networks are trained.

    Args:
        model: The model of transformers, without the new tokens, in evaluation mode.
        parts: For each new token, the rows that it is made of.
        first: Id of the first new token; the others follow it.
        texts: Tokens of texts, with the new ones.
        held: Tokens of other texts, to measure on.
        steps: Steps of training.
        seed: Seed of the networks' first weights, and of the order of the sequences.
        reference: The model's name in messages.
        advance: Called with the number of steps done, and of all.

    Raises:
        DataError: The text is too short for a sequence.
        UnsupportedError: The model computes its embedding or its head in a way that is not known here.
        NonFiniteError: The loss is not finite.
    """
    sequences, measured = _sequences(texts), _sequences(held)[:_MEASURED]
    if not len(sequences) or not len(measured):
        raise DataError(f"--text: is too short to train on: sequences of {LENGTH} tokens are needed")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = _Rows(model, parts, first, seed, reference)
    optimiser = torch.optim.AdamW(rows.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    order = _order(len(sequences), steps * BATCH, seed)
    with rows.in_place():
        before = _measure(model, rows, measured)
        for step in range(steps):
            rows.make()
            loss = _loss(model, sequences[order[step * BATCH : (step + 1) * BATCH]])
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"{reference}: the loss is not finite after {step} steps of training")
            torch.autograd.backward(loss)
            rows.pull()
            nn.utils.clip_grad_norm_(rows.parameters(), 1.0)
            optimiser.step()
            falling.step()
            optimiser.zero_grad()
            if advance is not None:
                advance(step + 1, steps)
        after = _measure(model, rows, measured)
    return Trained(rows.embedding, None if rows.tied else rows.head, before, after)


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: it rises for a few steps, then falls along half a cosine."""
    if step < _WARM:
        return (step + 1) / _WARM
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - _WARM) / max(1, steps - _WARM)))))


def _order(count: int, wanted: int, seed: int) -> list[int]:
    """Return numbers of sequences in a random order, all of them once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < wanted:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:wanted]


def _sequences(texts: Sequence[Sequence[int]]) -> Tensor:
    """Cut texts into sequences of `LENGTH` tokens; shorter ends are left out."""
    whole = [text[at : at + LENGTH] for text in texts for at in range(0, len(text) - LENGTH + 1, LENGTH)]
    return torch.tensor(whole, dtype=torch.int64).reshape(-1, LENGTH)


def _loss(model: Any, sequences: Tensor) -> Tensor:
    logits = model(input_ids=sequences, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def _measure(model: Any, rows: _Rows, sequences: Tensor) -> float:
    rows.make()
    return sum(float(_loss(model, sequences[i : i + 1])) for i in range(len(sequences))) / len(sequences)


class _Rows:
    """The rows of new tokens while they are trained, put into the model by hooks."""

    def __init__(self, model: Any, parts: Sequence[Sequence[int]], first: int, seed: int, reference: str) -> None:
        self._in, self._out = model.get_input_embeddings(), model.get_output_embeddings()
        self._first, self._count = first, len(parts)
        self._scale = _scale_of(self._in, self._out, reference)
        self.tied = self._in.weight is self._out.weight
        table = self._in.weight.detach().float()
        self._networks = [Hypernetwork(table, parts, seed)]
        if not self.tied:
            self._networks.append(Hypernetwork(self._out.weight.detach().float(), parts, seed + 1))
        bias = getattr(self._out, "bias", None)
        self._bias = None if bias is None else torch.stack([bias[list(own)].float().mean() for own in parts])
        self._ids = torch.empty(0)
        self._made: list[Tensor] = []
        self._used: list[Tensor] = []

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for network in self._networks for parameter in network.parameters()]

    def make(self) -> None:
        """Compute the rows."""
        self._made = [network() for network in self._networks]
        self._used = [rows.detach().requires_grad_() for rows in self._made]

    def pull(self) -> None:
        """Give the gradients of the rows to the networks."""
        torch.autograd.backward(self._made, [used.grad for used in self._used])

    @property
    def embedding(self) -> Tensor:
        return self._used[0].detach()

    @property
    def head(self) -> Tensor:
        return self._used[-1].detach()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        hooks = [
            self._in.register_forward_pre_hook(self._before),
            self._in.register_forward_hook(self._embedded),
            self._out.register_forward_hook(self._predicted),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._ids = given[0]
        return (self._ids.where(self._ids < self._first, 0), *given[1:])

    def _embedded(self, module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        new = self._ids - self._first
        rows = nn.functional.embedding(new.clamp(min=0), self._used[0]) * self._scale
        return torch.where((new >= 0).unsqueeze(-1), rows.to(found.dtype), found)

    def _predicted(self, module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        new = nn.functional.linear(given[0], self._used[-1].to(given[0].dtype))
        if self._bias is not None:
            new = new + self._bias.to(new.dtype)
        # rows of padding that the new tokens take are replaced
        return torch.cat([found[..., : self._first], new, found[..., self._first + self._count :]], dim=-1)


def _scale_of(embedding: Any, head: Any, reference: str) -> float:
    """Return what a model multiplies rows of its embedding by, in its embedding.

    Raises:
        UnsupportedError: Embedding and head are not known to be plain tables.
    """
    plain = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    if not plain or embedding.weight.shape != head.weight.shape:
        raise UnsupportedError(
            f"{reference}: rows cannot be trained: its embedding or head is not a plain table; leave --train-steps out"
        )
    scale = float(getattr(embedding, "embed_scale", 1.0))
    ids = torch.arange(min(8, embedding.weight.shape[0]))
    if not torch.allclose(embedding(ids).float(), embedding.weight[ids].float() * scale, rtol=1e-2):
        raise UnsupportedError(
            f"{reference}: rows cannot be trained: its embedding changes them in a way that is not known here; leave "
            "--train-steps out"
        )
    return scale
