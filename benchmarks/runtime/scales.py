"""The scales: bits of what follows, the needle grid, tasks of RULER's kinds, processor time."""

import time
from typing import Any

import torch
from torch import Tensor

from .contenders import Field
from .intervals import mean, paired
from .prompts import Prompt, answer, bits
from .tasks import TASKS, Item, Maker

Table = dict[str, dict[str, Any]]


def likelihoods(model: Any, field: Field, parts: list[Tensor], length: int, queries: int) -> Table:
    """Bits per token of what follows a compressed prompt of `length` tokens."""
    found: dict[str, list[float]] = {}
    taken: dict[str, list[float]] = {}
    for part in parts:
        prompt = Prompt(model, part[:, :length], queries)
        for name, make in field.at(prompt).items():
            cache = make()
            found.setdefault(name, []).append(bits(model, prompt, cache, part[:, length:]))
            cache = prompt.into(make())
            taken.setdefault(name, []).append(cache.stored_bytes())
    return {
        name: {"bits": mean(own), "bytes": round(mean(taken[name])), **paired(own, found[field.against(name)])}
        for name, own in found.items()
    }


def scored(model: Any, tokenizer: Any, field: Field, items: list[Item], queries: int) -> dict[str, list[float]]:
    """The score of every cache for every item."""
    found: dict[str, list[float]] = {}
    for item in items:
        prompt = Prompt(model, torch.tensor([item.tokens]), min(queries, len(item.tokens)))
        for name, make in field.at(prompt).items():
            said = tokenizer.decode(answer(model, prompt, make(), item.count))
            found.setdefault(name, []).append(item.score(said))
    return found


def needle_grid(
    model: Any, tokenizer: Any, field: Field, makers: list[Maker], depths: int, queries: int
) -> dict[str, Any]:
    """Whether the number is found, by length and depth; and all cells together."""
    cells: dict[str, dict[str, list[float]]] = {}
    every: dict[str, list[float]] = {}
    for maker in makers:
        items = [maker.needle((at + 0.5) / depths) for at in range(depths)]
        for name, own in scored(model, tokenizer, field, items, queries).items():
            cells.setdefault(name, {})[str(maker.length)] = own
            every.setdefault(name, []).extend(own)
    return {"depths": [(at + 0.5) / depths for at in range(depths)], "cells": cells, **_summed(field, {"all": every})}


def ruler(
    model: Any, tokenizer: Any, field: Field, maker: Maker, names: list[str], count: int, queries: int
) -> dict[str, Any]:
    """The share of what was asked for that is said, by task, and over the tasks that the whole cache solves in part."""
    found = {
        name: scored(model, tokenizer, field, [TASKS[name](maker) for _ in range(count)], queries) for name in names
    }
    solved = [name for name in names if mean(found[name]["whole"]) > 0]
    if solved:
        rows = found[solved[0]]
        found["all that the whole cache solves in part"] = {
            cache: [score for name in solved for score in found[name][cache]] for cache in rows
        }
    return _summed(field, found)


def _summed(field: Field, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    return {
        "scores": {
            task: {name: {"score": mean(own), **paired(own, rows[field.against(name)])} for name, own in rows.items()}
            for task, rows in found.items()
        }
    }


def speed(model: Any, field: Field, tokens: Tensor, steps: int, repeats: int, queries: int) -> Table:
    """Processor seconds of the prompt with its compression, and tokens per processor second behind it; the best of some.

    The seconds are those of all threads of this process.
    """
    made = field.at(Prompt(model, tokens, queries))
    result: Table = {name: {"prompt_seconds": float("inf"), "tokens_per_second": 0.0} for name in made}
    # in turn, so that what else the machine does meets all of them
    for _ in range(repeats):
        for name, make in made.items():
            cache, row = make(), result[name]
            step = tokens[:, -1:]
            with torch.no_grad():
                began = time.process_time()
                model(tokens, past_key_values=cache, logits_to_keep=1)
                row["prompt_seconds"] = min(row["prompt_seconds"], time.process_time() - began)
                row["bytes"] = cache.stored_bytes()
                began = time.process_time()
                for _ in range(steps):
                    model(step, past_key_values=cache)
                row["tokens_per_second"] = max(row["tokens_per_second"], steps / (time.process_time() - began))
            cache.close()
    return result
