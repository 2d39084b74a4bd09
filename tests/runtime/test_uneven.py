"""Caches whose heads keep different numbers of entries: RazorAttention and Task-KV."""

from typing import Any, NamedTuple

import pytest
import torch
from transformers import DynamicCache

from merganser.runtime import MergedCache, RetrievalHeads
from tests.runtime.making import model, text

HEADS = RetrievalHeads(2, ((), (1,), (0, 1)))
RAZOR = {"sinks": 2, "window": 6, "share": 0.0}
TASK = {"sinks": 2, "middle": 5, "window": 6}
SHAPES = {
    "razor_attention": {"num_hidden_layers": 3},
    "task_kv": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
}


def made_of(method, attention="sdpa"):
    return model(attention=attention, **SHAPES[method])


class Held(NamedTuple):
    """What a cache holds of 40 tokens: entries of each layer, and of all heads together."""

    method: str
    options: dict[str, Any]
    kept: list[int]
    entries: int


HELD = {
    # three heads that keep 40; three that keep 8 and a mean
    "razor_attention": Held("razor_attention", {"heads": HEADS, **RAZOR}, [9, 40, 40], 3 * 40 + 3 * 9),
    "task_kv, no head whole": Held("task_kv", {"share": 0, **TASK}, [13, 13], 2 * 3 * 13),
    "task_kv": Held("task_kv", {"share": 0.4, **TASK}, [40, 40], 2 * (40 + 2 * 13)),
}


def in_parts(made, cache, tokens, parts=(30, 1, 9)):
    """The logits of the last part of a text that comes in parts."""
    for part in tokens.split(parts, dim=1):
        logits = made(part, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("name", HELD)
def test_what_is_held(name):
    method, options, kept, entries = HELD[name]
    tokens, found = text(40, rows=2), []
    for attention in ("sdpa", "eager"):
        made = made_of(method, attention)
        cache = MergedCache(method, made, **options)
        found.append(in_parts(made, cache, tokens))
        assert cache.kept() == kept
        assert cache.get_seq_length() == 40
        # keys and values of 8 numbers of 4 bytes, of two rows
        assert cache.stored_bytes() == 2 * 2 * 8 * 4 * entries
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(in_parts(made, cache, tokens), found[1])


WHOLE = {
    "razor_attention, all heads": ("razor_attention", {"heads": RetrievalHeads(2, ((0, 1),) * 3), **RAZOR}, 40),
    "task_kv, a short text": ("task_kv", {"share": 0.4, "sinks": 2, "middle": 14, "window": 4}, 20),
    "task_kv, all heads": ("task_kv", {"share": 1.0, "sinks": 2, "middle": 5, "window": 4}, 40),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WHOLE)
def test_nothing_dropped_nothing_changed(name, attention):
    method, options, length = WHOLE[name]
    made, tokens = made_of(method, attention), text(length, rows=2)
    plain, cache = DynamicCache(config=made.config), MergedCache(method, made, **options)
    for part in tokens.split([length - 8, 1, 7], dim=1):
        found = made(part, past_key_values=cache).logits
        torch.testing.assert_close(found, made(part, past_key_values=plain).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["razor_attention", "task_kv"])
def test_rows_and_beams(name):
    method, options = HELD[name][:2]
    made, tokens, step = made_of(method), text(40, rows=2), text(1, rows=2, seed=3)
    cache, other, alone = (MergedCache(method, made, **options) for _ in range(3))
    made(tokens, past_key_values=cache)
    made(tokens.flip(0), past_key_values=other)
    made(tokens[1:], past_key_values=alone)
    cache.reorder_cache(torch.tensor([1, 0]))
    for _ in range(2):
        one, two = (made(step, past_key_values=each).logits for each in (cache, other))
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one[:1], made(step[:1], past_key_values=alone).logits, rtol=1e-4, atol=1e-4)
