"""Checks that come before any figure: caches that hold everything change nothing, and bytes are equal."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from merganser.runtime import MergedCache

from .contenders import Field, budget, width
from .prompts import Prompt, answer


class WrongResultError(Exception):
    """A cache does not do what the comparison takes for granted."""


def check(model: Any, tokens: Tensor, field: Field, methods: list[str], entries: int, queries: int) -> None:
    """Check every cache on one prompt.

    Raises:
        WrongResultError: A cache whose budget is never reached gives other tokens or logits than the model's own; a
            prompt that is handed over gives other entries than one that runs with the cache; or a method takes more
            bytes than SnapKV.
    """
    prompt = Prompt(model, tokens, queries)
    plain = DynamicCache(config=model.config)
    expected = []
    with torch.no_grad():
        logits = model(tokens, past_key_values=plain, logits_to_keep=1).logits[:, -1]
        for _ in range(4):
            expected.append(int(logits.argmax()))
            logits = model(torch.tensor([expected[-1:]]), past_key_values=plain).logits[:, -1]
    for method in methods:
        cache = MergedCache(method, model, budget=tokens.shape[1] + 99)
        found = answer(model, prompt, cache, 4)
        if found != expected:
            raise WrongResultError(
                f"{method}: with a budget above the length the next tokens are {found}, and the model's own cache gives "
                f"{expected}"
            )
        _same_entries(model, tokens, prompt, method, budget(method, entries, width(model)))
    _bytes(prompt, field, methods, entries)


def _same_entries(model: Any, tokens: Tensor, prompt: Prompt, method: str, entries: int) -> None:
    ran = MergedCache(method, model, budget=entries)
    with torch.no_grad():
        model(tokens, past_key_values=ran, logits_to_keep=1)
    for one, other in zip(ran.layers, prompt.into(MergedCache(method, model, budget=entries)).layers, strict=True):
        if one.keys.shape != other.keys.shape or not torch.allclose(one.values, other.values, rtol=1e-3, atol=1e-4):
            raise WrongResultError(
                f"{method}: a prompt handed over gives other entries than one that runs with the cache"
            )


def _bytes(prompt: Prompt, field: Field, methods: list[str], entries: int) -> None:
    made = field.at(prompt)
    # those of layers with a sliding window are the same in all caches
    beside = sum(each.stored_bytes() for each in prompt.windows.values())
    found = {name: prompt.into(make()).stored_bytes() - beside for name, make in made.items()}
    for name, taken in found.items():
        if name != "whole" and name not in field.free and name in methods:
            most = found[field.against(name)]
            # a method that holds numbers beside its entries has a whole number of them: up to two entries fewer
            if not most * (1 - 2 / entries) < taken <= most:
                raise WrongResultError(f"{name}: takes {taken} bytes, and {field.against(name)} {most}")
