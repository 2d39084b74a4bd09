"""Caches of models some of whose layers have a sliding window: those stay as they are, the others are compressed."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache

from merganser.errors import UnsupportedError
from merganser.runtime import LAYERS, MergedCache, RetrievalHeads, find_retrieval_heads
from merganser.runtime.window import WindowLayer
from tests.runtime.making import model, text

METHODS = sorted(set(LAYERS) - {"minicache"})
NEAR = {"sinks": 2, "window": 6}
# one of two layers attends to all tokens
HEADS = RetrievalHeads(2, ((1,),))
SMALL = {"razor_attention": {"heads": HEADS, **NEAR, "share": 0.0}, "task_kv": {"middle": 5, **NEAR}}
WHOLE = {"razor_attention": {"heads": HEADS, "window": 99}, "task_kv": {"middle": 99}}
KINDS = {
    "gemma3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
}


def generated(made, tokens, cache, **options):
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False, **options}
    return made.generate(tokens, past_key_values=cache, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_lost_nothing_changed(kind):
    made, tokens = model(kind, **KINDS[kind]), text(20, rows=2)
    expected, beams = generated(made, tokens, None), generated(made, tokens, None, num_beams=2)
    for method in METHODS:
        options = WHOLE.get(method, {"budget": 99})
        cache = MergedCache(method, made, **options)
        assert torch.equal(generated(made, tokens, cache), expected)
        assert sorted(cache.kept()) == [9, 25]
        assert cache.get_seq_length() == 25
        assert torch.equal(generated(made, tokens, MergedCache(method, made, **options), num_beams=2), beams)


def test_a_window_holds_what_the_models_own_cache_does():
    made, tokens = model("gemma3"), text(30, rows=2)
    cache, own = MergedCache("snapkv", made, budget=16, **NEAR), DynamicCache(config=made.config)
    # up to transformers 5.2 the places of new tokens are given, later their number
    numbers = "query_length" in inspect.signature(own.layers[0].get_mask_sizes).parameters
    new = 3 if numbers else torch.arange(3)
    with torch.no_grad():
        for part in tokens.split([6, 2, 1, 1, 12, 1, 7], dim=1):
            assert cache.layers[0].get_mask_sizes(new) == own.layers[0].get_mask_sizes(new)
            made(part, past_key_values=cache)
            made(part, past_key_values=own)
            assert torch.equal(cache.layers[0].keys, own.layers[0].keys)
            assert torch.equal(cache.layers[0].values, own.layers[0].values)
    assert cache.kept() == [9, 16]
    assert cache.stored_bytes() == (9 + 16) * 2 * 2 * 2 * 8 * 4
    one = WindowLayer(1)
    one.update(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8))
    assert (one.kept(), one.get_mask_sizes(1)) == (0, (1, 5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_dropped_is_what_masks_would_hide(attention):
    made, tokens = model("gemma3", attention), text(24)
    cache = MergedCache("streaming_llm", made, budget=16, sinks=2, window=4)
    with torch.no_grad():
        made(tokens[:, :20], past_key_values=cache)
        found = [made(part, past_key_values=cache).logits for part in (tokens[:, 20:22], tokens[:, 22:])]
        places = torch.arange(24)
        every = places[None] <= places[:, None]
        last = every & (places[None] > places[:, None] - 10)
        every[20:22, 2:6] = False
        every[22:, 2:8] = False
        masks = {"full_attention": every, "sliding_attention": last}
        lowest = torch.finfo(torch.float32).min
        additive = {name: torch.zeros(1, 1, 24, 24).masked_fill(~mask, lowest) for name, mask in masks.items()}
        expected = made(tokens, attention_mask=additive).logits
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 20:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_compressed_caches_go_on(method):
    """A copy, reordered rows and a reset say what a new cache says; going back is refused."""
    made, tokens, step = model("gemma3"), text(30, rows=2), text(2, rows=2, seed=3)
    options = SMALL.get(method, {"budget": 16, "sinks": 2, "window": 4})
    cache, other = MergedCache(method, made, **options), MergedCache(method, made, **options)
    with torch.no_grad():
        made(tokens, past_key_values=cache)
        made(tokens.flip(0), past_key_values=other)
        copied = copy.deepcopy(cache)
        copied.reorder_cache(torch.tensor([1, 0]))
        expected = made(step, past_key_values=other).logits
        assert torch.equal(made(step, past_key_values=copied).logits, expected)
        with pytest.raises(UnsupportedError, match="a compressed cache cannot go back"):
            cache.crop(-1)
        cache.reset()
        made(tokens.flip(0), past_key_values=cache)
        assert torch.equal(made(step, past_key_values=cache).logits, expected)


def test_retrieval_heads_are_those_of_layers_that_see_all_tokens():
    made = model("gemma3", num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    heads = find_retrieval_heads(made, tokens=20, repeats=3, induction=1.0)
    assert heads.layers == ((0, 1), (0, 1))
    assert MergedCache("razor_attention", made, heads=heads).layers[2].whole == (0, 1)


def test_minicache_has_no_pairs():
    with pytest.raises(
        UnsupportedError, match="minicache: the model has layers with a sliding window; pairs of layers"
    ):
        MergedCache("minicache", model("gemma3"))
