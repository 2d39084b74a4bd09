"""Caches within a model: what every method must satisfy, and what is refused."""

import gc

import pytest
import torch
from transformers import DynamicCache

from merganser.errors import MergeError, ParameterError, UnsupportedError
from merganser.runtime import LAYERS, MergedCache
from tests.runtime.making import model, text

BOUNDED = sorted(set(LAYERS) - {"minicache", "razor_attention", "task_kv"})

SMALL = {"budget": 16, "sinks": 2, "window": 4}


def generated(made, tokens, cache, **options):
    found = made.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", BOUNDED)
def test_a_budget_of_the_length_changes_nothing(method, attention):
    made, tokens = model(attention=attention), text(20, rows=2)
    expected, logits = generated(made, tokens, None)
    cache = MergedCache(method, made, budget=28, sinks=2, window=4)
    sequences, found = generated(made, tokens, cache)
    assert torch.equal(sequences, expected)
    assert torch.equal(found, logits)
    assert cache.get_seq_length() == 27


@pytest.mark.parametrize("method", BOUNDED)
def test_never_more_than_the_budget_after_a_call(method):
    made, tokens = model(), text(60, rows=2)
    cache = MergedCache(method, made, **SMALL)
    seen = 0
    for part in tokens.split([5, 30, 1, 1, 23], dim=1):
        made(part, past_key_values=cache)
        seen += part.shape[1]
        assert cache.get_seq_length() == seen
        assert cache.kept() == [min(seen, 16)] * 2
    assert cache.stored_bytes() >= 2 * 2 * 2 * 2 * 16 * 8 * 4


@pytest.mark.parametrize("method", BOUNDED)
def test_rows_do_not_depend_on_each_other(method):
    made, tokens = model(), text(40, rows=2)
    both = generated(made, tokens, MergedCache(method, made, **SMALL))[1]
    for row in range(2):
        alone = generated(made, tokens[row : row + 1], MergedCache(method, made, **SMALL))[1]
        torch.testing.assert_close(both[:, row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", BOUNDED)
def test_eager_and_sdpa_agree(method):
    tokens = text(40)
    found = [
        generated(made, tokens, MergedCache(method, made, **SMALL))[1] for made in (model(), model(attention="eager"))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_what_is_dropped_is_what_masks_would_hide():
    """StreamingLLM is attention with a mask; positions and masks after compression must say the same."""
    made, tokens = model(attention="eager"), text(24)
    cache = MergedCache("streaming_llm", made, **SMALL)
    made(tokens[:, :20], past_key_values=cache)
    # the cache holds 0, 1 and 6 ... 19; then two tokens at once, then 0, 1 and 8 ... 21
    found = [made(tokens[:, 20:22], past_key_values=cache).logits, made(tokens[:, 22:], past_key_values=cache).logits]
    places = torch.arange(24)
    mask = places[None] <= places[:, None]
    mask[20:22, 2:6] = False
    mask[22:, 2:8] = False
    additive = torch.zeros(1, 1, 24, 24).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = made(tokens, attention_mask=additive).logits
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 20:], rtol=1e-4, atol=1e-4)


def test_equal_tokens_merge_without_a_trace():
    """KVMerger: c equal entries and one with log c added to its logit give the same attention."""
    made = model(attention="eager")
    for module in made.model.layers:
        torch.nn.init.zeros_(module.self_attn.k_proj.weight)
    tokens = torch.cat((text(4), torch.full((1, 30), 7), text(6, seed=1)), dim=1)
    plain, cache = DynamicCache(config=made.config), MergedCache("kvmerger", made, budget=12, sinks=4, window=4)
    for part in tokens.split([34, 3, 1, 1, 1], dim=1):
        expected = made(part, past_key_values=plain).logits
        found = made(part, past_key_values=cache).logits
        if part.shape[1] == 34:
            # values of one token still differ by what it saw; make them equal in both
            for one, other in zip(plain.layers, cache.layers, strict=True):
                one.values[:, :, 4:] = 0.5
                other.values[:, :, 4:] = 0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert cache.layers[0].per_entry["counts"].sum(-1).tolist() == [[40.0, 40.0]]


@pytest.mark.parametrize("method", BOUNDED)
def test_rows_are_reordered_repeated_and_chosen(method):
    made, tokens = model(), text(20, rows=2)
    cache = MergedCache(method, made, **SMALL)
    made(tokens, past_key_values=cache)
    other = MergedCache(method, made, **SMALL)
    made(tokens.flip(0), past_key_values=other)
    cache.reorder_cache(torch.tensor([1, 0]))
    step = text(1, rows=2, seed=3)
    for _ in range(2):
        one, two = (made(step, past_key_values=each).logits for each in (cache, other))
        torch.testing.assert_close(one, two)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    one, two = (made(step, past_key_values=each).logits for each in (cache, other))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("method", BOUNDED)
def test_reset(method):
    made, tokens = model(), text(30)
    cache = MergedCache(method, made, **SMALL)
    first = generated(made, tokens, cache)[1]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generated(made, tokens, cache)[1], first)


def test_two_caches_on_one_model_and_none():
    made, tokens = model(), text(30)
    plain = generated(made, tokens, None)[1]
    one, two = MergedCache("snapkv", made, **SMALL), MergedCache("kvmerger", made, **SMALL)
    first = generated(made, tokens, one)[1]
    generated(made, tokens, two)
    assert torch.equal(generated(made, tokens, None)[1], plain)
    one.reset()
    assert torch.equal(generated(made, tokens, one)[1], first)


def test_hooks_go_with_the_cache():
    made = model()
    cache = MergedCache("snapkv", made, **SMALL)
    assert made.model.layers[0].self_attn._forward_pre_hooks
    del cache
    gc.collect()
    assert not made.model.layers[0].self_attn._forward_pre_hooks
    assert not made.model._forward_pre_hooks
    closed = MergedCache("snapkv", made, **SMALL)
    closed.close()
    with pytest.raises(UnsupportedError, match="this cache was closed"):
        made(text(4), past_key_values=closed)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kvmerge", {}, "Did you mean 'kvmerger'?"),
        ("snapkv", {}, "snapkv: budget is missing"),
        ("snapkv", {"budget": 36}, "the least is 37"),
        ("snapkv", {"budget": 99.0}, "budget: must be a whole number of at least 1, not 99.0"),
        ("snapkv", {"budget": 99, "sinks": -1}, "sinks: must be a whole number of at least 0, not -1"),
        ("snapkv", {"budget": 99, "windows": 8}, "'windows' is not an option. Did you mean 'window'?"),
        ("snapkv", {"budget": 99, "pool": 4}, "pool: must be odd"),
        ("kvmerger", {"budget": 99, "heavy": 0.6}, "heavy: must be a share from 0 to 0.5, not 0.6"),
        ("kvmerger", {"budget": 99, "mass": "keys"}, "mass: must be 'logits' or 'values'"),
        ("d2o", {"budget": 99, "beta": 0}, "beta: must be a share above 0 and up to 1, not 0"),
        ("d2o", {"budget": 99, "history": 3}, "history: must be a whole number of at least 32"),
        ("minicache", {"t": 1.1}, "t: must be a share from 0 to 1, not 1.1"),
        ("minicache", {"retained": "all"}, "retained: must be a share from 0 to 1"),
        ("minicache", {"start": -1}, "start: must be a whole number of at least 0"),
        ("minicache", {"budget": 99}, "minicache: 'budget' is not an option"),
        ("ems", {"budget": 99, "similarity": 2}, "similarity: must be a cosine"),
        ("ems", {"budget": 99, "merge_keys": "no"}, "merge_keys: must be true or false, not 'no'"),
        (["ems"], {"budget": 99}, "method: ['ems'] is not a cache"),
    ],
)
def test_options_are_checked(method, options, message):
    with pytest.raises(ParameterError) as error:
        MergedCache(method, model(), **options)
    assert message in str(error.value)


def refused(action):
    with pytest.raises(MergeError) as error:
        action()
    return str(error.value)


def test_models_are_checked():
    flex = model()
    flex.config._attn_implementation = "flex_attention"
    assert "attention 'flex_attention' is not supported" in refused(lambda: MergedCache("snapkv", flex, **SMALL))
    wrapped = torch.nn.Module()
    wrapped.config, wrapped.base_model = model().config, model()
    assert "Module wraps a model; give the model of transformers" in refused(
        lambda: MergedCache("snapkv", wrapped, **SMALL)
    )
    other = model()
    other.config.model_type = "gpt2"
    assert "models of type 'gpt2' are not supported; llama" in refused(lambda: MergedCache("snapkv", other, **SMALL))
    assert "models of type 'Linear' are not" in refused(lambda: MergedCache("snapkv", torch.nn.Linear(1, 1), **SMALL))


def test_calls_are_checked():
    made, tokens = model(), text(30, rows=2)
    cache = MergedCache("snapkv", made, **SMALL)
    square = torch.ones(2, 1, 30, 30, dtype=torch.bool)
    assert "attention masks other than" in refused(lambda: made(tokens, attention_mask=square, past_key_values=cache))
    for each in (cache, MergedCache("streaming_llm", made, **SMALL)):
        assert "made for another model" in refused(lambda each=each: model()(tokens, past_key_values=each))
    made(tokens, past_key_values=cache)
    # transformers 4 says how many tokens stay
    for nothing in (0, 30, 31):
        cache.layers[0].crop(nothing)
    for one in (-1, 29):
        assert "cannot go back 1 tokens" in refused(lambda one=one: cache.layers[0].crop(one))
