"""A prompt that runs through the model once, and caches that go on from there."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from merganser.runtime import MergedCache


class Prompt:
    """A prompt that ran once: keys, values and the last queries of every layer; of one with a sliding window, what it holds.

    Args:
        model: A causal language model.
        tokens: Shape [1, tokens].
        queries: Number of last tokens whose queries caches may look at.
    """

    def __init__(self, model: Any, tokens: Tensor, queries: int):
        cache = MergedCache("snapkv", model, budget=tokens.shape[1] + queries + 99, window=queries)
        with torch.no_grad():
            self.logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        self.windows = {at: each for at, each in enumerate(cache.layers) if each.is_sliding}
        self.layers = {
            at: (each.keys, each.values, each.queries, each.scaling)
            for at, each in enumerate(cache.layers)
            if not each.is_sliding
        }
        self.attentions = [each.self_attn for each in model.base_model.layers]
        self.length = tokens.shape[1]
        cache.close()

    def into(self, cache: Any) -> Any:
        """Let a cache see the prompt."""
        for at, window in self.windows.items():
            cache.layers[at] = copy.deepcopy(window)
        for at, (keys, values, queries, scaling) in self.layers.items():
            layer = cache.layers[at]
            layer.meet(self.attentions[at])
            if wanted := layer.queries_wanted():
                layer.observe(queries[:, :, -wanted:], scaling)
            layer.update(keys, values)
        return cache


def bits(model: Any, prompt: Prompt, cache: Any, following: Tensor) -> float:
    """Mean bits per token of what follows, all in one call."""
    with torch.no_grad():
        logits = model(following[:, :-1], past_key_values=prompt.into(cache)).logits
    # logarithms in bfloat16 would have steps of a hundredth of a bit and more
    logits = torch.cat((prompt.logits[:, None], logits), dim=1).float().log_softmax(-1)
    return float(-logits.gather(-1, following[..., None]).mean()) / math.log(2)


def answer(model: Any, prompt: Prompt, cache: Any, count: int) -> list[int]:
    """The next tokens, greedily."""
    prompt.into(cache)
    found, logits = [], prompt.logits
    for _ in range(count):
        found.append(int(logits.argmax()))
        if len(found) == count:
            break
        with torch.no_grad():
            logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits[:, -1]
    return found
