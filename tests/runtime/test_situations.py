"""Every cache in every situation of `generate`: what it does is right, or it is refused with a message."""

import copy
from functools import cache as remembered

import pytest
import torch
import transformers
from transformers import AutoConfig

from merganser.errors import UnsupportedError
from merganser.runtime import LAYERS, MergedCache, RetrievalHeads
from tests.runtime.making import model, text

METHODS = sorted(LAYERS)
NEAR = {"sinks": 2, "window": 6}
# what they take in tests that compress, and in tests in which nothing may be lost
SMALL = {
    "minicache": {"start": 0},
    "razor_attention": {"heads": RetrievalHeads(2, ((1,), ())), **NEAR, "share": 0.0},
    "task_kv": {"middle": 5, **NEAR},
}
WHOLE = {
    "minicache": {"retained": 1.0, "start": 0},
    "razor_attention": {"window": 99},
    "task_kv": {"share": 1.0, "middle": 5, **NEAR},
}


def small(method, made):
    return MergedCache(method, made, **SMALL.get(method, {"budget": 16, "sinks": 2, "window": 4}))


def whole(method, made):
    options = WHOLE.get(method, {"budget": 99, "sinks": 2, "window": 4})
    if method == "razor_attention":
        options = {**options, "heads": RetrievalHeads(made.config.num_key_value_heads, ((), ()))}
    return MergedCache(method, made, **options)


def generated(made, tokens, cache, new=4, **options):
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": new, "do_sample": False, **options}
    torch.manual_seed(0)
    return made.generate(tokens, past_key_values=cache, **settings)


ONES = {
    "greedy": ({}, {}),
    "sampling, several answers": ({}, {"do_sample": True, "num_return_sequences": 2}),
    "beams, several answers": ({}, {"num_beams": 3, "num_return_sequences": 2}),
    "a prompt in parts": ({}, {"prefill_chunk_size": 7}),
    "heads that are not grouped": ({"num_key_value_heads": 4}, {}),
    "one key head": ({"num_key_value_heads": 1}, {}),
}


@remembered
def without(situation):
    """A model, and what it generates in a situation without the cache."""
    changes, options = ONES[situation]
    made = model(**changes)
    return made, generated(made, text(20, rows=2), None, **options)


@pytest.mark.parametrize("situation", ONES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_lost_nothing_changed(method, situation):
    made, expected = without(situation)
    options = ONES[situation][1]
    if "prefill_chunk_size" in options and transformers.__version__.startswith("5.2."):
        # its `generate` gives every part the positions of the prompt's last tokens
        with pytest.raises(UnsupportedError, match="positions must go on from the 0 tokens seen"):
            generated(made, text(20, rows=2), whole(method, made), **options)
        return
    assert torch.equal(generated(made, text(20, rows=2), whole(method, made), **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_several_turns(method):
    """The second turn gives all tokens so far, and the cache goes on from those that it saw."""
    made, tokens = model(), text(24)
    cache = small(method, made)
    first = generated(made, tokens, cache)
    second = torch.cat((first, text(5, seed=4)), dim=1)
    found = generated(made, second, cache)
    # by hand: the last generated token was not seen
    by_hand, said = small(method, made), []
    with torch.no_grad():
        for part in (tokens, *first[:, 24:-1].split(1, dim=1), second[:, first.shape[1] - 1 :]):
            logits = made(part, past_key_values=by_hand).logits
        for _ in range(4):
            said.append(int(logits[0, -1].argmax()))
            logits = made(torch.tensor([said[-1:]]), past_key_values=by_hand).logits
    assert found[0, -4:].tolist() == said
    assert cache.get_seq_length() == by_hand.get_seq_length() - 1 == second.shape[1] + 3


@pytest.mark.parametrize("method", METHODS)
def test_copies_go_their_own_ways(method):
    made, tokens, one, two = model(), text(24), text(3, seed=5), text(3, seed=6)
    cache, other = small(method, made), small(method, made)
    with torch.no_grad():
        for each in (cache, other):
            made(tokens, past_key_values=each)
        copied = copy.deepcopy(cache)
        made(one, past_key_values=cache)
        found = [made(two, past_key_values=each).logits for each in (copied, other)]
    assert torch.equal(*found)
    assert copied.kept() == other.kept()
    cache.close()
    made(one, past_key_values=copied)
    with pytest.raises(UnsupportedError, match="this cache was closed, or its model is gone; it cannot be copied"):
        copy.deepcopy(cache)


def padded(made, cache, side):
    tokens = text(20, rows=2)
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 3) if side == "left" else slice(17, 20)] = 0
    made(tokens, attention_mask=mask, past_key_values=cache)


def again(made, cache, rows=1, **options):
    made(text(24), past_key_values=cache)
    made(text(3, rows=rows), past_key_values=cache, **options)


def flexible(made, cache):
    made.config._attn_implementation = "flex_attention"
    made(text(9), past_key_values=cache)


def assisted(made, cache):
    generated(made, text(30), cache, 20, assistant_model=model(num_hidden_layers=1))


def looked_up(made, cache):
    generated(made, text(30), cache, 20, prompt_lookup_num_tokens=3, eos_token_id=1)


REFUSED = {
    "left padding": (lambda made, cache: padded(made, cache, "left"), "rows are padded"),
    "right padding": (lambda made, cache: padded(made, cache, "right"), "rows are padded"),
    "other rows": (
        lambda made, cache: again(made, cache, rows=2),
        "the cache holds 1 row, and this call has 2; repeat",
    ),
    "a mask of new tokens": (
        lambda made, cache: again(made, cache, attention_mask=torch.ones(1, 3)),
        "the attention mask is for 3 tokens, and with those of this call 27 were seen",
    ),
    "positions that begin again": (
        lambda made, cache: again(made, cache, position_ids=torch.arange(3)[None]),
        "positions must go on from the 24 tokens seen",
    ),
    "other attention": (flexible, "attention 'flex_attention' is not supported"),
    # from transformers 5.24 on, by generate itself
    "assisted decoding": (assisted, "cannot go back|requires a cache that can be cropped"),
    "prompt lookup": (looked_up, "cannot go back|requires a cache that can be cropped"),
    "cropping": (
        lambda made, cache: (made(text(9), past_key_values=cache), cache.crop(-2)),
        "a compressed cache cannot go back 2 tokens",
    ),
}
# refused by transformers itself, before the cache is asked
STATIC = {"static": {}, "dynamic": {}, "offloaded": {}, "quantized": {}}


@pytest.mark.parametrize("situation", REFUSED)
@pytest.mark.parametrize("method", METHODS)
def test_refused(method, situation):
    action, message = REFUSED[situation]
    made = model()
    with torch.no_grad(), pytest.raises((UnsupportedError, ValueError), match=message):
        action(made, small(method, made))


@pytest.mark.parametrize("implementation", STATIC)
def test_a_second_cache_is_refused(implementation):
    made = model()
    with pytest.raises(ValueError, match="cache_implementation"):
        generated(made, text(9), small("snapkv", made), cache_implementation=implementation)


@pytest.mark.parametrize("method", METHODS)
def test_models_are_refused(method):
    with pytest.raises(UnsupportedError, match=f"{method}: all layers of the model have a sliding window, so its own"):
        small(method, model("mistral", sliding_window=16))
    with pytest.raises(
        UnsupportedError, match=rf"{method}: the model has layers without causal .*use_bidirectional_att"
    ):
        small(method, model("gemma3", use_bidirectional_attention=True))
    # softcaps, sinks, linear attention, latent keys, two stacks
    for name in ("gemma2", "gpt_oss", "qwen3_next", "deepseek_v3", "t5"):
        other = torch.nn.Module()
        other.config = AutoConfig.for_model(name)
        with pytest.raises(UnsupportedError, match=f"{method}: models of type '{name}' are not supported; llama"):
            small(method, other)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_never_compiled_and_says_that_it_cannot_be_cropped(method):
    cache = small(method, model())
    assert not cache.is_compileable
    assert not any(layer.is_croppable for layer in cache.layers)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method):
    made, tokens = model().bfloat16(), text(30)
    cache = whole(method, made)
    logits = made(tokens, past_key_values=cache).logits
    torch.testing.assert_close(logits, made(tokens).logits)
    cache = small(method, made)
    with torch.no_grad():
        for part in tokens.split([20, 1, 9], dim=1):
            logits = made(part, past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
